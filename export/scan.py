"""A recurrence as ONNX's ``Scan``: one step of each cell in ONNX operators, and the loop round it.

Owns the equations as a graph has them. Must not know torch or whole models. The equations and their sources stand in
``models/reference/cells.py``; verification holds every graph against those.

A loop costs its nodes once a step, on a GPU mostly for launching them, whatever their size. So all that does not depend
on the state is done before it, for all steps at once: the input products, and which rows have a step; and what may come
later, after it: zeros past the rows' lengths. Inside stand the recurrent products, which add the input product as they
go (``Gemm``), and few other nodes. None of them needs the host: there is nothing to work out about shapes, weights
stand as they are used, and what is cut is cut into equal parts, because onnxruntime's CUDA ``Split`` copies a table of
unequal ones to the device every time (its core/providers/cuda/tensor/split.cc).

Steps take the input products of all gates, ``[N, G*H]`` or for a GRU ``[N, 2H]`` and ``[N, H]``, and the state before
the step, and give the state after it.
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
Step = Callable[["Ops", Layer, Weights, Sequence[ir.Value], State], State]

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


def rnn(op: Ops, layer: Layer, weights: Weights, a: Sequence[ir.Value], state: State) -> State:
    """The simple recurrence: h = tanh(a + W_h h), or relu."""
    (a_t,), (h,) = a, state
    return (op(ACTIVATIONS[layer.activation], op("Gemm", h, weights["W_h_transposed"], a_t)),)


def lstm(op: Ops, layer: Layer, weights: Weights, a: Sequence[ir.Value], state: State) -> State:
    """The LSTM, its input gate coupled or its own, with or without peepholes."""
    (a_t,), (h, c) = a, state
    coupled = layer.cell == "lstm_coupled"
    *i, f, candidate, o = op.split(op("Gemm", h, weights["W_h_transposed"], a_t), 3 if coupled else 4)

    def gate(name: str, x: ir.Value) -> ir.Value:
        sees = weights.get(f"V_{name}")
        return op("Sigmoid", x if sees is None else op("Add", x, op("Mul", sees, c)))

    f = gate("f", f)
    written = op("Sub", weights["one"], f) if coupled else gate("i", i[0])
    written = op("Mul", written, op(ACTIVATIONS[layer.activation], candidate))
    c = op("Add", op("Mul", f, c), written)
    return op("Mul", gate("o", o), op("Tanh", c)), c


def gru(op: Ops, layer: Layer, weights: Weights, a: Sequence[ir.Value], state: State) -> State:
    """The GRU, its reset before or after the recurrent product."""
    (a_gates, a_candidate), (h,) = a, state
    W_gates, W_candidate = weights["W_h_gates_transposed"], weights["W_h_candidate_transposed"]
    r, z = op.split(op("Sigmoid", op("Gemm", h, W_gates, a_gates)), 2)
    if layer.reset == "before":
        candidate = op("Gemm", op("Mul", r, h), W_candidate, a_candidate)
    else:
        candidate = op("Add", a_candidate, op("Mul", r, op("Gemm", h, W_candidate, weights.get("b_h"))))
    candidate = op(ACTIVATIONS[layer.activation], candidate)
    kept, written = op("Mul", z, h), op("Mul", op("Sub", weights["one"], z), candidate)
    return (op("Add", kept, written),)


STEPS: dict[str, Step] = {"rnn": rnn, "lstm": lstm, "lstm_peephole": lstm, "lstm_coupled": lstm, "gru": gru}


def scan_direction(
    op: Ops, name: str, layer: Layer, weights: Weights, x: ir.Value, valid: ir.Value, state: State, backward: bool
) -> tuple[ir.Value, State]:
    """Write one direction of a layer as a Scan.

    Args:
        op: where the operators go.
        name: what the names of the values inside the loop start with; ONNX wants every name in a file once.
        layer: the layer.
        weights: this direction's, as ``export.stored`` names them.
        x: ``[T, N, I]``.
        valid: bool ``[T, N, 1]``, which rows have which steps; without one a row keeps its state and gives 0.
        state: ``[N, H]`` each.
        backward: run from the last step to the first.

    Returns:
        The outputs ``[T, N, H]`` and the state after the last step read.
    """
    dtype = next(iter(weights.values())).dtype
    assert dtype is not None
    a = [input_product(op, weights, x, name) for name in weights if name.startswith("W_x")]
    one, zero = (op("Constant", value=ir.tensor(np.full((), number, dtype.numpy()))) for number in (1, 0))

    body = Ops()
    before = tuple(ir.val(part, dtype, ("N", layer.hidden_size)) for part in ("h", "c")[: len(state)])
    a_t = [ir.val(f"a_{i}", dtype, ("N", None)) for i in range(len(a))]
    valid_t = ir.val("valid", ir.DataType.BOOL, ("N", 1))
    after = STEPS[layer.cell](body, layer, {**weights, "one": one}, a_t, before)
    kept = [body("Where", valid_t, new, old) for new, old in zip(after, before, strict=True)]

    step = ir.Graph([*before, *a_t, valid_t], [*kept, after[0]], nodes=body.tape.nodes, name=f"{name}step")
    for number, node in enumerate(step):
        node.name = f"{name}step.{number}"
    for value in [*step.inputs, *(value for node in step for value in node.outputs)]:
        value.name = f"{name}{value.name}"

    scanned = [*a, valid]
    *final, outputs = op.many(
        "Scan",
        len(state) + 1,
        *state,
        *scanned,
        body=step,
        num_scan_inputs=len(scanned),
        scan_input_directions=[int(backward)] * len(scanned),
        scan_output_directions=[int(backward)],
    )
    loop = outputs.producer()
    assert loop is not None
    loop.name = f"{name}Scan"
    return op("Where", valid, outputs, zero), tuple(final)


def input_product(op: Ops, weights: Weights, x: ir.Value, kernel: str) -> ir.Value:
    """What the input alone gives to the gates, for all steps at once: ``[T, N, G*H]``."""
    a = op("MatMul", x, weights[kernel])
    bias = weights.get(kernel.replace("W_x", "b").removesuffix("_transposed"))
    return a if bias is None else op("Add", a, bias)
