"""State dicts of torch.nn.LSTM, GRU and RNN with all their layers. Owns their names; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.layouts import convert
from models.spec import Activation, Cell, Layer
from models.weights import Array, Weights, select

_CELLS: dict[int, Cell] = {1: "rnn", 3: "gru", 4: "lstm"}
"""torch's cell by its number of gates."""


def from_torch_state_dict(
    state_dict: Mapping[str, Any], prefix: str | None = None, activation: Activation = "tanh"
) -> tuple[list[Layer], dict[str, Array]]:
    """Read the layers of a torch.nn.LSTM, GRU or RNN from its state dict, or from that of a model which contains it.

    Args:
        state_dict: tensors or arrays; what does not belong to the module is left alone.
        prefix: what stands before the module's names, e.g. "encoder.lstm."; None to find it.
        activation: "relu" for an RNN made with ``nonlinearity="relu"``; the weights do not tell.

    Returns:
        The layers, bottom first, and their weights under canonical names (``layers.0.W_x``).

    Raises:
        ValueError: there is no such module, or several and no prefix; it has projections; a layer between others is
            missing; its shapes do not fit.
    """
    if prefix is None:
        found = [name.removesuffix("weight_ih_l0") for name in state_dict if name.endswith("weight_ih_l0")]
        if len(found) != 1:
            raise ValueError(f"expected one recurrent module in the state dict, found {found}; say which by its prefix")
        prefix = found[0]
    if prefix + "weight_ih_l0" not in state_dict:
        raise ValueError(f"no {prefix}weight_ih_l0 in the state dict, which has {sorted(state_dict)[:9]}")
    if prefix + "weight_hr_l0" in state_dict:
        raise ValueError("an LSTM with projections (proj_size) has no counterpart among the cells")

    layers: list[Layer] = []
    weights: dict[str, Array] = {}
    names = re.compile(re.escape(prefix) + r"(weight|bias)_(ih|hh)_l\d+(_reverse)?")
    left = {name for name in state_dict if names.fullmatch(name)}
    while prefix + f"weight_ih_l{len(layers)}" in state_dict:
        index = len(layers)
        name = re.compile(rf"{re.escape(prefix)}((?:weight|bias)_(?:ih|hh)_l){index}(|_reverse)")
        matches = [match for match in map(name.fullmatch, state_dict) if match]
        left -= {match[0] for match in matches}
        arrays = {match[1] + "0" + match[2]: np.asarray(state_dict[match[0]]) for match in matches}
        layers.append(_layer(arrays, activation))
        fused = convert(arrays, layers[-1], source="torch", target="fused")
        weights |= {f"layers.{index}.{name}": array for name, array in fused.items()}
    if left:
        raise ValueError(f"there is no {prefix}weight_ih_l{len(layers)}, but what belongs after it: {sorted(left)}")
    return layers, weights


def to_torch_state_dict(layers: Sequence[Layer], weights: Weights, prefix: str = "") -> dict[str, Array]:
    """The way back: the arrays that a torch.nn.LSTM, GRU or RNN of these layers loads.

    Raises:
        ValueError: torch has no module that holds one of the layers.
    """
    state_dict: dict[str, Array] = {}
    for index, layer in enumerate(layers):
        arrays = convert(select(weights, f"layers.{index}."), layer, source="fused", target="torch")
        state_dict |= {prefix + name.replace("_l0", f"_l{index}"): array for name, array in arrays.items()}
    return state_dict


def _layer(arrays: Weights, activation: Activation) -> Layer:
    """The layer that one layer's torch arrays are the weights of."""
    shapes = {name: arrays[name].shape for name in ("weight_ih_l0", "weight_hh_l0") if name in arrays}
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expected two matrices, weight_ih and weight_hh; got {shapes}")
    (rows, input_size), hidden_size = shapes["weight_ih_l0"], shapes["weight_hh_l0"][1]
    cell = _CELLS.get(rows // hidden_size)
    if cell is None or rows % hidden_size:
        raise ValueError(f"{rows} rows for a hidden size of {hidden_size}; torch has 1, 3 or 4 gates")
    return Layer(
        cell,
        input_size,
        hidden_size,
        bidirectional="weight_ih_l0_reverse" in arrays,
        reset="after" if cell == "gru" else "before",
        activation=activation,
        bias="bias_ih_l0" in arrays,
    )
