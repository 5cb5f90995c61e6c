"""The recurrence of one layer as one node: a torch operator for the trace, and what it becomes in ONNX.

Owns the custom operator ``conveyor::recurrence`` and the two forms in which it is written to a graph: ONNX's ``LSTM``,
``GRU`` or ``RNN`` ("operator"), or a ``Scan`` whose body is one step of the cell ("scan"). Must not know whole models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator
from torch import Tensor

from export.scan import ACTIVATIONS, Ops, State, scan_direction
from export.stored import scan_parts
from models.spec import PREFIXES, Layer

OPERATORS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "lstm_peephole": "LSTM", "lstm_coupled": "LSTM"}


def layer_to_json(layer: Layer) -> str:
    """The layer in the one form that an argument of a torch operator can have."""
    return json.dumps(asdict(layer))


@torch.library.custom_op("conveyor::recurrence", mutates_args=())
def recurrence(
    x: Tensor,
    lengths: Tensor,
    valid: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    name: str,
    layer: str,
    lowering: str,
) -> list[Tensor]:
    """All directions of one layer over time.

    Args:
        x: ``[T, N, I]``.
        lengths: int32 ``[N]``, which an operator takes.
        valid: bool ``[T, N, 1]``, which rows have which steps, which a Scan takes.
        state: h, or h and c, each ``[D, N, H]``.
        weights: what ``export.stored`` lays out for this layer, in its order.
        name: what the names of the weights start with, ``layers.0.``.
        layer: the ``Layer``, as ``layer_to_json`` writes it.
        lowering: what it becomes.

    Returns:
        The outputs ``[T, N, D*H]`` and the state after the last step, each ``[D, N, H]``.
    """
    raise NotImplementedError("this operator exists only to be traced; SequenceModel runs the recurrence itself")


@recurrence.register_fake
def _(
    x: Tensor,
    lengths: Tensor,
    valid: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    name: str,
    layer: str,
    lowering: str,
) -> list[Tensor]:
    D, N, H = state[0].shape
    return [x.new_empty(x.shape[0], N, D * H), *(torch.empty_like(part) for part in state)]


def translate(
    x: ir.Value,
    lengths: ir.Value,
    valid: ir.Value | None,
    state: Sequence[ir.Value],
    weights: Sequence[ir.Value],
    name: str,
    layer: str,
    lowering: str,
) -> list[ir.Value]:
    """Write the recurrence to the graph that the exporter is building."""
    op = Ops()
    what, before = Layer(**json.loads(layer)), tuple(state)
    if lowering == "operator":
        outputs = write_operator(op, name, what, weights, x, lengths, before)
    else:
        assert valid is not None
        outputs = write_scan(op, name, what, weights, x, valid, before)
    # The nodes go straight to the exporter's recorder, because onnxscript's own call of Scan has one output only.
    recorder: Any = evaluator.default()
    recorder.nodes.extend(op.tape.nodes)
    return outputs


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.conveyor.recurrence.default: translate}
"""For ``torch.onnx.export(custom_translation_table=...)``."""


def write_operator(
    op: Ops, name: str, layer: Layer, weights: Sequence[ir.Value], x: ir.Value, lengths: ir.Value, state: State
) -> list[ir.Value]:
    """ONNX's own operator, both directions in one node."""
    W, R, B, *P = weights
    candidate = ACTIVATIONS[layer.activation]
    inputs: list[ir.Value | None] = [x, W, R, B, lengths, *state]
    attributes: dict[str, Any] = {
        "hidden_size": layer.hidden_size,
        "direction": "bidirectional" if layer.bidirectional else "forward",
    }
    if layer.has_cell_state:
        activations = ["Sigmoid", candidate, "Tanh"]
        inputs += P
    elif layer.cell == "gru":
        activations = ["Sigmoid", candidate]
        attributes["linear_before_reset"] = int(layer.reset == "after")
    else:
        activations = [candidate]
    attributes["activations"] = activations * layer.directions
    y, *final = op.many(OPERATORS[layer.cell], 1 + len(state), *inputs, **attributes)
    if layer.bidirectional:
        y = op("Reshape", op("Transpose", y, perm=[0, 2, 1, 3]), op.integers(0, 0, -1))
    else:
        y = op("Squeeze", y, op.integers(1))
    return [y, *final]


def write_scan(
    op: Ops, name: str, layer: Layer, weights: Sequence[ir.Value], x: ir.Value, valid: ir.Value, state: State
) -> list[ir.Value]:
    """A Scan for each direction."""
    names = list(scan_parts(replace(layer, bidirectional=False)))
    parts = [op.split(part, layer.directions, axis=0) if layer.bidirectional else [part] for part in state]
    outputs, final = [], []
    for direction in range(layer.directions):
        here = dict(zip(names, weights[direction * len(names) : (direction + 1) * len(names)], strict=True))
        before = tuple(op("Squeeze", part[direction], op.integers(0)) for part in parts)
        prefix = name + PREFIXES[direction]
        y, after = scan_direction(op, prefix, layer, here, x, valid, before, backward=direction == 1)
        outputs.append(y)
        final.append([op("Unsqueeze", part, op.integers(0)) for part in after])
    return [op.concat(outputs, axis=2), *(op.concat(parts, axis=0) for parts in zip(*final, strict=True))]
