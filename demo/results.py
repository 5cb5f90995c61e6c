"""What the demo measured: the numbers that the closing table and the picture are made of.

Owns the arithmetic from raw outputs to figures. Must not know how they were got or how they are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.digits import Digits


def rows_by_tick(counted: Mapping[tuple[str, str], float]) -> dict[int, int]:
    """Undoes the server's histogram, which counts for each bound all ticks up to it: the ticks of each bound alone."""
    below = sorted(
        (int(float(bound)), int(value))
        for (name, bound), value in counted.items()
        if name == "conveyor_tick_rows_bucket" and bound != "+Inf"
    )
    before = [0, *(count for _, count in below)]
    return {bound: count - earlier for (bound, count), earlier in zip(below, before, strict=False)}


@dataclass(frozen=True)
class Results:
    """One run of the demo.

    Attributes:
        digits: the held-out images, N of them.
        outputs: what the server answered, ``[N, 8, 10]``: a score for each digit after each row.
        latencies_s: seconds from a row's sending to its reply, ``[N, 8]``.
        seconds: in which rows were under way.
        sessions: how many were open at a time.
        tick_rows: how many ticks had up to so many rows, by that upper bound; as the server counted them.
        rows_per_tick: the mean; as the server counted it.
        steps: how many the server applied; as the server counted them.
        largest_error: against the reference, over all outputs and final states, by the measure of the export, in which
            values beyond 1 count relatively.
        largest_difference: the same, absolutely.
    """

    digits: Digits
    outputs: NDArray[np.float32]
    latencies_s: NDArray[np.float64]
    seconds: float
    sessions: int
    tick_rows: dict[int, int]
    rows_per_tick: float
    steps: int
    largest_difference: float
    largest_error: float

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Softmax of the outputs, ``[N, 8, 10]``."""
        powers = np.exp(self.outputs.astype(np.float64))
        shares: NDArray[np.float64] = powers / powers.sum(axis=2, keepdims=True)
        return shares

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of the images that are named rightly after each row, ``[8]``."""
        shares: NDArray[np.float64] = np.mean(self.outputs.argmax(axis=2) == self.digits.labels[:, None], axis=0)
        return shares

    @property
    def reach(self) -> float:
        """The largest output, whatever its sign."""
        return float(np.abs(self.outputs).max())

    @property
    def steps_per_second(self) -> float:
        """Rows answered in a second, while they were under way."""
        return self.latencies_s.size / self.seconds

    def to_json(self) -> str:
        """The figures, for programs."""
        figures = {
            "images": len(self.digits.labels),
            "sessions": self.sessions,
            "steps": self.steps,
            "accuracy": self.accuracy.tolist(),
            "largest_difference": self.largest_difference,
            "largest_error": self.largest_error,
            "steps_per_second": self.steps_per_second,
            "p50_ms": self.latency_ms(50),
            "p99_ms": self.latency_ms(99),
            "rows_per_tick": self.rows_per_tick,
        }
        return json.dumps(figures, indent=2) + "\n"

    def latency_ms(self, percentile: float) -> float:
        """The latency that so many percent of the steps stay under, in milliseconds."""
        return float(np.percentile(self.latencies_s, percentile)) * 1e3
