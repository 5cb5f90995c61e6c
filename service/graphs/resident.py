"""A model's graph, with its states in memory that stays where it is: pools, read and written in place.

Owns the rewriting of a graph. In front of each state's input it puts a ``Gather`` from a pool [S, R], which has S
places for the R values of a row's state, and behind the state's output a ``ScatterElements`` into the same pool. A run
is then told for each row from which place its states are to be read, and to which other they are to be written. Must
not know devices, onnxruntime or sessions.

``ScatterElements`` rather than ``ScatterND``: on CUDA onnxruntime's ScatterND copies an array from the host in each
run, which a captured graph would read again when it is gone, and gives each row to a single thread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import LoadError
from service.graphs.onnx_file import tensors_of
from service.manifest import Manifest, StateSpec

BEFORE = "conveyor.before"
"""Input [N], int32: the place that each row's states are read from."""
AFTER = "conveyor.after"
"""Input [N, 1], int32: the place that they are written to."""
_LEAST_OPSET = 11
_SMALL_BYTES = 1 << 10


def pool_input(index: int) -> str:
    """The input for the pool of a state, [S, R]."""
    return f"conveyor.pool.{index}"


def pool_output(index: int) -> str:
    """The output for it, to be bound to the same memory."""
    return f"conveyor.pool.{index}.after"


def row_size(state: StateSpec) -> int:
    """R: how many values a row's state has."""
    return math.prod(state.tail)


def sources(manifest: Manifest) -> list[str]:
    """The new graph's inputs that hold sequences and states, and those that say where states lie."""
    return [*(x.name for x in manifest.inputs), BEFORE, AFTER, *map(pool_input, range(len(manifest.states)))]


def make_resident(model: Any, manifest: Manifest) -> None:
    """Rewrite a graph in its place. What lies outside its file still does.

    Args:
        model: the onnx ModelProto.
        manifest: what the graph is served as.

    Raises:
        LoadError: if it cannot be rewritten; the text says why.
    """
    from onnx import TensorProto, helper

    _check(model, manifest)
    graph = model.graph
    states = manifest.states
    inputs = {state.input for state in states}
    served = {y.name for y in manifest.outputs}
    written = {state.output for state in states} - served
    _remove(graph.input, inputs)
    # A state's input may have a value of its own, for those that give none.
    _remove(graph.initializer, inputs)
    _remove(graph.output, written)
    _leave_open(graph.output, manifest)
    if not states:
        return
    types = {state.name: helper.np_dtype_to_tensor_dtype(np.dtype(state.dtype)) for state in states}
    graph.input.append(helper.make_tensor_value_info(BEFORE, TensorProto.INT32, ["conveyor.N"]))
    graph.input.append(helper.make_tensor_value_info(AFTER, TensorProto.INT32, ["conveyor.N", 1]))
    behind: list[Any] = []
    front: list[Any] = []
    for index, state in enumerate(states):
        shape: list[str | int | None] = ["conveyor.S", row_size(state)]
        graph.input.append(helper.make_tensor_value_info(pool_input(index), types[state.name], shape))
        graph.output.append(helper.make_tensor_value_info(pool_output(index), types[state.name], shape))
        front += _read(graph, index, state)
        behind += _write(graph, index, state)
    # In the order in which they run, as the format wants it.
    nodes = [*front, *graph.node, *behind]
    del graph.node[:]
    graph.node.extend(nodes)


def content(model: Any, folder: Path) -> bytes:
    """Return the file of an onnx ModelProto, with what is small of the data that lies outside.

    Sizes and axes have to be known when the graph is read, and are not looked for outside of it then.

    Args:
        model: it; it is changed.
        folder: of the files that hold its data.

    Raises:
        LoadError: if it is too large for one, or its data cannot be read.
    """
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_tensor

    try:
        for tensor in tensors_of(model):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries and int(entries.get("length", _SMALL_BYTES)) < _SMALL_BYTES:
                load_external_data_for_tensor(tensor, str(folder))
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
    except Exception as error:  # onnx raises whatever it meets
        raise LoadError(f"the data of the graph cannot be read: {error}") from error
    try:
        held: bytes = model.SerializeToString()
    except Exception as error:  # protobuf's own, which has no public name in every version
        raise LoadError(
            f"the graph is too large to be rewritten for a device ({error}): keep its weights in files beside it"
        ) from error
    return held


