"""How an error is measured."""

from __future__ import annotations

import re

import numpy as np
import pytest

from export.errors import ExportError, VerificationFailed
from export.verify import check_bound, chunks, judge, largest_error, rows
from service.manifest import ParityRow


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([0.5, 1.0], [0.5, 1.0], 0.0),
        ([0.5, 0.25], [0.5, 0.5], 0.25),
        ([1.0, 110.0], [1.0, 100.0], 0.1),
        ([np.nan, 0.0], [0.0, 0.0], np.inf),
        ([np.inf, 0.0], [0.0, 0.0], np.inf),
        ([], [], 0.0),
    ],
    ids=["none", "absolute within 1", "relative beyond", "not a number", "infinite", "nothing"],
)
def test_largest_error(got: list[float], expected: list[float], error: float) -> None:
    """Absolute where the reference is within [-1, 1], relative beyond; what is not finite is infinitely wrong."""
    exact = np.array(expected)
    assert largest_error(np.array(got), exact, np.abs(exact)) == pytest.approx(error)


def test_shapes_must_agree() -> None:
    """A graph that gives another shape is not compared by broadcasting."""
    with pytest.raises(ExportError, match=r"got shape \(2, 1\), expected \(2, 3\)"):
        largest_error(np.zeros((2, 1)), np.zeros((2, 3)), np.zeros((2, 3)))


def test_the_error_names_the_worst_row() -> None:
    """The message says how many rows failed, and where and by how much at worst."""
    compared = [
        ParityRow(case=case, batch=2, steps=33, outputs=outputs, states=0, bound=1e-6)
        for case, outputs in (("fine", 1e-6), ("bad", 1e-5), ("worse", 1e-4))
    ]
    says = "failed in 2 of 3 rows; at worst, in 'worse' with batch 2 and 33 steps, the error is 1.0e-04"
    with pytest.raises(VerificationFailed, match=re.escape(says)) as failed:
        judge(compared)
    assert failed.value.parity is not None
    assert failed.value.parity.rows == tuple(compared)
    assert judge(compared[:1]).rows == tuple(compared[:1])


@pytest.mark.parametrize("error", [np.nan, np.inf])
@pytest.mark.parametrize("bound", [2e-6, np.inf, np.nan])
def test_what_is_no_number_is_within_no_bound(error: float, bound: float) -> None:
    """Neither an error that is not finite nor a bound that is not finite can make a row pass."""
    for errors in ({"outputs": error, "states": 0.0}, {"outputs": 0.0, "states": error}):
        row = ParityRow(case="odd", batch=1, steps=1, bound=bound, **errors)
        assert not row.within
        with pytest.raises(VerificationFailed):
            judge([row])
    assert not ParityRow(case="odd", batch=1, steps=1, outputs=0.0, states=0.0, bound=np.inf).within


@pytest.mark.parametrize("bound", [np.inf, np.nan, 0.0, -1.0, 1.5, 1e9])
def test_bounds_that_bound_nothing(bound: float) -> None:
    """A bound is a number above 0, and at most the size of the largest state there is."""
    with pytest.raises(ExportError, match="expected a number above 0 and up to 1"):
        check_bound(bound)


def test_pieces_cover_every_step_once() -> None:
    """Cut into chunks or taken row by row, each valid step of each row is run once, in order."""
    lengths = np.array([33, 1, 5])
    for pieces in (chunks(lengths), rows(lengths)):
        steps: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for here, start, stop in pieces:
            for row in here:
                steps[row] += range(start, min(stop, lengths[row]))
        assert steps == {row: list(range(length)) for row, length in enumerate(lengths)}
