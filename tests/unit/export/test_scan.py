"""A recurrence as a Scan is fit for a GPU: told from the graph alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from export.recurrence import write_scan
from export.scan import Ops
from export.stored import to_stored
from models.spec import Layer
from tests.unit.models.drawn import LAYERS, draw_weights

CUDA_KERNELS = {"Add", "Gemm", "Mul", "Relu", "Sigmoid", "Split", "Sub", "Tanh", "Where"}
"""Operators that onnxruntime's CUDA provider has kernels for, in float32 and float16, at the version of opset 20.

Source: onnxruntime, docs/OperatorKernels.md, "Operators implemented by CUDAExecutionProvider". There are more of them;
these are what a step is made of.
"""

NODES = {
    "rnn": 3,
    "lstm": 13,
    "lstm_peephole": 19,
    "lstm_coupled": 13,
    "lstm_coupled, peepholes": 17,
    "gru, reset before": 11,
    "gru, reset after": 12,
}
"""Nodes of one step, of whatever activation."""


def scan(layer: Layer, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[list[ir.Node], ir.Node]:
    """The nodes of a layer's Scan and those round it, and the Scan."""
    arrays = to_stored(layer, draw_weights(layer.weight_shapes), "scan")
    weights = [ir.val(name, dtype, array.shape) for name, array in arrays.items()]
    x, valid = ir.val("x", dtype, ("T", "N", 3)), ir.val("valid", ir.DataType.BOOL, ("T", "N", 1))
    state = tuple(ir.val(name, dtype, (1, "N", 4)) for name in ("h0", "c0")[: 1 + layer.has_cell_state])
    op = Ops()
    write_scan(op, "layers.0.", layer, weights, x, valid, state)
    nodes = list(op.tape.nodes)
    return nodes, next(node for node in nodes if node.op_type == "Scan")


@pytest.mark.parametrize(("name", "layer"), LAYERS.items(), ids=LAYERS.keys())
def test_a_step_is_few_nodes_that_run_on_the_device(name: str, layer: Layer) -> None:
    """Each has a kernel there, takes nothing from the host, and asks nothing about shapes."""
    nodes, loop = scan(layer)
    body = loop.attributes["body"].as_graph()
    kinds = Counter(node.op_type for node in body)
    assert set(kinds) <= CUDA_KERNELS
    assert sum(kinds.values()) == NODES[name.removesuffix(", no bias").removesuffix(", relu")]
    # One product with all gates at once; a GRU's candidate has one of its own, after the reset.
    assert kinds["Gemm"] == (2 if layer.cell == "gru" else 1)
    for node in body:
        if node.op_type == "Split":
            # Into equal parts: a table of others would be copied to the device in every step.
            assert len(node.inputs) == 1
            assert len(node.outputs) == {"gru": 2, "lstm_coupled": 3}.get(layer.cell, 4)
    assert {value.dtype for value in body.inputs} == {ir.DataType.FLOAT, ir.DataType.BOOL}
    assert not body.initializers

    # What comes from outside are weights as they stand in the file, and the number 1.
    made = {value for node in body for value in node.outputs} | set(body.inputs)
    outside = {value for node in body for value in node.inputs if value is not None} - made
    by = {value: node for node in nodes for value in node.outputs}
    assert {by[value].op_type for value in outside if value in by} <= {"Constant"}


@pytest.mark.parametrize("layer", [LAYERS["gru, reset before"], LAYERS["lstm_peephole"]], ids=["gru", "lstm_peephole"])
def test_what_does_not_depend_on_the_state_is_outside(layer: Layer) -> None:
    """Input products and biases, and zeros past the lengths, are dealt with for all steps at once."""
    nodes, _ = scan(layer)
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["MatMul"] == kinds["Add"] == (2 if layer.cell == "gru" else 1)
    assert kinds["Where"] == 1


def test_constants_have_the_dtype_of_the_weights() -> None:
    """A step in float16 mixes no dtypes."""
    nodes, _ = scan(LAYERS["gru, reset before"], ir.DataType.FLOAT16)
    constants = [node.attributes["value"].as_tensor() for node in nodes if "value" in node.attributes]
    assert [constant.dtype for constant in constants] == [ir.DataType.FLOAT16] * 2
    assert [float(np.asarray(constant)) for constant in constants] == [1, 0]
