"""Copies that keep the interpreter's lock.

NumPy lets other threads run while it copies more than about 500 elements. Whoever copies then waits for its turn again:
up to the interpreter's switch interval, for a copy that takes microseconds. What is done here is not interrupted,
because an element that stands for a whole row counts as one. Must not know what is copied.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

FEW = 500
"""Up to so many elements NumPy copies without letting others run."""


def copy(target: Array, source: Array) -> None:
    """Copy an array into another.

    Args:
        target: to be filled.
        source: of the same shape, or one that NumPy would stretch to it.
    """
    if source.size > FEW and source.shape == target.shape and source.dtype == target.dtype:
        size, item = source.shape[-1], source.itemsize
        if source.size <= size * FEW and source.strides[-1] == target.strides[-1] == item:
            row = whole(size * item)
            target, source = target.view(row), source.view(row)
    target[...] = source


def duplicate(source: Array) -> Array:
    """Return a copy of an array, in row-major order."""
    target = np.empty(source.shape, source.dtype)
    copy(target, source)
    return target


@functools.lru_cache(256)
def whole(size: int) -> np.dtype[np.void]:
    """Return a type whose elements are so many bytes."""
    return np.dtype((np.void, size))
