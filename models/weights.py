"""A dict of NumPy arrays under dotted names: take a part of it, check it, tell it. Knows neither cells nor layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]


def select(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the weights are exactly those expected.

    Raises:
        ValueError: with the names that are missing or unknown, or the first shape that is wrong.
    """
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"the weights are not those expected: missing {missing}, unknown {unknown}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"weight {name!r} has shape {weights[name].shape}, expected {shape}")


def digest(weights: Weights) -> str:
    """The sha256, in hexadecimal, of the weights in the order of their names: names, dtypes, shapes and every bit."""
    sha = hashlib.sha256()
    for name, array in sorted(weights.items()):
        little_endian = array.astype(array.dtype.newbyteorder("<"), order="C")
        sha.update(f"{name} {little_endian.dtype.str} {array.shape}\n".encode())
        sha.update(little_endian.tobytes())
    return sha.hexdigest()
