"""Rates: what comes evenly is told as it is, and what is over fades away."""

from __future__ import annotations

import pytest

from service.ticks.rate import Rate


@pytest.mark.parametrize("rate", [0.5, 1, 7, 1000])
def test_what_comes_evenly(rate: float) -> None:
    """On average over a period it is the rate; and a few memories later next to nothing is left."""
    counted = Rate(2.0)
    at = [100 + number / rate for number in range(int(40 * rate))]
    for now in at:
        counted.note(1, now)
    period = [at[-1] + part / 100 / rate for part in range(100)]
    assert sum(map(counted.per_s, period)) / 100 == pytest.approx(rate, rel=0.02)
    assert counted.per_s(at[-1] + 20) < 1e-3 * rate


def test_many_at_once_count_as_many() -> None:
    """As those do that come one after the other at the same moment."""
    one, other = Rate(1.0), Rate(1.0)
    assert one.per_s(5.0) == 0
    one.note(3, 5.0)
    for _ in range(3):
        other.note(1, 5.0)
    assert one.per_s(5.5) == other.per_s(5.5) > 0
