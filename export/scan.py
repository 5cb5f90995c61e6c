"""A recurrence as ONNX's ``Scan``: one step of each cell in ONNX operators, and the loop round it.

Owns the equations as a graph has them. Must not know torch or whole models. The equations and their sources stand in
``models/reference/cells.py``; verification holds every graph against those.

Steps take ``a[N, G*H]``, the input product of all gates, and the state before the step, and give the state after it.
``1 - sigmoid(a)`` is written as ``sigmoid(-a)``, which needs no constant of the graph's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from models.spec import Layer

State = tuple[ir.Value, ...]
Weights = Mapping[str, ir.Value]
Step = Callable[["Ops", Layer, Weights, ir.Value, State], State]

ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu"}


class Ops:
    """Adds operators to a graph, one call each."""

    def __init__(self) -> None:
        self.tape = Tape()

    def __call__(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add an operator that has one output."""
        return self.tape.op(kind, inputs, attributes)

    def many(self, kind: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """Add an operator that has several outputs."""
        return self.tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs)

    def split(self, x: ir.Value, parts: int, axis: int = -1) -> Sequence[ir.Value]:
        """Cut an axis into equal parts."""
        return self.many("Split", parts, x, axis=axis, num_outputs=parts)

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """Join along an axis; one part is left as it is."""
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=axis)

    def integers(self, *values: int) -> ir.Value:
        """A constant ``int64[len(values)]``."""
        return self("Constant", value_ints=values)


def rnn(op: Ops, layer: Layer, weights: Weights, a: ir.Value, state: State) -> State:
    """The simple recurrence: h = tanh(a + W_h h), or relu."""
    (h,) = state
    return (op(ACTIVATIONS[layer.activation], op("Add", a, op("MatMul", h, weights["W_h"]))),)


def lstm(op: Ops, layer: Layer, weights: Weights, a: ir.Value, state: State) -> State:
    """The LSTM, its input gate coupled or its own, with or without peepholes."""
    h, c = state
    coupled = layer.cell == "lstm_coupled"
    *i, f, candidate, o = op.split(op("Add", a, op("MatMul", h, weights["W_h"])), 3 if coupled else 4)
    if layer.has_peepholes:
        *V_i, V_f, V_o = op.split(weights["V"], 2 if coupled else 3)
        i = [op("Add", gate, op("Mul", V, c)) for gate, V in zip(i, V_i, strict=True)]
        f = op("Add", f, op("Mul", V_f, c))
    (i_gate,) = i if i else (op("Neg", f),)
    written = op("Mul", op("Sigmoid", i_gate), op(ACTIVATIONS[layer.activation], candidate))
    c = op("Add", op("Mul", op("Sigmoid", f), c), written)
    if layer.has_peepholes:
        o = op("Add", o, op("Mul", V_o, c))
    return op("Mul", op("Sigmoid", o), op("Tanh", c)), c


def gru(op: Ops, layer: Layer, weights: Weights, a: ir.Value, state: State) -> State:
    """The GRU, its reset before or after the recurrent product."""
    (h,) = state
    H = layer.hidden_size
    sizes = op.integers(2 * H, H)
    a_gates, a_candidate = op.many("Split", 2, a, sizes, axis=-1)
    W_gates, W_candidate = op.many("Split", 2, weights["W_h"], sizes, axis=-1)
    gates = op("Sigmoid", z_and_r := op("Add", a_gates, op("MatMul", h, W_gates)))
    r, z = op.split(gates, 2)
    if layer.reset == "before":
        recurrent = op("MatMul", op("Mul", r, h), W_candidate)
    else:
        recurrent = op("MatMul", h, W_candidate)
        if "b_h" in weights:
            recurrent = op("Add", recurrent, weights["b_h"])
        recurrent = op("Mul", r, recurrent)
    candidate = op(ACTIVATIONS[layer.activation], op("Add", a_candidate, recurrent))
    _, minus_z = op.split(op("Neg", z_and_r), 2)
    return (op("Add", op("Mul", z, h), op("Mul", op("Sigmoid", minus_z), candidate)),)


STEPS: dict[str, Step] = {"rnn": rnn, "lstm": lstm, "lstm_peephole": lstm, "lstm_coupled": lstm, "gru": gru}


def scan_direction(
    op: Ops, name: str, layer: Layer, weights: Weights, x: ir.Value, lengths: ir.Value, state: State, backward: bool
) -> tuple[ir.Value, State]:
    """Write one direction of a layer as a Scan.

    Args:
        op: where the operators go.
        name: what the names of the values inside the loop start with; ONNX wants every name in a file once.
        layer: the layer.
        weights: this direction's canonical weights, ``W_x[I, G*H]`` and ``W_h[H, G*H]`` transposed.
        x: ``[T, N, I]``.
        lengths: int32 ``[N]``; past it a row keeps its state and gives 0.
        state: ``[N, H]`` each.
        backward: run from the last step to the first.

    Returns:
        The outputs ``[T, N, H]`` and the state after the last step read.
    """
    a = op("MatMul", x, weights["W_x"])
    if "b" in weights:
        a = op("Add", a, weights["b"])
    T = op("Squeeze", op("Shape", x, start=0, end=1))
    steps = op("Range", op("Constant", value_int=0), T, op("Constant", value_int=1))
    steps = op("Cast", steps, to=ir.DataType.INT32)

    dtype = weights["W_h"].dtype
    assert dtype is not None
    before = tuple(ir.val(name, dtype, ("N", layer.hidden_size)) for name in ("h", "c")[: len(state)])
    a_t, t = ir.val("a_t", dtype, ("N", None)), ir.val("t", ir.DataType.INT32, ())
    body = Ops()
    valid = body("Unsqueeze", body("Less", t, lengths), body.integers(1))
    after = STEPS[layer.cell](body, layer, weights, a_t, before)
    kept = [body("Where", valid, new, old) for new, old in zip(after, before, strict=True)]
    zero = body("Constant", value=ir.tensor(np.zeros((), dtype.numpy())))
    output = body("Where", valid, after[0], zero)

    step = ir.Graph([*before, a_t, t], [*kept, output], nodes=body.tape.nodes, name=f"{name}step")
    for value in [*step.inputs, *(value for node in step for value in node.outputs)]:
        value.name = f"{name}{value.name}"

    *final, outputs = op.many(
        "Scan",
        len(state) + 1,
        *state,
        a,
        steps,
        body=step,
        num_scan_inputs=2,
        scan_input_directions=[int(backward)] * 2,
        scan_output_directions=[int(backward)],
    )
    return outputs, tuple(final)
