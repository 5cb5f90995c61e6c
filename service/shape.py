"""How many steps a tick has, for rows of different lengths. Pure arithmetic; must not know rows or queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

WASTE = 0.04
"""Share of a tick's cells that may be padding, computed to be thrown away."""
_CANDIDATES = 8


def choose(lengths: Sequence[int], cost_s: Callable[[int, int], float], padded: bool) -> tuple[int, list[int]]:
    """Choose the length of a tick and who is in it.

    Rows that are longer run as many steps as the tick has and wait for another. Shorter ones are padded, as long as the
    padding stays under ``WASTE``. Of the lengths that come into question the one with the most useful steps a second is
    chosen. The first row, which has waited longest, is always in it.

    Args:
        lengths: how many steps each row could run now, at least 1, those first that are to run first.
        cost_s: seconds of a tick of so many rows and so many steps.
        padded: whether shorter rows may be padded at all.

    Returns:
        The steps of the tick, and the indices of the rows that are in it, ascending.
    """
    first = lengths[0]
    if all(length == first for length in lengths):
        return first, list(range(len(lengths)))
    array = np.asarray(lengths)
    best, chosen, steps = -1.0, np.arange(0), first
    for candidate in _candidates(array, first):
        fits = array >= candidate
        if padded:
            _pad(array, fits, candidate)
        if not fits[0]:
            continue
        count = int(fits.sum())
        useful = int(np.minimum(array[fits], candidate).sum())
        seconds = cost_s(count, candidate)
        score = useful / seconds if seconds > 0 else float(useful)
        if score > best:
            best, chosen, steps = score, np.flatnonzero(fits), candidate
    return steps, [int(index) for index in chosen]


def choose_whole(lengths: Sequence[int], most: int, padded: bool) -> list[int]:
    """Choose who is in a tick where no row may be cut into slices: those nearest in length to the first.

    Args:
        lengths: steps of each row, at least 1, those first that are to run first.
        most: rows times the longest, unless the first has more alone.
        padded: whether rows may differ in length; the padding stays under ``WASTE``.

    Returns:
        The indices of the rows that are in it, ascending.
    """
    order = sorted(range(len(lengths)), key=lambda index: abs(lengths[index] - lengths[0]))
    chosen, steps, longest = [0], lengths[0], lengths[0]
    for index in order:
        length = lengths[index]
        if index == 0 or (length != lengths[0] and not padded):
            continue
        cells = (len(chosen) + 1) * max(longest, length)
        if cells > most or cells - steps - length > WASTE * cells:
            continue
        chosen.append(index)
        steps, longest = steps + length, max(longest, length)
    return sorted(chosen)


def _candidates(array: np.ndarray[tuple[int], np.dtype[np.intp]], first: int) -> list[int]:
    distinct = np.unique(array)
    if len(distinct) > _CANDIDATES:
        distinct = distinct[np.linspace(0, len(distinct) - 1, _CANDIDATES).astype(np.intp)]
    return sorted({int(length) for length in distinct} | {first})


def _pad(
    array: np.ndarray[tuple[int], np.dtype[np.intp]], fits: np.ndarray[tuple[int], np.dtype[np.bool_]], steps: int
) -> None:
    """Let shorter rows in: the first row before all, then those that waste least."""
    shorter = np.flatnonzero(~fits)
    if not len(shorter):
        return
    order = shorter[np.argsort(-array[shorter], kind="stable")]
    if shorter[0] == 0:
        order = np.concatenate([[0], order[order != 0]])
    thrown = np.cumsum(steps - array[order])
    cells = (int(fits.sum()) + np.arange(1, len(order) + 1)) * steps
    within = thrown <= WASTE * cells
    # The first that is too much ends it: those behind it waste more.
    count = len(order) if within.all() else int(np.argmin(within))
    fits[order[:count]] = True
