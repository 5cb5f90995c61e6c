"""What the tests of the models share: every kind of layer, and weights drawn at random for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from models.spec import Layer
from models.weights import Array

LAYERS: dict[str, Layer] = {
    "rnn": Layer("rnn", 3, 4),
    "rnn, relu": Layer("rnn", 3, 4, activation="relu"),
    "lstm": Layer("lstm", 3, 4),
    "lstm, relu": Layer("lstm", 3, 4, activation="relu"),
    "lstm_peephole": Layer("lstm_peephole", 3, 4),
    "lstm_coupled": Layer("lstm_coupled", 3, 4),
    "lstm_coupled, peepholes": Layer("lstm_coupled", 3, 4, peepholes=True),
    "gru, reset before": Layer("gru", 3, 4),
    "gru, reset before, relu": Layer("gru", 3, 4, activation="relu"),
    "gru, reset after": Layer("gru", 3, 4, reset="after"),
    "gru, reset after, relu": Layer("gru", 3, 4, reset="after", activation="relu"),
}
LAYERS |= {f"{name}, no bias": replace(layer, bias=False) for name, layer in LAYERS.items()}


def draw_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: DTypeLike = np.float64
) -> dict[str, Array]:
    """Normal weights, small enough that no state grows without bound."""
    generator = np.random.default_rng(seed)
    return {name: (0.4 * generator.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def draw(*shape: int, seed: int = 1) -> Array:
    """Normal float64 values."""
    return np.random.default_rng(seed).standard_normal(shape)
