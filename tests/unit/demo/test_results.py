"""The demo's figures follow from what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from demo.digits import Digits
from demo.results import Results, rows_by_tick


def test_figures_by_hand() -> None:
    """Accuracy, rate, percentiles and probabilities of two images agree with the same worked out by hand."""
    outputs = np.zeros((2, 8, 10), np.float32)
    outputs[0, :, 3] = np.log(11)  # A 3 throughout, which it is.
    outputs[1, :6, 3] = 1.0  # First a 3, from the seventh row on the 5 that it is.
    outputs[1, 6:, 5] = 1.0
    latencies_s = np.linspace(0.001, 0.016, 16).reshape(2, 8)
    digits = Digits(np.zeros((2, 8, 8), np.float32), np.array([3, 5]))
    results = Results(digits, outputs, latencies_s, 4.0, 2, {1: 16}, 1.0, 16, 1e-6, 1e-7)
    assert results.accuracy.tolist() == [0.5] * 6 + [1.0] * 2
    assert results.steps_per_second == 4.0
    assert results.reach == pytest.approx(np.log(11))
    assert results.latency_ms(50) == pytest.approx(8.5)
    assert results.probabilities[0, 0, 3] == pytest.approx(0.55)
    assert results.probabilities.sum(axis=2) == pytest.approx(np.ones((2, 8)))
    assert json.loads(results.to_json())["accuracy"][-1] == 1.0


def test_ticks_are_counted_once() -> None:
    """A cumulative histogram of two models' sum becomes the ticks of each bound alone; other samples do not matter."""
    counted = {
        ("conveyor_tick_rows_bucket", "4.0"): 7.0,
        ("conveyor_tick_rows_bucket", "1.0"): 2.0,
        ("conveyor_tick_rows_bucket", "2.0"): 2.0,
        ("conveyor_tick_rows_bucket", "+Inf"): 7.0,
        ("conveyor_tick_rows_sum", ""): 22.0,
    }
    assert rows_by_tick(counted) == {1: 2, 2: 0, 4: 5}