def _check(model: Any, manifest: Manifest) -> None:
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < _LEAST_OPSET:
        raise LoadError(
            f"the graph is of opset {opset}, and its states can be kept on the device from opset {_LEAST_OPSET} on: "
            "convert it (onnx.version_converter), or run it on the CPU"
        )
    if manifest.rows_per_run == 1:
        raise LoadError("the graph takes one row a run, which a device is no use for: run it on the CPU")
    free = [spec.name for spec in (*manifest.inputs, *manifest.outputs) if None in spec.tail]
    if free:
        raise LoadError(
            f"{free} take any size in an axis that is neither batch nor time, and memory on a device is taken before "
            "a run: give them a shape in model.yaml, or run the model on the CPU"
        )


def _read(graph: Any, index: int, state: StateSpec) -> list[Any]:
    """From the pool to the state's input, in the graph's axes."""
    from onnx import helper

    here = f"conveyor.state.{index}"
    rows, lying = f"{here}.rows", f"{here}.lying"
    nodes = [helper.make_node("Gather", [pool_input(index), BEFORE], [rows], name=f"{here}.gather", axis=0)]
    if _stands(state):
        shape = [-1 if size is None else size for size in state.shape]
        return [*nodes, _reshape(graph, rows, state.input, shape)]
    nodes.append(_reshape(graph, rows, lying, [-1, *state.tail]))
    axes = list(range(1, len(state.shape)))
    axes.insert(state.batch_axis, 0)
    return [*nodes, helper.make_node("Transpose", [lying], [state.input], name=f"{here}.turn", perm=axes)]


def _write(graph: Any, index: int, state: StateSpec) -> list[Any]:
    """From the state's output, in the graph's axes, to the pool."""
    from onnx import helper

    here = f"conveyor.state.{index}.after"
    turned, rows, places = f"{here}.turned", f"{here}.rows", f"{here}.places"
    size = row_size(state)
    nodes = []
    if _stands(state):
        turned = state.output
    else:
        axes = [state.batch_axis, *(axis for axis in range(len(state.shape)) if axis != state.batch_axis)]
        nodes.append(helper.make_node("Transpose", [state.output], [turned], name=f"{here}.turn", perm=axes))
    nodes.append(_reshape(graph, turned, rows, [-1, size]))
    wide = _constant(graph, f"{here}.size", [1, size])
    nodes.append(helper.make_node("Expand", [AFTER, wide], [places], name=f"{here}.expand"))
    nodes.append(
        helper.make_node(
            "ScatterElements",
            [pool_input(index), places, rows],
            [pool_output(index)],
            name=f"{here}.scatter",
            axis=0,
        )
    )
    return nodes


def _stands(state: StateSpec) -> bool:
    """Whether rows lie one behind the other in the graph's axes already, so that no transposing is needed."""
    return all(size == 1 for size in state.shape[: state.batch_axis])


def _reshape(graph: Any, value: str, result: str, shape: Sequence[int]) -> Any:
    from onnx import helper

    return helper.make_node(
        "Reshape", [value, _constant(graph, f"{result}.conveyor.shape", shape)], [result], name=f"{result}.reshape"
    )


def _constant(graph: Any, name: str, values: Sequence[int]) -> str:
    from onnx import TensorProto, helper

    graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return name


def _leave_open(outputs: Any, manifest: Manifest) -> None:
    """Take out of the file the sizes of rows and steps, which may be those of an example."""
    specs = {y.name: y for y in manifest.outputs}
    for value in outputs:
        spec = specs.get(value.name)
        if spec is None or not value.type.tensor_type.HasField("shape"):
            continue
        axes = [axis for axis in range(len(spec.shape)) if axis not in spec.absent]
        sizes = value.type.tensor_type.shape.dim
        for axis, size in zip(axes, sizes, strict=False):
            if spec.shape[axis] is None and not (axis == spec.time_axis and manifest.steps_per_run == 1):
                size.Clear()


def _remove(values: Any, names: Collection[str]) -> None:
    for index in reversed(range(len(values))):
        if values[index].name in names:
            del values[index]
