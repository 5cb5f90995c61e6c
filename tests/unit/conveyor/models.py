"""Signatures of models, for tests that need no server."""

from __future__ import annotations

import numpy as np

from conveyor import Model, TensorSpec


def spec(name: str, dtype: str, *axes: str) -> TensorSpec:
    """A tensor whose features are three, and whose other axes have any size."""
    shape = tuple(3 if axis == "feature" else None for axis in axes)
    return TensorSpec(name, np.dtype(dtype), shape, axes)


def model(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Model:
    """A model with one state."""
    return Model("m", 1, inputs, outputs, (_STATE,), True, ("gru",), "float32", 100, 10, 1000)


SERIES = ("batch", "time", "feature")
_STATE = spec("h", "float32", "batch", "feature")

VECTORS = model((spec("x", "float32", *SERIES),), (spec("y", "float32", *SERIES),))
HALVES = model((spec("x", "float16", *SERIES),), (spec("y", "float16", *SERIES),))
TOKENS = model((spec("ids", "int64", "batch", "time"),), (spec("last", "float32", "batch", "feature"),))
TWO = model(
    (spec("a", "float32", *SERIES), spec("b", "float32", *SERIES)),
    (spec("y", "float32", *SERIES), spec("last", "float32", "batch", "feature")),
)
