"""Ways in which a graph can be wrong and still run: what a bug in a lowering, or a hand in a file, could do to it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.describe import put_manifest, read_manifest
from models.weights import Array
from service.manifest import Manifest

Sabotage = Callable[[onnx.ModelProto], None]


def node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    """The first node of a kind."""
    return next(node for node in model.graph.node if node.op_type == kind)


def change(model: onnx.ModelProto, name: str, how: Callable[[Array], Array]) -> None:
    """Change an initializer."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(how(numpy_helper.to_array(tensor))), name))


def swap(strings: object, i: int, j: int) -> None:
    """Swap two names in a node's inputs or outputs."""
    strings[i], strings[j] = strings[j], strings[i]  # type: ignore[index]


def swap_h_and_c_in(model: onnx.ModelProto) -> None:
    """The LSTM takes c for h and h for c."""
    swap(node(model, "LSTM").input, 5, 6)


def swap_h_and_c_out(model: onnx.ModelProto) -> None:
    """The LSTM gives c for h and h for c."""
    swap(node(model, "LSTM").output, 1, 2)


def break_gate_order(model: onnx.ModelProto) -> None:
    """The input kernel's gates stand in torch's order, i f c o, where ONNX has i o f c."""

    def reorder(W: Array) -> Array:
        i, o, f, c = np.split(W, 4, axis=1)
        return np.concatenate([i, f, c, o], axis=1)

    change(model, "layers.0.W", reorder)


def swap_recurrent_kernels(model: onnx.ModelProto) -> None:
    """Each of two layers has the recurrent kernel of the other."""
    first, second = [node for node in model.graph.node if node.op_type == "LSTM"]
    first.input[2], second.input[2] = second.input[2], first.input[2]


def drop_lengths(model: onnx.ModelProto) -> None:
    """The LSTM runs over padding as if it were input."""
    node(model, "LSTM").input[4] = ""


def drop_linear_before_reset(model: onnx.ModelProto) -> None:
    """The GRU applies its reset before the recurrent product."""
    gru = node(model, "GRU")
    kept = [attribute for attribute in gru.attribute if attribute.name != "linear_before_reset"]
    assert len(kept) < len(gru.attribute)
    del gru.attribute[:]
    gru.attribute.extend(kept)


def nudge_a_weight(model: onnx.ModelProto) -> None:
    """One weight of hundreds is off by a ten-thousandth."""

    def nudge(R: Array) -> Array:
        nudged = R.copy()
        nudged[0, 0, 0] += 1e-4
        return nudged

    change(model, "layers.0.R", nudge)


def scan_backward(model: onnx.ModelProto) -> None:
    """The Scan runs from the last step to the first."""
    for attribute in node(model, "Scan").attribute:
        if attribute.name.startswith("scan_") and attribute.name.endswith("_directions"):
            attribute.ints[:] = [1] * len(attribute.ints)


def scan_past_lengths(model: onnx.ModelProto) -> None:
    """The Scan's steps change a row's state past its length."""
    body = next(attribute.g for attribute in node(model, "Scan").attribute if attribute.name == "body")
    for step in body.node:
        if step.op_type == "Where":
            step.op_type = "Identity"
            del step.input[2], step.input[0]


def with_manifest(**changes: Any) -> Sabotage:
    """The manifest says something else."""

    def sabotage(model: onnx.ModelProto) -> None:
        said = json.loads(read_manifest(model).model_dump_json())
        put_manifest(model, Manifest.model_validate({**said, **changes}))

    return sabotage


def with_tensor(field: str, **changes: Any) -> Sabotage:
    """The manifest says something else of the first input, output or state."""

    def sabotage(model: onnx.ModelProto) -> None:
        first, *others = json.loads(read_manifest(model).model_dump_json())[field]
        with_manifest(**{field: [{**first, **changes}, *others]})(model)

    return sabotage


MANIFEST_SABOTAGE: dict[str, tuple[Sabotage, str]] = {
    "streamable flipped": (with_manifest(streamable=False), "streamable is False, expected True"),
    "lengths null": (with_manifest(lengths=None), "lengths is None, expected 'lengths'"),
    "lengths renamed": (with_manifest(lengths="sizes"), "lengths is 'sizes', expected 'lengths'"),
    "input renamed": (with_tensor("inputs", name="z"), "inputs is .*name='z'"),
    "input's axes swapped": (with_tensor("inputs", batch_axis=0, time_axis=1), "inputs is .*batch_axis=0, time_axis=1"),
    "input's width wrong": (with_tensor("inputs", shape=[None, None, 5]), r"inputs is .*shape=\(None, None, 5\)"),
    "input's dtype wrong": (with_tensor("inputs", dtype="float64"), "inputs is .*dtype='float64'"),
    "output's axes swapped": (with_tensor("outputs", batch_axis=0, time_axis=1), "outputs is .*batch_axis=0"),
    "output's width wrong": (with_tensor("outputs", shape=[None, None, 4]), r"outputs is .*shape=\(None, None, 4\)"),
    "state's output renamed": (with_tensor("states", output="h"), "states is .*output='h'"),
    "state's width wrong": (with_tensor("states", shape=[2, None, 5]), r"states is .*shape=\(2, None, 5\)"),
    "state begins elsewhere": (
        with_tensor("states", initial=base64.b64encode(np.ones((2, 4), np.float32).tobytes()).decode()),
        "manifest does not fit the graph: states|weights are not those",
    ),
    "precision that allows more": (with_manifest(precision="int8"), "precision is 'int8', expected 'float32'"),
    "no digest": (with_manifest(weights_digest=None), "weights are not those .* the manifest has None"),
}
"""The manifest alone is changed, and what verification says to that."""

LSTM_SABOTAGE: list[Sabotage] = [
    swap_h_and_c_in,
    swap_h_and_c_out,
    break_gate_order,
    swap_recurrent_kernels,
    drop_lengths,
    nudge_a_weight,
]
SCAN_SABOTAGE: list[Sabotage] = [scan_backward, scan_past_lengths]
