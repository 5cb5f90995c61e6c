"""An .onnx file, read without running it: its nodes wherever they stand, its values, what lies outside it.

Owns the walk through a file, its seal, and what is refused of it; the only room that imports onnx, and only when a file
is walked through, because that import takes half a second. Must not know onnxruntime or what a model is served as.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import LoadError
from service.graphs.graph import Port, Signature
from service.manifest import Precision

Array = NDArray[np.generic]

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Domains of operators that onnxruntime brings along."""
SEAL_KEY = "conveyor.sha256"
"""The key of a seal: the metadata entry that ends a file, with the sha256 of all bytes before it."""
_ENTRY = bytes([0x0A, len(SEAL_KEY)]) + SEAL_KEY.encode() + bytes([0x12, 64])
"""A StringStringEntryProto up to its value: the key is field 1, the value of 64 letters field 2 (onnx.proto)."""
_SEAL = bytes([0x72, len(_ENTRY) + 64]) + _ENTRY
"""The same as an entry of ModelProto.metadata_props, field 14, which may stand anywhere in a message (protobuf)."""
_SEAL_BYTES = len(_SEAL) + 64
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Node:
    """A node, at the top of the graph or anywhere inside it.

    Attributes:
        path: names of the nodes around it and its own, as in ``loop/body/lstm``; a node without a name has its
            operator's and its index.
        proto: the onnx NodeProto.
        graph: the onnx GraphProto or FunctionProto that it stands in.
    """

    path: str
    proto: Any
    graph: Any


@dataclass(frozen=True, slots=True)
class External:
    """Where a tensor's data lies outside the file: relative to the file's folder."""

    tensor: str
    location: str


class OnnxFile:
    """An .onnx file.

    Attributes:
        path: of the file.
        model: the onnx ModelProto, without external data.

    Raises:
        LoadError: if it cannot be read, or is no onnx file.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        try:
            self.model: Any = onnx.load(path, load_external_data=False)
        except OSError as error:
            raise LoadError(f"cannot read {path.name}: {error.strerror}") from error
        except Exception as error:  # protobuf's own, which has no public name in every version
            raise LoadError(f"{path.name} is not an onnx file: {error}") from error

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata by key."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @cached_property
    def signature(self) -> Signature:
        """The graph's inputs and outputs, as far as the file says them."""
        required, optional = self.inputs()
        return Signature(
            {value.name: port(value) for value in required},
            {value.name: port(value) for value in self.model.graph.output},
            {value.name: port(value) for value in optional},
        )

    def inputs(self) -> tuple[list[Any], list[Any]]:
        """The graph's inputs: those that must be given, and those that have a value and can be given another.

        Before version 4 of the format (onnx/docs/IR.md) every initializer is listed as an input, and none can be given.
        """
        graph = self.model.graph
        valued = {tensor.name for tensor in graph.initializer}
        required = [value for value in graph.input if value.name not in valued]
        optional = [value for value in graph.input if value.name in valued]
        return required, optional if self.model.ir_version >= 4 else []

    def nodes(self) -> Iterator[Node]:
        """Every node, wherever it stands."""
        yield from nodes_of(self.model)

    def tensors(self) -> Iterator[Any]:
        """Every TensorProto of the file: initializers and attributes, wherever they stand."""
        yield from tensors_of(self.model)

    @property
    def precision(self) -> Precision:
        """In what the graph computes, whatever goes in and comes out: its coarsest."""
        if any(node.proto.op_type.startswith(("DynamicQuantize", "QuantizeLinear")) for node in self.nodes()):
            return "int8"
        from onnx import TensorProto

        half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in self.tensors())
        return "float16" if half else "float32"

    def external(self) -> list[External]:
        """The tensors whose data lies outside the file."""
        found = []
        for tensor in self.tensors():
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries or tensor.data_location:
                found.append(External(tensor.name, entries.get("location", "")))
        return found

    def initializer(self, name: str) -> Array | None:
        """Return the value of one of the graph's initializers; None where there is none of that name.

        Raises:
            LoadError: if its data cannot be read.
        """
        from onnx import numpy_helper

        for tensor in self.model.graph.initializer:
            if tensor.name == name:
                try:
                    value: Array = numpy_helper.to_array(tensor, str(self.path.parent))
                except Exception as error:  # onnx raises whatever it meets
                    raise LoadError(f"initializer {name!r} cannot be read: {error}") from error
                return value
        return None

    def check(self, max_bytes: int) -> None:
        """Refuse what must not be loaded.

        Args:
            max_bytes: of the file and its external data together.

        Raises:
            LoadError: external data outside the file's folder, or missing; too many bytes; operators that nobody
                knows.
        """
        self._check_size(max_bytes)
        self._check_domains()

    def external_files(self) -> list[Path]:
        """The files of the external data, each once, in the order of their names.

        Raises:
            LoadError: if one is missing, or lies outside the file's folder.
        """
        # Where the graph's own file is a link, its folder is still the one that it was found in.
        folder = self.path.parent.resolve()
        files = set()
        for external in self.external():
            what = f"the external data of tensor {external.tensor!r}, {external.location!r},"
            location = Path(external.location)
            if not external.location or location.is_absolute() or ".." in location.parts:
                raise LoadError(f"{what} is outside the model's folder; expected a file beside {self.path.name}")
            try:
                file = (folder / location).resolve(strict=True)
            except (OSError, ValueError, RuntimeError) as error:
                raise LoadError(f"{what} is missing") from error
            if not file.is_relative_to(folder):
                raise LoadError(f"{what} is a link out of the model's folder")
            if not file.is_file():
                raise LoadError(f"{what} is no file")
            files.add(file)
        return sorted(files)

    def _check_size(self, max_bytes: int) -> None:
        check_size([self.path, *self.external_files()], max_bytes)

    def _check_domains(self) -> None:
        own = {(function.domain, function.name) for function in self.model.functions}
        for node in self.nodes():
            domain, operator = node.proto.domain, node.proto.op_type
            if domain not in KNOWN_DOMAINS and (domain, operator) not in own:
                raise LoadError(
                    f"node {node.path!r} is a {operator} of domain {domain!r}, which onnxruntime does not bring along; "
                    f"known are {', '.join(sorted(KNOWN_DOMAINS - {''}))} and the file's own functions"
                )


