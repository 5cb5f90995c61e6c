"""Between rows and the graph's own axes: many blocks of rows into one array, one array into many blocks.

Rows come in blocks of equal length, which have rows first and time second.
Must not know sessions, slots or onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from service.copying import duplicate, lay_side_by_side
from service.manifest import TensorSpec

Array = NDArray[np.generic]


def pack(blocks: Sequence[Array], lengths: Sequence[int], spec: TensorSpec, out: Array | None = None) -> Array:
    """Lay the rows of blocks side by side, padded with zeros.

    Args:
        blocks: each [N_k, T_k, ...], rows of one length; for a spec without time, [N_k, 1, ...].
        lengths: T_k of each block, which a spec without time does not need.
        spec: the graph's axes.
        out: the array to fill, whose time axis is at least as long as the longest block; None for a new one as long
            as that.

    Returns:
        One array in the graph's axes: ``out``, if given.

    Raises:
        ValueError: if the rows differ in any axis but the first two, from each other or from ``out``.
    """
    tail = blocks[0].shape[2:]
    if out is None:
        sizes = {spec.batch_axis: sum(len(block) for block in blocks)}
        if spec.time_axis is not None:
            sizes[spec.time_axis] = max(lengths)
        others = iter(tail)
        out = np.empty([sizes[axis] if axis in sizes else next(others) for axis in range(len(spec.shape))], spec.dtype)
    view = _rows_first(out, spec)
    steps = view.shape[1]
    if spec.time_axis is None or all(length == steps for length in lengths):
        lay_side_by_side(blocks, view)
        return out
    if any(block.shape[2:] != view.shape[2:] for block in blocks):
        # Assigned below, a feature of one would be stretched over all.
        raise ValueError("the rows of one tick differ in their features")
    first = 0
    for block, length in zip(blocks, lengths, strict=True):
        rows = view[first : first + len(block)]
        if length == steps:
            rows[:] = block
        else:
            rows[:, :length] = block
            rows[:, length:] = 0
        first += len(block)
    return out


def unpack(packed: Array, spec: TensorSpec, widths: Sequence[int], lengths: Sequence[int]) -> list[Array]:
    """Copy the rows of each block out, without their padding.

    Args:
        packed: the rows of all blocks, in the graph's axes.
        spec: the graph's axes.
        widths: N_k, how many rows each block has.
        lengths: T_k, how many steps of each are valid.

    Returns:
        Arrays [N_k, T_k, ...]; for a spec without time, [N_k, ...]. Of blocks of one length they are parts of one
        array; of others each is whole.
    """
    view = _rows_first(packed, spec)
    if spec.time_axis is None:
        view, lengths = view[:, 0], [1]
    elif lengths[0] < view.shape[1]:
        view = view[:, : max(lengths)]
    ends = [0, *accumulate(widths)]
    if all(length == lengths[0] for length in lengths):
        whole = duplicate(view)
        return [whole[first:end] for first, end in pairwise(ends)]
    return [view[first:end, :length].copy() for (first, end), length in zip(pairwise(ends), lengths, strict=True)]


def _rows_first(array: Array, spec: TensorSpec) -> Array:
    """View an array as [N, T, ...]; without a time axis, as [N, 1, ...]."""
    # As np.moveaxis would, in a third of the time.
    axes = [spec.batch_axis] if spec.time_axis is None else [spec.batch_axis, spec.time_axis]
    view = array.transpose(axes + [axis for axis in range(array.ndim) if axis not in axes])
    return view[:, None] if spec.time_axis is None else view
