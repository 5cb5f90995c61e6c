"""Weight layouts: how each library lays out the arrays of one recurrent layer, and the way from any to any other.

Owns the table of layouts and the one function that converts. Must not know how a cell computes, nor any library itself:
only the names, shapes and orders that its documentation gives.

============  =================================================  =======  =========  =======  =========================
layout        arrays of one direction                            LSTM     peepholes  GRU      biases
============  =================================================  =======  =========  =======  =========================
``fused``     ``W_x[G*H, I] W_h[G*H, H] b[G*H] b_h[H] V[P*H]``   i f c o  i f o      r z h    one, and the GRU's ``b_h``
``matrices``  ``U_g[I, H] W_g[H, H] V_g[H]`` for each gate g     by name  by name    by name  none
``torch``     ``weight_ih_l0[G*H, I] weight_hh_l0[G*H, H]        i f c o  none       r z h    two
              bias_ih_l0[G*H] bias_hh_l0[G*H]``
``keras``     ``kernel[I, G*H] recurrent_kernel[H, G*H]          i f c o  none       z r h    one; a GRU with reset
              bias[G*H]``                                                                     after two, [2, G*H]
``onnx``      ``W[D, G*H, I] R[D, G*H, H] B[D, 2*G*H]            i o f c  i o f      z r h    two, joined
              P[D, 3*H]``
============  =================================================  =======  =========  =======  =========================

G gates, P peepholes, D directions; c and h are the candidates, g and n in torch's words. ``fused`` is the canonical
form of ``models.spec``; ``matrices`` of an ``lstm`` are the eight ``U_f, W_f, U_i, ...``. The backward direction is
``reverse.W_x`` (fused, matrices, keras), ``weight_ih_l0_reverse`` (torch), or a second entry of the first axis (onnx).
In all of them z keeps the past, h = z * h_{t-1} + (1 - z) * h~, so only the order of the gates differs.

Two biases become one by their sum, except inside the GRU's reset, where the second is ``b_h``; one becomes two by a
second of zeros. Bit-exact round trips: from fused to any layout and back, always; from X to Y and back, if X has one
bias, if Y has two as well, or if X's second is zero outside the reset.

``lstm_coupled`` (i = 1 - f) is a cell of its own in fused and matrices alone. Elsewhere it stands as a plain LSTM whose
input gate has the forget gate's arrays negated, because 1 - sigmoid(a) = sigmoid(-a); on the way back the input gate is
checked and dropped (so a zero there may return with the other sign).

Sources: the documentation of torch.nn.LSTM, GRU and RNN 2.13; of keras.layers.LSTM, GRU and SimpleRNN 3; of the ONNX
operators LSTM, GRU and RNN, version 22.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from models.spec import GATES, PEEPHOLES, Layer
from models.weights import Array, Weights, check_shapes

LayoutName = Literal["fused", "matrices", "torch", "keras", "onnx"]


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    Attributes:
        names: the layout's names for ``W_x``, ``W_h`` and, where it has peepholes, ``V``.
        bias: the form of the biases, as the table has it.
        gates: the order of the gates where it is not the canonical one.
        peepholes: the order of the peepholes where it is not the canonical one.
        backward: what becomes of a name in the backward direction; None where directions are stacked.
        transposed: kernels are [I, G*H].
        apart: each gate has arrays of its own, ``_g`` after the name.
        coupled: ``lstm_coupled`` is a cell of its own.
        resets: where the GRU's reset can stand.
        relu: the kinds of cell whose candidate can be relu.
    """

    names: Mapping[str, str]
    bias: Literal["b and b_h", "none", "two", "rows", "joined"]
    gates: Mapping[str, str] = field(default_factory=dict)
    peepholes: str | None = None
    backward: str | None = "reverse.{}"
    transposed: bool = False
    apart: bool = False
    coupled: bool = False
    resets: tuple[str, ...] = ("before", "after")
    relu: tuple[str, ...] = ("rnn", "lstm", "gru")

    def order(self, layer: Layer, name: str) -> Sequence[str]:
        """The gates that a layer's array of this canonical name stacks, in this layout's order."""
        if name == "V":
            return self.peepholes or PEEPHOLES[layer.cell]
        if layer.cell == "lstm_coupled" and self.coupled:
            return GATES[layer.cell]
        return self.gates.get(_kind(layer), GATES[_kind(layer)])


