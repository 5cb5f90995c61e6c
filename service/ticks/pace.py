"""How long a tick takes, learned from the ticks that ran. Pure; must not know rows or queues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_WEIGHT = 0.2
"""Of the newest tick: some ten ticks forget what was before them."""
_LEAP = 4
"""As how many times what was known a tick counts at most: one that was held up says little of the next."""
_NEARLY = 0.75
"""Share of the highest rate that counts as such."""
BESIDE_S = 0.0005
"""About what a tick takes beside its run, which alone is measured when a model is loaded: of a small one, more."""
_TRY = 32
"""How often more rows are tried than are expected to be quick enough."""


@dataclass(slots=True)
class _Seen:
    """What ticks of about one size took: how many rows they had, and seconds of each of their steps."""

    rows: float
    step_s: float


class Pace:
    """Seconds that one step of the time axis takes, by how many rows run side by side and for how many steps.

    Kept for up to 1, 2, 4, ... rows and 1, 2, 4, ... steps. What was never seen is taken to cost what its nearest
    neighbour does: whoever is too hopeful learns better from the next tick, and whoever is not hopeful never tries.

    Attributes:
        slowest_s: the most seconds that a step of a single row has ever taken.
    """

    def __init__(self) -> None:
        self.slowest_s = 0.0
        self._seen: dict[int, dict[int, _Seen]] = {}
        # What was found since something was learned: over capacity each chunk that comes asks for it.
        self._best: dict[tuple[int, int], float] = {}
        self._within: dict[tuple[int, float, int], int] = {}
        self._asked = 0

    def learn(self, rows: int, steps: int, seconds: float) -> None:
        """Note what a tick took.

        Args:
            rows: that ran side by side.
            steps: of the longest.
            seconds: of the whole tick.
        """
        self._best.clear()
        self._within.clear()
        known = self._seen.setdefault(_bucket(rows), {})
        bucket, each = _bucket(steps), seconds / steps
        if rows == 1:
            self.slowest_s = max(self.slowest_s, each)
        if (seen := known.get(bucket)) is None:
            seen = known[bucket] = _Seen(float(rows), each)
        else:
            seen.rows += _WEIGHT * (rows - seen.rows)
            seen.step_s += _WEIGHT * (min(each, _LEAP * seen.step_s) - seen.step_s)
        for length, longer in known.items():
            # In longer ticks a step takes no longer. Where it seemed so, they would not be tried again.
            if length > bucket:
                longer.step_s = min(longer.step_s, seen.step_s * max(1.0, longer.rows / seen.rows))

    def step_s(self, rows: int, steps: int) -> float:
        """Seconds of one step with that many rows, in a tick of that many steps; 0 where nothing has run yet."""
        if not self._seen:
            return 0.0
        bucket = _bucket(rows)
        seen = _of(self._seen[bucket if bucket in self._seen else _nearest(self._seen, bucket)], _bucket(steps))
        return seen.step_s * max(1.0, rows / seen.rows)

    def step_at_best_s(self, rows: int, steps: int) -> float:
        """The same, but at most what as many rows take in several ticks of fewer.

        A number of rows that was once seen at a bad moment would otherwise be refused, and never be seen again.
        """
        bucket, length = _bucket(rows), _bucket(steps)
        best = self._best.get((rows, length))
        if best is None:
            fewer = [seen[length] for other, seen in self._seen.items() if other < bucket and length in seen]
            best = min(self.step_s(rows, steps), *[seen.step_s * rows / seen.rows for seen in fewer], float("inf"))
            self._best[rows, length] = best
        return best

    def steps_within(self, rows: int, seconds: float, most: int) -> int:
        """How many steps that many rows can run within some time; at least 1, at most ``most``."""
        found = self._within.get((rows, seconds, most))
        if found is None:
            found = self._within[rows, seconds, most] = max(1, min(most, self._find_steps(rows, seconds, most)))
        return found

    def _find_steps(self, rows: int, seconds: float, most: int) -> int:
        if not self._seen:
            return most
        bucket = _bucket(rows)
        known = self._seen[bucket if bucket in self._seen else _nearest(self._seen, bucket)]
        # A tick has a part that does not grow with its steps: between two lengths that were seen time grows evenly, and
        # twice as many steps take less than twice as long.
        longer: tuple[int, float] | None = None
        for length, seen in sorted(known.items(), reverse=True):
            steps, took_s = 1 << length, (1 << length) * seen.step_s * max(1.0, rows / seen.rows)
            if took_s > seconds:
                longer = steps, took_s
                continue
            if longer is None:
                return int(seconds / took_s * steps) if took_s * most > seconds * steps else most
            return steps + int((seconds - took_s) / (longer[1] - took_s) * (longer[0] - steps))
        assert longer is not None
        return int(seconds / longer[1] * longer[0])

    def rows_within(self, seconds: float, most: int) -> int:
        """How many rows can run one step within some time; at least 1, at most ``most``.

        Now and then twice as many: a number of rows that was seen at a bad moment would else never be seen again.
        """
        rows = most = max(1, most)
        while rows > 1 and self.step_s(rows, 1) > seconds:
            rows //= 2
        self._asked += 1
        return rows if self._asked % _TRY else min(most, 2 * rows)

    def efficient_rows(self, most: int) -> int:
        """The fewest rows that run nearly as many steps a second as any number does; at most ``most``.

        More of them at a time would not be done sooner, and those that have waited longest would be done later.
        """
        rates = {
            bucket: max(
                (1 << length) * seen.rows / (BESIDE_S + (1 << length) * seen.step_s) for length, seen in known.items()
            )
            for bucket, known in self._seen.items()
        }
        best = max(rates.values(), default=0.0)
        quick = [bucket for bucket, rate in rates.items() if rate >= _NEARLY * best]
        return min((min(1 << bucket, most) for bucket in quick), default=most)

    def work_s(self, rows: int, steps: int, most: int, longest: int) -> float:
        """Seconds that waiting rows take.

        Args:
            rows: how many they are.
            steps: of all of them together.
            most: how many run side by side.
            longest: steps of a row in one tick, at most.
        """
        if not rows:
            return 0.0
        together = min(rows, most)
        return steps / together * self.step_at_best_s(together, max(1, min(longest, steps // rows)))


def _of(known: dict[int, _Seen], bucket: int) -> _Seen:
    return known[bucket] if bucket in known else known[_nearest(known, bucket)]


def _bucket(count: int) -> int:
    return (count - 1).bit_length()


def _nearest(known: Iterable[int], bucket: int) -> int:
    return min(known, key=lambda other: abs(other - bucket))
