"""Between rows and the graph's own axes: many rows into one array, one array into many rows.

Rows have time first; a row's arrays are whole and owned by nobody else, so that keeping one does not keep its tick.
Must not know sessions, slots or onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.manifest import TensorSpec

Array = NDArray[np.generic]


def pack(rows: Sequence[Array], spec: TensorSpec, longest: int) -> Array:
    """Lay rows side by side, padded with zeros.

    Args:
        rows: N arrays [T_n, ...], T_n from 1 to ``longest``; for a spec without time, [1, ...].
        spec: the graph's axes.
        longest: size of the time axis.

    Returns:
        One array in the graph's axes.

    Raises:
        ValueError: if the rows differ in any axis but the first.
    """
    tail = rows[0].shape[1:]
    if any(row.shape[1:] != tail for row in rows):
        # Where the graph takes any number of features; assigned below, a row of one would be stretched over all.
        raise ValueError("the rows of one tick differ in their features")
    if spec.time_axis is None:
        view = np.empty((len(rows), *tail), spec.dtype)
        for n, row in enumerate(rows):
            view[n] = row[0]
        return np.ascontiguousarray(np.moveaxis(view, 0, spec.batch_axis))
    sizes = {spec.batch_axis: len(rows), spec.time_axis: longest}
    others = iter(tail)
    packed: Array = np.zeros([sizes.get(axis) or next(others) for axis in range(len(spec.shape))], spec.dtype)
    view = np.moveaxis(packed, (spec.batch_axis, spec.time_axis), (0, 1))
    for n, row in enumerate(rows):
        view[n, : len(row)] = row
    return packed


def unpack(packed: Array, spec: TensorSpec, steps: Sequence[int]) -> list[Array]:
    """Copy each row out, without its padding.

    Args:
        packed: N rows in the graph's axes.
        spec: the graph's axes.
        steps: how many steps of each row are valid.

    Returns:
        N arrays [T_n, ...]; for a spec without time, [...].
    """
    if spec.time_axis is None:
        view = np.moveaxis(packed, spec.batch_axis, 0)
        return [view[n].copy() for n in range(len(steps))]
    view = np.moveaxis(packed, (spec.batch_axis, spec.time_axis), (0, 1))
    return [view[n, :length].copy() for n, length in enumerate(steps)]
