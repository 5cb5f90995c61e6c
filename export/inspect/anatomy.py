"""What an .onnx file holds, as far as it matters for serving it.

Owns the reading: inputs and outputs with the names of their sizes, recurrent nodes and bodies wherever they stand,
sizes that are baked in. Must not know how it is shown, nor what is proposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper, numpy_helper, shape_inference

from export.inspect.dataflow import Dataflow, Value, follow
from service.onnx_file import Node, OnnxFile
from service.placement import CONTROL_FLOW, CPU_ONLY, RECURRENT, Attribute, Placement, place

_SHOWN_ATTRIBUTES = 12
_MAX_INFERRED_BYTES = 1 << 30
"""Shapes are inferred of files up to this size; the inference copies the file."""


@dataclass(frozen=True)
class Axis:
    """One axis: its size where it is fixed, else the name that the file gives it; neither where it says nothing.

    A size of an output is only claimed where nothing but the file's word for it is known. Exporters write the sizes of
    their example there, also of axes that are free.
    """

    size: int | None = None
    name: str | None = None
    claimed: bool = False

    def __str__(self) -> str:
        return str(self.size if self.size is not None else self.name or "?")


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph; ``axes`` is None where the file does not say them."""

    name: str
    dtype: str
    axes: tuple[Axis, ...] | None


@dataclass(frozen=True)
class Recurrence:
    """A recurrent node, or one with a body, and where it would run."""

    operator: str
    path: str
    attributes: dict[str, Attribute]
    cpu: Placement
    cuda: Placement


@dataclass(frozen=True)
class Anatomy:
    """All of it.

    Attributes:
        opsets: the version of each domain's operators.
        producer: what wrote the file, as it says.
        initializers: how many there are.
        initializer_bytes: their size together, external data included.
        external: the files of external data.
        inputs: what has to be given.
        optional: inputs that have a value, and can be given another.
        outputs: what comes out.
        recurrences: recurrent nodes and bodies, in the file's order.
        baked: sizes that the file fixes and a server would want free, one sentence each.
        hidden: nodes whose state begins anew in every run, because no input of the graph carries it.
        backward: whether a recurrent node reads its sequence from the end.
        constants: integers that stand at the top of the graph, by their tensor's name.
        flow: how values move through it.
        inferred: the axes of tensors at the top of the graph, as far as they can be told.
    """

    opsets: dict[str, int]
    producer: str
    initializers: int
    initializer_bytes: int
    external: list[str]
    inputs: list[Tensor]
    optional: list[Tensor]
    outputs: list[Tensor]
    recurrences: list[Recurrence]
    baked: list[str]
    hidden: list[str]
    backward: bool
    constants: dict[str, list[int]]
    flow: Dataflow
    inferred: Mapping[str, tuple[Axis, ...]]


def dissect(file: OnnxFile) -> Anatomy:
    """Read a file through."""
    model = file.model
    flow = follow(model)
    _name_axes(model)
    said = {value.name: _axes(value) for value in model.graph.output}
    # The inference puts functions in the place of their calls, as often as they are called: it has no limit of its own.
    told = _infer(model) if flow.whole and file.path.stat().st_size <= _MAX_INFERRED_BYTES else None
    inferred = _known_axes(model.graph if told is None else told.graph, said, told is not None)
    model = told or model
    inputs, optional = ([_tensor(value, inferred) for value in values] for values in file.inputs())
    constants = dict(_small_constants(model.graph))
    nodes = [node for node in file.nodes() if node.proto.op_type in (*RECURRENT, *CPU_ONLY, *CONTROL_FLOW)]
    dtypes = {value.name: _tensor(value, {}).dtype for value in (*model.graph.value_info, *model.graph.input)}
    recurrences = [_recurrence(node, dtypes) for node in nodes]
    free = [tensor.name for tensor in inputs if tensor.axes is None or any(axis.size is None for axis in tensor.axes)]
    varied = set().union(*(flow.depends(("", name)) for name in free))
    given = set().union(*(flow.depends(("", tensor.name)) for tensor in (*inputs, *optional)))
    return Anatomy(
        opsets={each.domain or "ai.onnx": each.version for each in model.opset_import},
        producer=" ".join(filter(None, [model.producer_name, model.producer_version])),
        initializers=len(model.graph.initializer),
        initializer_bytes=sum(map(_bytes, model.graph.initializer)),
        external=sorted({external.location for external in file.external()}),
        inputs=inputs,
        optional=optional,
        outputs=[_tensor(value, inferred) for value in model.graph.output],
        recurrences=recurrences,
        baked=[
            *_baked_outputs(said, inferred),
            *_baked_states(flow, inferred, given),
            *_baked_shapes(model.graph, constants, inferred, varied),
        ],
        hidden=list(_hidden(flow, [*inputs, *optional])),
        backward=any(each.attributes.get("direction") in ("reverse", "bidirectional") for each in recurrences),
        constants=constants,
        flow=flow,
        inferred=inferred,
    )


