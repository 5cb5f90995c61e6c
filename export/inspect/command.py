"""Look into an .onnx file before it is served: ``python -m export inspect FILE``.

Owns the order of what is looked at, what the server would say, and where a proposal is written. Must not know how
anything is found out or printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from export.describe import read_manifest
from export.errors import ExportError
from export.inspect.anatomy import dissect
from export.inspect.printing import print_anatomy, print_lines, print_own, print_proposal
from export.inspect.proposal import Proposal, propose
from export.show import print_written
from export.versions import file_beside, write_file
from service.errors import LoadError
from service.graphs.description import NAME, Description, parse, read
from service.graphs.onnx_file import OnnxFile
from service.graphs.presented import present
from service.manifest import METADATA_KEY

MAX_TENSORS = 1_000
PLAIN_WIDTH = 160
"""Columns of a table that is not printed to a terminal."""


def inspect(path: Path, write: bool, console: Console) -> bool:
    """Print what a file holds, a model.yaml for it, and what the server would say to one that is there.

    Args:
        path: the .onnx file.
        write: whether to write the proposal as NAME/model.yaml; keys that stand there and describe no graph stay.
        console: where to.

    Returns:
        Whether nothing is left to decide, and the server would not refuse the file for what it is or what its
        model.yaml says. Whether its results are right is seen when it is loaded.

    Raises:
        ExportError: it is no such file, its manifest does not hold to the format, or there is no place to write to.
    """
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    if not path.is_file():
        raise ExportError(f"{path} is not a file")
    place = _Place.of(path)
    if write:
        place.check(path)
    try:
        file = OnnxFile(path)
    except LoadError as error:
        raise ExportError(str(error)) from error
    _check(file)
    anatomy = dissect(file)
    manifest = read_manifest(file.model) if METADATA_KEY in file.metadata else None
    if manifest is not None:
        print_own(manifest, anatomy.recurrences, console)
        if write:
            raise ExportError(f"nothing is written: {path} says of itself what a {NAME} would")
    else:
        print_anatomy(path, anatomy, console)
    try:
        file.check(sys.maxsize)  # how large a model may be is the server's own setting
    except LoadError as error:
        print_lines([f"The server refuses the file, whatever a {NAME} says: {error}"], console)
        return False
    if manifest is not None:
        if (for_cuda := file_beside(path, "cuda")).is_file():
            says = f"On CUDA {for_cuda.name}, which lies beside it, is run if it is the same model: verify tells."
            print_lines([says], console)
        return _verdict_on_own(place, console)
    proposal = propose(anatomy)
    print_proposal(proposal, console)
    if write:
        write_file(place.path, place.with_graph(proposal).encode())
        print_written(place.path, console)
    elif place.describes_graph:
        return _verdict(f"{place.path}, which is there,", place.error or _refusal(file, place.description), console)
    if proposal.decisions:
        console.print(f"The server refuses it until each line with {'decide:'!r} is decided and gone.")
        return False
    return _verdict("it", _refusal(file, parse(proposal.text)), console)


@dataclass(frozen=True)
class _Place:
    """Where a file's model.yaml would be, and what is there.

    Attributes:
        path: NAME/model.yaml.
        text: what it holds; empty where there is none.
        description: the same, read; None where there is none, or it cannot be read.
        error: why it cannot be read.
    """

    path: Path
    text: str = ""
    description: Description | None = None
    error: str | None = None

    @classmethod
    def of(cls, path: Path) -> _Place:
        """That of an .onnx file."""
        version = path.resolve().parent
        place = version.parent / NAME
        if not version.name.isdecimal():
            return cls(place)
        try:
            description = read(place.parent)
            return cls(place, "" if description is None else place.read_text("utf-8"), description)
        except (LoadError, UnicodeDecodeError) as error:
            return cls(place, error=str(error))

    @property
    def describes_graph(self) -> bool:
        """Whether it says something of the graph, or cannot be read."""
        return self.error is not None or (self.description is not None and self.description.of_graph)

    def check(self, path: Path) -> None:
        """See whether a proposal can be written to it."""
        if not path.resolve().parent.name.isdecimal():
            raise ExportError(f"--write needs a file of a repository, NAME/VERSION/{path.name}, and writes NAME/{NAME}")
        if self.describes_graph:
            raise ExportError(f"{self.path} is there already")
        try:
            # Not every form of YAML can be gone on with at its end.
            parse(self._with("inputs: {x: {}}\noutputs: {y: {}}\n"))
        except LoadError as error:
            raise ExportError(f"{self.path} is there, and nothing can be added at its end: {error}") from error

    def with_graph(self, proposal: Proposal) -> str:
        """What it holds, and the proposal."""
        return self._with(f"# Proposed by python -m export inspect.\n{proposal.text}")

    def _with(self, more: str) -> str:
        return f"{self.text.rstrip()}\n\n{more}" if self.text.strip() else more


def _refusal(file: OnnxFile, description: Description | None) -> str | None:
    """What the server would say to a file with a description; None where it would take it."""
    assert description is not None
    try:
        present(description, file.signature, file.path.resolve().parent.parent, file.initializer)
    except LoadError as error:
        return str(error)
    return None


def _verdict(what: str, refusal: str | None, console: Console) -> bool:
    if refusal is not None:
        print_lines([f"The server would refuse {what} all the same: {refusal}"], console)
    elif what != "it":
        print_lines([f"The server would take {what} with this file."], console)
    return refusal is None


def _verdict_on_own(place: _Place, console: Console) -> bool:
    if place.describes_graph:
        why = place.error or f"{place.path} describes its graph too: remove one"
        print_lines([f"The server would refuse it: {why}"], console)
        return False
    console.print(f"Its manifest says what a {NAME} would: none is needed.")
    return True


def _check(file: OnnxFile) -> None:
    """Refuse what no exporter writes, and what could not be printed."""
    graph, name = file.model.graph, file.path.name
    if not graph.node:
        raise ExportError(f"{name} is not an onnx file: it holds no nodes")
    if len(graph.input) + len(graph.output) > MAX_TENSORS:
        raise ExportError(f"{name} has more than {MAX_TENSORS} inputs and outputs")
    # protobuf gives bytes for a text that is none.
    values = [text for value in (*graph.input, *graph.output) for text in _texts(value)]
    nodes = [text for node in file.nodes() for text in _node_texts(node.proto)]
    if not all(isinstance(text, str) for text in (*values, *nodes)):
        raise ExportError(f"{name} is damaged: it has names that are not text")


def _texts(value: Any) -> Iterator[object]:
    yield value.name
    yield from (axis.dim_param for axis in value.type.tensor_type.shape.dim)


def _node_texts(node: Any) -> Iterator[object]:
    yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    yield from (attribute.name for attribute in node.attribute)
