"""Traffic for a scheduler without a server: streams and batches against an engine that is only a formula for its time.

Hours of it pass in seconds. Time jumps from one thing that happens to the next; nothing sleeps.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from service.errors import ConveyorError
from service.ticks.admission import Limits
from service.ticks.row import Block, Phase, Row, Track
from service.ticks.scheduler import Scheduler


class Sheet:
    """Stands for an input array of a block."""

    def __init__(self, rows: int = 1) -> None:
        self.nbytes = 256 * rows
        self._rows = rows

    def copy(self) -> Sheet:
        """The same."""
        return self

    def __getitem__(self, index: slice | list[int]) -> Sheet:
        return Sheet(len(range(self._rows)[index]) if isinstance(index, slice) else len(index))


@dataclass(slots=True)
class Seen:
    """What callers of one name have seen.

    Attributes:
        waited_s: from submission to success, of each request.
        refused: how often one was refused at once.
        late: how often one was accepted and came to nothing.
    """

    waited_s: list[float] = field(default_factory=list)
    refused: int = 0
    late: int = 0

    def percentile(self, share: float) -> float:
        """Of what was waited, in seconds."""
        return sorted(self.waited_s)[int(share * (len(self.waited_s) - 1))]


class World:
    """A scheduler, an engine, callers, and the time.

    Attributes:
        seen: what callers have seen, by name.
        cells: steps that were computed, padding counted.
        useful: those that were not padding.
        ticks: how many there were.
        busy_s: how long the engine worked.

    Args:
        limits: of the scheduler.
        cost_s: seconds of a tick of so many rows and so many steps.
    """

    def __init__(self, limits: Limits, cost_s: Callable[[int, int], float]) -> None:
        self.scheduler = Scheduler(limits)
        for rows, steps in ((1, 1), (2, 1), (16, 1), (2, 3)):
            self.scheduler.pace.learn(rows, steps, cost_s(rows, steps))
        self.seen: dict[str, Seen] = {}
        self.cells = self.useful = self.ticks = 0
        self.busy_s = 0.0
        self.now = 0.0
        self._cost_s = cost_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._open = 0

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Have something happen."""
        heapq.heappush(self._events, (time, next(self._numbers), act))

    def run(self, until: float) -> None:
        """Let time pass; then nothing new comes, and what was accepted is finished."""
        while True:
            self._happen()
            tick, refused = self.scheduler.cut(self.now)
            for row in refused:
                row.on_end(row)
            if tick is None:
                # Work is conserved: the engine rests only when nothing waits.
                assert refused or not self.scheduler.queued
                if not refused:
                    if not self._events or self.now >= until:
                        assert not self._open
                        return
                    self.now = max(self.now, self._events[0][0])
                    if self.now >= until:
                        self._events.clear()
                continue
            assert len({id(row.track) for block in tick.blocks for row in block.rows}) == tick.rows
            seconds = self._cost_s(tick.rows, tick.steps)
            self.ticks += 1
            self.cells += tick.rows * tick.steps
            self.useful += tick.cells
            self.busy_s += seconds
            end = self.now + seconds
            self._happen(end)
            self.now = end
            self.scheduler.pace.learn(tick.rows, tick.steps, seconds)
            self.scheduler.resume(tick, self.scheduler.seal(tick, self.now))
            for row in tick.blocks:
                if row.phase in (Phase.APPLIED, Phase.REFUSED):
                    row.on_end(row)
            if self.now >= until:
                self._events.clear()

    def streams(
        self, name: str, count: int, period_s: float, steps: int = 1, late_s: float | None = None, width: int = 1
    ) -> None:
        """Callers that each send a chunk, or a block of some, wait for the answer, and send the next in its time."""
        for number in range(count):
            self._stream(name, random.Random(f"{name} {number}"), period_s, steps, late_s, width)

    def _stream(
        self, name: str, random: random.Random, period_s: float, steps: int, late_s: float | None, width: int
    ) -> None:
        tracks = [Track(0) for _ in range(width)]
        seen = self.seen.setdefault(name, Seen())

        def send() -> None:
            began, position, left = self.now, tracks[0].position, width

            def end(block: Block) -> None:
                nonlocal left
                left -= len(block.rows)
                self._end(block, seen, began, counts=not left)
                assert all(
                    row.track.position == position + (steps if block.phase is Phase.APPLIED else 0)
                    for row in block.rows
                )
                if not left:
                    self.at(max(self.now, began + period_s * (0.5 + random.random())), send)

            deadline = None if late_s is None else began + late_s
            rows = [Row(track, position) for track in tracks]
            block = Block(rows, steps, [Sheet(width)], end, deadline, caller=name)
            if not self._submit([block], seen):
                self.at(self.now + max(period_s, 0.001), send)

        self.at(random.random() * max(period_s, 0.001), send)

    def batches(self, name: str, count: int, rows: int, median: float = 100, sigma: float = 1.0) -> None:
        """Callers that each send a batch with lengths drawn log-normal, and the next when it is answered."""
        for number in range(count):
            self._batches(name, random.Random(f"{name} {number}"), rows, median, sigma)

    def _batches(self, name: str, random: random.Random, rows: int, median: float, sigma: float) -> None:
        seen = self.seen.setdefault(name, Seen())

        def send() -> None:
            began, left = self.now, rows

            def end(row: Block) -> None:
                nonlocal left
                left -= 1
                self._end(row, seen, began, counts=not left)
                if not left:
                    self.at(self.now, send)

            lengths = [max(1, min(4096, round(random.lognormvariate(math.log(median), sigma)))) for _ in range(rows)]
            batch = [Block([Row(Track(0), 0)], length, [Sheet()], end, caller=name, batch=True) for length in lengths]
            if not self._submit(batch, seen):
                self.at(self.now + 0.01, send)

        self.at(0.0, send)

    def _submit(self, rows: list[Block], seen: Seen) -> bool:
        try:
            self.scheduler.submit(rows, self.now)
        except ConveyorError:
            seen.refused += 1
            return False
        self._open += sum(len(row.rows) for row in rows)
        return True

    def _end(self, row: Block, seen: Seen, began: float, counts: bool = True) -> None:
        self._open -= len(row.rows)
        if row.phase is Phase.REFUSED:
            seen.late += 1
        elif counts:
            seen.waited_s.append(self.now - began)

    def _happen(self, until: float | None = None) -> None:
        """Let everything happen that is due by a time."""
        bound = self.now if until is None else until
        while self._events and self._events[0][0] <= bound:
            self.now, _, act = heapq.heappop(self._events)
            act()
