"""Copies are exact whatever their arrays look like, and nobody else runs in the middle of them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.copying import FEW, HELD_BYTES, copy, duplicate, lay_side_by_side

Array = NDArray[Any]


def values(*shape: int, dtype: str = "float32") -> Array:
    """Values no two of which are alike, as far as the type has so many."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "int8", "bool"])
@pytest.mark.parametrize(
    ("target", "source"),
    [
        (np.s_[:], np.s_[:]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[::-1], np.s_[:]),
        (np.s_[:, :, ::2], np.s_[:, :, ::2]),
        (np.s_[:, :, ::2], np.s_[:, :, :150]),
        (np.s_[:1], np.s_[1:2]),
        (np.s_[:0], np.s_[:0]),
    ],
    ids=["whole", "shifted", "backward", "every other", "to every other", "one", "none"],
)
def test_parts_of_arrays(dtype: str, target: Any, source: Any) -> None:
    """What is copied is what NumPy would copy, and nothing beside it changes."""
    given = values(4, 5, 300, dtype=dtype)
    expected, filled = np.zeros_like(given), np.zeros_like(given)
    expected[target] = given[source]
    copy(filled[target], given[source])
    np.testing.assert_array_equal(filled, expected)


def test_other_axes_other_types_and_numbers_without_axes() -> None:
    """What differs in its type is converted, and what NumPy stretches is stretched."""
    turned = np.zeros((5, 4, 300), np.float32)
    copy(turned.transpose(1, 0, 2), values(4, 5, 300))
    np.testing.assert_array_equal(turned.transpose(1, 0, 2), values(4, 5, 300))
    converted = np.zeros((4, 300), np.float64)
    copy(converted, values(4, 300, dtype="int32"))
    np.testing.assert_array_equal(converted, values(4, 300))
    copy(converted, values(1, 300, dtype="float64"))
    np.testing.assert_array_equal(converted, np.repeat(values(1, 300), 4, axis=0))
    number = np.zeros(())
    copy(number, np.array(3.0))
    assert number == 3


@pytest.mark.parametrize("sizes", [[1, 1, 1], [3, 1, 2], [2]], ids=str)
@pytest.mark.parametrize("shape", [(4, 300), (1, 3), (300,), ()], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_side_by_side(sizes: list[int], shape: tuple[int, ...], turned: bool) -> None:
    """One behind the other along the first axis, into arrays that lie otherwise too."""
    parts = [values(size, *shape) + 1000 * n for n, size in enumerate(sizes)]
    expected = np.concatenate(parts)
    out = np.full(expected.shape[::-1] if turned else expected.shape, np.nan, np.float32)
    lay_side_by_side(parts, out.T if turned else out)
    np.testing.assert_array_equal(out.T if turned else out, expected)


@pytest.mark.parametrize("shape", [(3, 300), (2, 299), (3, 1, 300)], ids=str)
def test_what_does_not_fit_side_by_side_is_refused(shape: tuple[int, ...]) -> None:
    """Nothing is stretched, left out or left over."""
    with pytest.raises(ValueError, match=r"shape|dimension"):
        lay_side_by_side([values(2, 300)], np.zeros(shape, np.float32))


def test_more_than_takes_a_moment_is_copied_as_numpy_does() -> None:
    """Large ones, and many."""
    rows = HELD_BYTES // 4 // 300 + 1
    for given in (values(rows, 300), values(2, 3 * FEW, 2)):
        np.testing.assert_array_equal(duplicate(given[::-1]), given[::-1])
        out = np.zeros_like(given)
        lay_side_by_side([given[:1], given[1:]], out)
        np.testing.assert_array_equal(out, given)


def test_what_does_not_fit_is_refused() -> None:
    """As NumPy does."""
    with pytest.raises(ValueError, match="broadcast"):
        copy(np.zeros((4, 300)), np.zeros((4, 301)))


def test_a_duplicate_is_in_row_major_order() -> None:
    """However the source lies, and it shares nothing with it."""
    given = values(5, 4, 300)
    made = duplicate(given.transpose(1, 0, 2))
    np.testing.assert_array_equal(made, given.transpose(1, 0, 2))
    assert made.flags.c_contiguous
    assert made.flags.owndata


def test_nobody_else_runs_in_the_middle() -> None:
    """Others that would run have to wait; NumPy's own copy lets them."""
    given = values(FEW // 2, 2, 256)
    filled = np.empty_like(given)
    turns = [0]
    over = threading.Event()

    def take_turns() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    def turns_during(work: Callable[[], None]) -> int:
        before = turns[0]
        for _ in range(200):
            work()
        return turns[0] - before

    interval = sys.getswitchinterval()
    other = threading.Thread(target=take_turns)
    other.start()
    # So long that nobody is made to give way.
    sys.setswitchinterval(100.0)
    try:
        assert turns_during(lambda: copy(filled, given)) == 0
        assert turns_during(lambda: np.copyto(filled, given)) > 0
    finally:
        sys.setswitchinterval(interval)
        over.set()
        other.join()
