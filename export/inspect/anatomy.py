"""What an .onnx file holds, as far as it matters for serving it.

Owns the reading: inputs and outputs with the names of their sizes, recurrent nodes and bodies wherever they stand. Must
not know how it is shown, nor what is proposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper, numpy_helper

from export.inspect.baked import baked_lengths, baked_outputs, baked_shapes, baked_states, baked_steps
from export.inspect.dataflow import Dataflow, follow
from export.inspect.shapes import MAX_INFERRED_BYTES, Axis, axes_of, infer, known_axes, name_axes
from service.graphs.onnx_file import Node, OnnxFile, port
from service.graphs.placement import CONTROL_FLOW, CPU_ONLY, RECURRENT, Attribute, Placement, place

_SHOWN_ATTRIBUTES = 12


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
        lengths: those that the graph also runs without, and gives wrong numbers then.
        steps: those that are the time of an input, by its name.
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
    lengths: list[str]
    steps: dict[str, str]
    hidden: list[str]
    backward: bool
    constants: dict[str, list[int]]
    flow: Dataflow
    inferred: Mapping[str, tuple[Axis, ...]]


def dissect(file: OnnxFile) -> Anatomy:
    """Read a file through."""
    model = file.model
    flow = follow(model)
    name_axes(model)
    said = {value.name: axes_of(value) for value in model.graph.output}
    # The inference puts functions in the place of their calls, as often as they are called: it has no limit of its own.
    told = infer(model) if flow.whole and file.path.stat().st_size <= MAX_INFERRED_BYTES else None
    inferred = known_axes(model.graph if told is None else told.graph, said, told is not None)
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
            *baked_outputs(said, inferred),
            *baked_states(flow, inferred, given),
            *baked_shapes(model.graph, constants, inferred, varied),
        ],
        lengths=list(baked_lengths(model.graph, constants, inferred)),
        steps=baked_steps(model.graph, inferred),
        hidden=list(_hidden(flow, [*inputs, *optional])),
        backward=any(each.attributes.get("direction") in ("reverse", "bidirectional") for each in recurrences),
        constants=constants,
        flow=flow,
        inferred=inferred,
    )


def _tensor(value: Any, inferred: Mapping[str, tuple[Axis, ...]]) -> Tensor:
    axes = inferred.get(value.name, axes_of(value)) if value.type.HasField("tensor_type") else None
    return Tensor(value.name, port(value).dtype, axes)


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