LAYOUTS: dict[LayoutName, Layout] = {
    "fused": Layout({"W_x": "W_x", "W_h": "W_h", "V": "V"}, "b and b_h", coupled=True),
    "matrices": Layout({"W_x": "U", "W_h": "W", "V": "V"}, "none", transposed=True, apart=True, coupled=True),
    "torch": Layout(
        {"W_x": "weight_ih_l0", "W_h": "weight_hh_l0"},
        "two",
        backward="{}_reverse",
        resets=("after",),
        relu=("rnn",),
    ),
    "keras": Layout(
        {"W_x": "kernel", "W_h": "recurrent_kernel"},
        "rows",
        gates={"gru": "zrh"},
        transposed=True,
        relu=("rnn", "gru"),  # an LSTM's activation is applied to the cell state as well, which is another cell
    ),
    "onnx": Layout(
        {"W_x": "W", "W_h": "R", "V": "P"},
        "joined",
        gates={"lstm": "iofc", "gru": "zrh"},
        peepholes="iof",
        backward=None,
    ),
}
"""The table as data."""


def convert(weights: Mapping[str, Any], layer: Layer, source: LayoutName, target: LayoutName) -> dict[str, Array]:
    """Convert the arrays of one layer, all directions, from one layout to another.

    Args:
        weights: the arrays under their names in the source layout; anything that NumPy takes for an array.
        layer: what they are the weights of.
        source: a name in ``LAYOUTS``.
        target: a name in ``LAYOUTS``.

    Returns:
        New arrays under their names in the target layout, in the dtype they came in.

    Raises:
        ValueError: a layout is unknown or cannot hold the layer, or the arrays are not those of the source layout.
    """
    expected = array_shapes(layer, source)
    _check_representable(layer, target)
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    check_shapes(arrays, expected)
    if source == target:
        return {name: array.copy() for name, array in arrays.items()}
    before, after = LAYOUTS[source], LAYOUTS[target]
    directions = [_read(before, layer, part) for part in _split_directions(before, layer, arrays)]
    return _join_directions(after, [_write(after, layer, stacked) for stacked in directions])


def array_shapes(layer: Layer, layout: LayoutName) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the arrays that hold a layer in a layout.

    Raises:
        ValueError: the layout is unknown or cannot hold the layer.
    """
    _check_representable(layer, layout)
    if layout == "fused":
        return layer.weight_shapes
    row, shapes = LAYOUTS[layout], replace(layer, bidirectional=False).weight_shapes
    zeros = _read(LAYOUTS["fused"], layer, {name: np.zeros(shape, np.int8) for name, shape in shapes.items()})
    arrays = _join_directions(row, [_write(row, layer, zeros)] * layer.directions)
    return {name: array.shape for name, array in arrays.items()}


def _kind(layer: Layer) -> str:
    return layer.cell.partition("_")[0]


def _check_representable(layer: Layer, layout: LayoutName) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    row, kind = LAYOUTS[layout], _kind(layer)
    refusals = {
        "peepholes": layer.has_peepholes and "V" not in row.names,
        f"a GRU with reset {layer.reset}": kind == "gru" and layer.reset not in row.resets,
        f"relu for the candidate of cell {layer.cell!r}": layer.activation == "relu" and kind not in row.relu,
        "biases": layer.bias and row.bias == "none",
        "a learned initial state": layer.learned_initial_state and layout != "fused",
    }
    for what, refused in refusals.items():
        if refused:
            raise ValueError(f"layout {layout!r} cannot hold {what}")


def _split_directions(row: Layout, layer: Layer, arrays: Weights) -> list[Weights]:
    """One dict for each direction, each under the forward direction's names."""
    if row.backward is None:
        return [{name: array[d] for name, array in arrays.items()} for d in range(layer.directions)]
    if not layer.bidirectional:
        return [arrays]
    forward = {name: array for name, array in arrays.items() if row.backward.format(name) in arrays}
    return [forward, {name: arrays[row.backward.format(name)] for name in forward}]