def _name_axes(model: Any) -> None:
    """Give every free axis of an input a name, so that it is known where it comes out."""
    for value in model.graph.input:
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.HasField("dim_value") and not axis.dim_param:
                axis.dim_param = f"{value.name}.{number}"


def _infer(model: Any) -> Any:
    """The model with the axes of its tensors, outputs too, as far as the graph tells them; None where onnx cannot.

    What the file itself says of them is left out: exporters write the sizes of their example there.
    """
    graph = model.graph
    outputs, values = (
        [type(value).FromString(value.SerializeToString()) for value in part] for part in _annotated(graph)
    )
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # onnx raises whatever it meets; without the inference less is known, and nothing is wrong
        return None
    finally:
        for part, said in zip(_annotated(graph), (outputs, values), strict=True):
            del part[:]
            part.extend(said)


def _annotated(graph: Any) -> tuple[Any, Any]:
    return graph.output, graph.value_info


def _known_axes(
    graph: Any, said: Mapping[str, tuple[Axis, ...] | None], outputs_are_inferred: bool
) -> dict[str, tuple[Axis, ...]]:
    values = [*graph.value_info, *graph.input, *(graph.output if outputs_are_inferred else ())]
    axes = {value.name: _axes(value) for value in values}
    # The inference makes names up for sizes that it cannot tell.
    given = {axis.name for value in graph.input for axis in axes[value.name] or ()}
    for name, known in axes.items():
        axes[name] = known and tuple(axis if axis.size or axis.name in given else Axis() for axis in known)
    axes |= {tensor.name: tuple(Axis(size) for size in tensor.dims) for tensor in graph.initializer}
    axes |= {name: _merged(axes.get(name), theirs) for name, theirs in said.items()}
    return {name: known for name, known in axes.items() if known is not None}


def _merged(known: tuple[Axis, ...] | None, said: tuple[Axis, ...] | None) -> tuple[Axis, ...] | None:
    """What is known of an output, and where nothing is, what the file says."""
    if said is None or (known is not None and len(known) != len(said)):
        return known
    known = known or tuple(Axis() for _ in said)
    return tuple(
        ours if ours != Axis() else Axis(theirs.size, theirs.name, claimed=theirs.size is not None)
        for ours, theirs in zip(known, said, strict=True)
    )


