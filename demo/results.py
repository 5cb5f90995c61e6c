"""What the demo measured: the numbers that the closing table and the picture are made of.

Owns the arithmetic from raw outputs to figures. Must not know how they were got or how they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.digits import Digits


@dataclass(frozen=True)
class Results:
    """One run of the demo.

    Attributes:
        digits: the held-out images, N of them.
        outputs: what the server answered, ``[N, 8, 10]``: a score for each digit after each row.
        latencies_s: seconds from a row's sending to its reply, ``[N, 8]``.
        seconds: how long the streaming took in all, opening, reading out and closing the sessions included.
        sessions: how many were open at a time.
        tick_rows: how many ticks had up to so many rows, by that upper bound; as the server counted them.
        rows_per_tick: the mean; as the server counted it.
        largest_difference: from the reference, over all outputs and final states.
    """

    digits: Digits
    outputs: NDArray[np.float32]
    latencies_s: NDArray[np.float64]
    seconds: float
    sessions: int
    tick_rows: dict[int, int]
    rows_per_tick: float
    largest_difference: float

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
    def steps_per_second(self) -> float:
        """Rows answered in a second, by the clock of the whole streaming."""
        return self.latencies_s.size / self.seconds

    def latency_ms(self, percentile: float) -> float:
        """The latency that so many percent of the steps stay under, in milliseconds."""
        return float(np.percentile(self.latencies_s, percentile)) * 1e3
