"""Copies that keep the interpreter's lock.

NumPy lets other threads run while it copies more than about 500 elements. Whoever copies then waits for its turn again:
up to the interpreter's switch interval, for a copy that takes microseconds. What is done here is not interrupted,
because an element that stands for a whole row counts as one. Must not know what is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

FEW = 500
"""Up to so many elements NumPy copies without letting others run."""
HELD_BYTES = 1 << 19
"""Others are kept from running for as long as it takes to copy so much, and no longer: some tens of microseconds."""


def copy(target: Array, source: Array) -> None:
    """Copy an array into another.

    Args:
        target: to be filled.
        source: of the same shape, or one that NumPy would stretch to it.
    """
    if source.size > FEW and source.nbytes <= HELD_BYTES and source.shape == target.shape:
        size = source.shape[-1]
        if source.size <= size * FEW and _has_rows(source, target, size):
            row = whole(size * source.itemsize)
            target, source = target.view(row), source.view(row)
    target[...] = source


def lay_side_by_side(parts: Sequence[Array], out: Array) -> None:
    """Copy arrays into one, one behind the other along its first axis.

    Args:
        parts: at least one.
        out: as long as all of them.

    Raises:
        ValueError: if they do not fit.
    """
    if max([part.size for part in parts]) > FEW and out.nbytes <= HELD_BYTES:
        size = out.shape[-1]
        if all(_has_rows(part, out, size) for part in parts):
            row = whole(size * out.itemsize)
            parts, out = [part.view(row) for part in parts], out.view(row)
    np.concatenate(parts, out=out)


def duplicate(source: Array) -> Array:
    """Return a copy of an array, in row-major order."""
    target = np.empty(source.shape, source.dtype)
    copy(target, source)
    return target


def _has_rows(array: Array, other: Array, size: int) -> bool:
    """Whether the last axis of both has so many elements, of one type, which lie together."""
    return (
        array.shape[-1] == size
        and array.dtype == other.dtype
        and array.strides[-1] == other.strides[-1] == array.itemsize
    )


@functools.lru_cache(256)
def whole(size: int) -> np.dtype[np.void]:
    """Return a type whose elements are so many bytes."""
    return np.dtype((np.void, size))