def _axes(value: Any) -> tuple[Axis, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(
        Axis(axis.dim_value) if axis.HasField("dim_value") else Axis(name=axis.dim_param or None)
        for axis in tensor.shape.dim
    )


def _tensor(value: Any, inferred: Mapping[str, tuple[Axis, ...]]) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return Tensor(value.name, str(kind), None)
    element = value.type.tensor_type.elem_type
    try:
        dtype = "bfloat16" if element == onnx.TensorProto.BFLOAT16 else helper.tensor_dtype_to_np_dtype(element).name
    except KeyError:
        dtype = f"type {element}"
    return Tensor(value.name, dtype, inferred.get(value.name, _axes(value)))


def _recurrence(node: Node, dtypes: Mapping[str, str]) -> Recurrence:
    attributes = {
        attribute.name: _plain(helper.get_attribute_value(attribute))
        for attribute in node.proto.attribute
        if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR)
    }
    operator, inputs = node.proto.op_type, list(node.proto.input)
    dtype = dtypes.get(inputs[0]) if inputs else None
    cpu, cuda = (place(operator, attributes, inputs, dtype, device) for device in ("cpu", "cuda"))
    if operator in (*RECURRENT, *CPU_ONLY):
        attributes |= {
            name: "given" for at, name in ((7, "peepholes"), (4, "sequence_lens")) if any(inputs[at : at + 1])
        }
    return Recurrence(operator, node.path, attributes, cpu, cuda)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, int | float):
        return value
    return [_plain(each) for each in list(value)[:_SHOWN_ATTRIBUTES]] if isinstance(value, list | tuple) else None


def _bytes(tensor: Any) -> int:
    try:
        itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return 0
    size = itemsize
    for each in tensor.dims:
        size *= max(0, each)
    return size


def _baked_outputs(
    said: Mapping[str, tuple[Axis, ...] | None], inferred: Mapping[str, tuple[Axis, ...]]
) -> Iterator[str]:
    for name, axes in said.items():
        known = inferred.get(name, ())
        if (
            axes
            and len(axes) == len(known)
            and any(a.size and a.size != b.size for a, b in zip(axes, known, strict=True))
        ):
            yield f"output {name!r} is said to be {shape_text(axes)}; the graph gives {shape_text(known)}"


def _baked_states(flow: Dataflow, inferred: Mapping[str, tuple[Axis, ...]], given: set[Value]) -> Iterator[str]:
    for memory in flow.memories:
        if not memory.recurrent or memory.entry is None or memory.entry in given or memory.entry[0]:
            continue
        axes = inferred.get(memory.entry[1], ())
        if len(axes) == 3 and axes[1].size is not None:
            yield (
                f"{memory.begins} of {memory.node} is a constant of shape {shape_text(axes)}: "
                f"a batch of {axes[1].size} is baked in"
            )


def _baked_shapes(
    graph: Any, constants: Mapping[str, list[int]], inferred: Mapping[str, tuple[Axis, ...]], varied: set[Value]
) -> Iterator[str]:
    for index, node in enumerate(graph.node):
        if node.op_type not in ("Reshape", "Expand") or len(node.input) != 2:
            continue
        wanted, now = constants.get(node.input[1], []), inferred.get(node.input[0])
        fixed = now is not None and all(axis.size is not None for axis in now)
        if len(wanted) < 2 or min(wanted) < 1 or fixed or ("", node.input[0]) not in varied:
            continue
        if node.op_type == "Reshape" or max(wanted) > 1:
            name = node.name or f"{node.op_type}[{index}]"
            yield f"{node.op_type} {name!r} makes {wanted} of what comes in: no size is free there"


def _small_constants(graph: Any) -> Iterator[tuple[str, list[int]]]:
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            tensors += [(node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value"]
    for name, tensor in tensors:
        if tensor.data_type == onnx.TensorProto.INT64 and not tensor.external_data and math.prod(tensor.dims) <= 16:
            with suppress(ValueError):
                yield name, [int(each) for each in numpy_helper.to_array(tensor).ravel()]


def _hidden(flow: Dataflow, inputs: list[Tensor]) -> Iterator[str]:
    given = set().union(*(flow.carries(("", tensor.name)) for tensor in inputs))
    names = dict.fromkeys(
        memory.node
        for memory in flow.memories
        if (memory.recurrent or memory.node.startswith("Scan")) and memory.entry not in given
    )
    return iter(names)


def shape_text(axes: tuple[Axis, ...] | None) -> str:
    """A shape in one line."""
    return "not said" if axes is None else f"[{', '.join(map(str, axes))}]"