def _join_directions(row: Layout, directions: Sequence[Weights]) -> dict[str, Array]:
    if row.backward is None:
        return {name: np.stack([arrays[name] for arrays in directions]) for name in directions[0]}
    joined = dict(directions[0])
    for arrays in directions[1:]:
        joined |= {row.backward.format(name): array for name, array in arrays.items()}
    return joined


def _read(row: Layout, layer: Layer, arrays: Weights) -> dict[str, Array]:
    """Bring one direction to canonical names and orders, but with both biases in full: ``b[G*H]``, ``b_h[G*H]``."""
    stacked = {}
    for name in ("W_x", "W_h", "V") if layer.has_peepholes else ("W_x", "W_h"):
        theirs = row.names[name]
        if row.apart:
            array = np.concatenate([arrays[f"{theirs}_{gate}"] for gate in row.order(layer, name)], axis=-1)
        else:
            array = arrays[theirs]
        stacked[name] = array.T if row.transposed else array
    if layer.bias:
        stacked["b"], stacked["b_h"] = _read_biases(row, layer, arrays)
    canonical = LAYOUTS["fused"]
    return {
        name: _reorder(array, row.order(layer, name), canonical.order(layer, name)) for name, array in stacked.items()
    }


def _write(row: Layout, layer: Layer, stacked: Weights) -> dict[str, Array]:
    """The way back from what ``_read`` gives."""
    arrays: dict[str, Array] = {}
    canonical = LAYOUTS["fused"]
    ordered = {
        name: _reorder(array, canonical.order(layer, name), row.order(layer, name)) for name, array in stacked.items()
    }
    for name in ("W_x", "W_h", "V") if layer.has_peepholes else ("W_x", "W_h"):
        theirs, order = row.names[name], row.order(layer, name)
        array = ordered[name].T if row.transposed else ordered[name]
        if row.apart:
            parts = np.split(array, len(order), axis=-1)
            arrays |= {f"{theirs}_{gate}": part for gate, part in zip(order, parts, strict=True)}
        else:
            arrays[theirs] = array
    if layer.bias:
        arrays |= _write_biases(row, layer, ordered["b"], ordered["b_h"])
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _reorder(array: Array, have: Sequence[str], want: Sequence[str]) -> Array:
    """Restack the gates along the first axis; where the input gate is missing, it is the forget gate negated."""
    gates = dict(zip(have, np.split(array, len(have)), strict=True))
    if "i" in want and "i" not in have:
        gates["i"] = -gates["f"]
    if "i" in have and "i" not in want and not np.array_equal(gates["i"], -gates["f"], equal_nan=True):
        raise ValueError("not a coupled LSTM: its input gate has to be the forget gate negated, in all arrays")
    return np.concatenate([gates[gate] for gate in want])


def _read_biases(row: Layout, layer: Layer, arrays: Weights) -> tuple[Array, Array]:
    match row.bias:
        case "two":
            return arrays["bias_ih_l0"], arrays["bias_hh_l0"]
        case "joined":
            b, b_h = np.split(arrays["B"], 2)
            return b, b_h
        case "rows" if layer.reset == "after":
            b, b_h = arrays["bias"]
            return b, b_h
        case "rows":
            return arrays["bias"], np.zeros_like(arrays["bias"])
    b_h = np.zeros_like(arrays["b"])
    if layer.reset == "after":
        b_h[-layer.hidden_size :] = arrays["b_h"]  # the candidate is the last of the GRU's gates
    return arrays["b"], b_h


def _write_biases(row: Layout, layer: Layer, b: Array, b_h: Array) -> dict[str, Array]:
    match row.bias:
        case "two":
            return {"bias_ih_l0": b, "bias_hh_l0": b_h}
        case "joined":
            return {"B": np.concatenate([b, b_h])}
        case "rows" if layer.reset == "after":
            return {"bias": np.stack([b, b_h])}
    one = np.where(b_h == 0, b, b + b_h)  # not b + b_h throughout: -0.0 + 0.0 is 0.0, and the way back not bit-exact
    if row.bias == "rows":
        return {"bias": one}
    if layer.reset == "after":
        one[-layer.hidden_size :] = b[-layer.hidden_size :]
        return {"b": one, "b_h": b_h[-layer.hidden_size :]}
    return {"b": one}
