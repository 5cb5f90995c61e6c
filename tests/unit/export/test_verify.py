"""How an error is measured."""

from __future__ import annotations

import numpy as np
import pytest

from export.errors import ExportError, VerificationFailed
from export.verify import largest_error, to_parity
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
    with pytest.raises(ExportError, match=r"gave shape \(2, 1\), expected \(2, 3\)"):
        largest_error(np.zeros((2, 1)), np.zeros((2, 3)), np.zeros((2, 3)))


def test_the_error_names_the_worst_row() -> None:
    """The message says how many rows failed, and where and by how much at worst."""
    rows = [
        ParityRow(case=case, batch=2, steps=33, outputs=outputs, states=0, bound=1e-6)
        for case, outputs in (("fine", 1e-6), ("bad", 1e-5), ("worse", 1e-4))
    ]
    says = "failed in 2 of 3 rows; at worst, in 'worse' with batch 2 and 33 steps, the error is 1.0e-04"
    assert says in str(VerificationFailed(to_parity(rows)))
