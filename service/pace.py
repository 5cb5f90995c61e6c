"""How long a tick takes, learned from the ticks that ran. Pure; must not know rows or queues."""

from __future__ import annotations

_WEIGHT = 0.2
"""Of the newest tick: some ten ticks forget what was before them."""


class Pace:
    """Seconds that one step of the time axis takes, by how many rows run side by side and for how many steps.

    Kept for 1, 2, 4, ... rows and 1, 2, 4, ... steps. What was never seen is taken to cost what its nearest neighbour
    does: whoever is too hopeful learns better from the next tick, and whoever is not hopeful never tries.

    Attributes:
        slowest_s: the most seconds that a step of a single row has ever taken.
    """

    def __init__(self) -> None:
        self.slowest_s = 0.0
        self._seconds: dict[int, dict[int, float]] = {}

    def learn(self, rows: int, steps: int, seconds: float) -> None:
        """Note what a tick took.

        Args:
            rows: that ran side by side.
            steps: of the longest.
            seconds: of the whole tick.
        """
        known = self._seconds.setdefault(_bucket(rows), {})
        bucket, each = _bucket(steps), seconds / steps
        if rows == 1:
            self.slowest_s = max(self.slowest_s, each)
        known[bucket] = known[bucket] + _WEIGHT * (each - known[bucket]) if bucket in known else each

    def step_s(self, rows: int, steps: int) -> float:
        """Seconds of one step with that many rows, in a tick of that many steps; 0 where nothing has run yet."""
        known = self._seconds.get(_bucket(rows))
        if known is None:
            if not self._seconds:
                return 0.0
            known = self._seconds[_nearest(self._seconds, _bucket(rows))]
        bucket = _bucket(steps)
        return known[bucket] if bucket in known else known[_nearest(known, bucket)]

    def steps_within(self, rows: int, seconds: float, most: int) -> int:
        """How many steps that many rows can run within some time; at least 1, at most ``most``."""
        steps = 1
        # Long ticks cost less a step than short ones: begin with what the short ones allow, and look again.
        for _ in range(3):
            each = self.step_s(rows, steps)
            steps = max(1, int(seconds / each)) if each * most > seconds else most
        return steps

    def rows_within(self, seconds: float, most: int) -> int:
        """How many rows can run one step within some time; at least 1, at most ``most``."""
        rows = most
        while rows > 1 and self.step_s(rows, 1) > seconds:
            rows //= 2
        return max(1, rows)

    def work_s(self, rows: int, steps: int, most: int) -> float:
        """Seconds that waiting rows take.

        Args:
            rows: how many they are.
            steps: of all of them together.
            most: how many run side by side.
        """
        if not rows:
            return 0.0
        together = min(rows, most)
        return steps / together * self.step_s(together, max(1, steps // rows))


def _bucket(count: int) -> int:
    return (count - 1).bit_length()


def _nearest(known: dict[int, float] | dict[int, dict[int, float]], bucket: int) -> int:
    return min(known, key=lambda other: abs(other - bucket))
