"""How many steps a tick has, for rows of different lengths. Pure arithmetic; must not know rows or queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

Counts: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.intp]]"

WASTE = 0.04
"""Share of a tick's cells that may be padding, computed to be thrown away."""
_CANDIDATES = 8


def choose(
    lengths: Sequence[int], widths: Sequence[int], cost_s: Callable[[int, int], float], padded: bool
) -> tuple[int, list[int]]:
    """Choose the length of a tick and which blocks are in it.

    Rows that are longer run as many steps as the tick has and wait for another. Shorter ones are padded, as long as the
    padding stays under ``WASTE``. Of the lengths that come into question the one with the most useful steps a second is
    chosen. The first block, which has waited longest, is always in it.

    Args:
        lengths: how many steps the rows of each block could run now, at least 1, those first that are to run first.
        widths: how many rows each has.
        cost_s: seconds of a tick of so many rows and so many steps.
        padded: whether shorter rows may be padded at all.

    Returns:
        The steps of the tick, and the indices of the blocks that are in it, ascending.
    """
    first = lengths[0]
    if all(length == first for length in lengths):
        return first, list(range(len(lengths)))
    array, rows = np.asarray(lengths), np.asarray(widths)
    best, chosen, steps = -1.0, np.arange(0), first
    for candidate in _candidates(array, first):
        fits = array >= candidate
        if padded:
            _pad(array, rows, fits, candidate)
        if not fits[0]:
            continue
        count = int(rows[fits].sum())
        useful = int((np.minimum(array[fits], candidate) * rows[fits]).sum())
        seconds = cost_s(count, candidate)
        score = useful / seconds if seconds > 0 else float(useful)
        if score > best:
            best, chosen, steps = score, np.flatnonzero(fits), candidate
    return steps, [int(index) for index in chosen]


def choose_whole(lengths: Sequence[int], widths: Sequence[int], most: int, padded: bool) -> list[int]:
    """Choose who is in a tick where no row may be cut into slices: those nearest in length to the first.

    Args:
        lengths: steps of each block's rows, at least 1, those first that are to run first.
        widths: how many rows each has.
        most: rows times the longest, unless the first has more alone.
        padded: whether rows may differ in length; the padding stays under ``WASTE``.

    Returns:
        The indices of the blocks that are in it, ascending.
    """
    order = sorted(range(len(lengths)), key=lambda index: abs(lengths[index] - lengths[0]))
    chosen, rows, steps, longest = [0], widths[0], widths[0] * lengths[0], lengths[0]
    for index in order:
        length = lengths[index]
        if index == 0 or (length != lengths[0] and not padded):
            continue
        cells, more = (rows + widths[index]) * max(longest, length), widths[index] * length
        if cells > most or cells - steps - more > WASTE * cells:
            continue
        chosen.append(index)
        rows, steps, longest = rows + widths[index], steps + more, max(longest, length)
    return sorted(chosen)


def _candidates(array: Counts, first: int) -> list[int]:
    distinct = np.unique(array)
    if len(distinct) > _CANDIDATES:
        distinct = distinct[np.linspace(0, len(distinct) - 1, _CANDIDATES).astype(np.intp)]
    return sorted({int(length) for length in distinct} | {first})


def _pad(array: Counts, rows: Counts, fits: np.ndarray[tuple[int], np.dtype[np.bool_]], steps: int) -> None:
    """Let shorter blocks in: the first block before all, then those that waste least."""
    shorter = np.flatnonzero(~fits)
    if not len(shorter):
        return
    order = shorter[np.argsort(-array[shorter], kind="stable")]
    if shorter[0] == 0:
        order = np.concatenate([[0], order[order != 0]])
    thrown = np.cumsum((steps - array[order]) * rows[order])
    cells = (int(rows[fits].sum()) + np.cumsum(rows[order])) * steps
    within = thrown <= WASTE * cells
    # The first that is too much ends it: those behind it waste more.
    count = len(order) if within.all() else int(np.argmin(within))
    fits[order[:count]] = True