def may_have_external_data(path: Path) -> bool:
    """Whether a file can name external data; told without parsing it.

    Where a file does, its bytes hold the key of that entry (onnx.proto, TensorProto.external_data). Elsewhere they hold
    it by chance at most.

    Raises:
        LoadError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(b"location") >= 0
    except OSError as error:
        raise LoadError(f"cannot read {path.name}: {error.strerror}") from error


def check_size(files: list[Path], max_bytes: int) -> None:
    """Refuse a model that is too large, before it is read.

    Raises:
        LoadError: over the limit, or a file cannot be read.
    """
    try:
        size = sum(os.stat(file).st_size for file in files)
    except OSError as error:
        raise LoadError(f"cannot read {Path(str(error.filename)).name}: {error.strerror}") from error
    if size > max_bytes:
        raise LoadError(f"the model has {size} bytes; this server loads up to {max_bytes} (--max-model-bytes)")


def seal(content: bytes) -> bytes:
    """What an .onnx file holds, with a seal behind it."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode()


def check_seal(path: Path) -> None:
    """Refuse a file that has a seal and is not as it was when it got it. Most files have none.

    Raises:
        LoadError: its sha256 is another, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - _SEAL_BYTES
            file.seek(max(left, 0))
            found = file.read(_SEAL_BYTES)
            if not found.startswith(_SEAL):
                return
            file.seek(0)
            sha = hashlib.sha256()
            while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
                sha.update(block)
                left -= len(block)
    except OSError as error:
        raise LoadError(f"cannot read {path.name}: {error.strerror}") from error
    if sha.hexdigest().encode() != found.removeprefix(_SEAL):
        raise LoadError(
            f"{path.name} is not what was written: the sha256 of its graph and weights is not the one that it carries; "
            "the file was damaged or changed: export it again"
        )


def tensors_of(model: Any) -> Iterator[Any]:
    """Every TensorProto of an onnx ModelProto: initializers and attributes, wherever they stand."""
    yield from _initializers(model.graph)
    # A function's attributes have defaults, which are attributes themselves.
    holders = [
        *(node.proto.attribute for node in nodes_of(model)),
        *(function.attribute_proto for function in model.functions),
    ]
    for attribute in chain.from_iterable(holders):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _initializers(graph)


def nodes_of(model: Any) -> Iterator[Node]:
    """Every node of an onnx ModelProto: of the graph, of the bodies of If, Loop and Scan, and of its own functions."""
    yield from _nodes(model.graph, "")
    for function in model.functions:
        yield from _nodes(function, f"{function.domain}.{function.name}/")


def port(value: Any) -> Port:
    """What an onnx ValueInfoProto says: of what is no tensor the kind, and no axes."""
    from onnx import helper

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return Port(str(kind), ())
    tensor = value.type.tensor_type
    try:
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        dtype = f"type {tensor.elem_type}" if tensor.elem_type else "no dtype"
    return Port(
        dtype,
        tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim),
    )


def _nodes(graph: Any, before: str) -> Iterator[Node]:
    for index, node in enumerate(graph.node):
        path = f"{before}{node.name or f'{node.op_type}[{index}]'}"
        yield Node(path, node, graph)
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else []
            for body in (*bodies, *attribute.graphs):
                yield from _nodes(body, f"{path}/{attribute.name}/")


def _initializers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
