"""Which rows run together, and what becomes of each: admission, queue, cutting ticks, sealing them.

Owns the queue of one model version. Pure: no I/O, no threads, no arrays looked into, and the time is handed in; whoever
shares a scheduler between threads holds one lock around each call. Must not know grpc, onnxruntime, or what a session
is.

The life of a row: ``submit`` queues it, ``cut`` takes it into a tick or refuses it, ``seal`` ends it after the run. A
row is applied only in ``seal``, and only if nobody has cancelled it and its deadline has not passed; that moment is the
one in which the position of its track moves. A row runs only where its track stands: when an earlier row of the same
track came to nothing, the ones behind it are refused with a position conflict.

Of the rows that wait, those of a higher priority run first, and among equals the one that came first. A row does not
overtake an earlier one of its track, whatever their priorities. So that no row waits for ever, one tick in eight is led
by the row that has waited longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from service.errors import Cancelled, ConveyorError, Full, InvalidRequest, Late, PositionConflict

FIRST, USUAL, LAST = PRIORITIES = (1, 2, 3)
_OLDEST_LEADS = 8
"""One tick in so many is led by the oldest row."""


class Track:
    """A line of steps that follow each other: a session, or one sequence of a batch.

    Attributes:
        slot: where its states live.
        position: how many steps have been applied.
        queued: how many rows of it wait.
        priority: of the newest of them; the next one has no higher.
    """

    __slots__ = ("position", "priority", "queued", "slot")

    def __init__(self, slot: int, position: int = 0) -> None:
        self.slot = slot
        self.position = position
        self.queued = 0
        self.priority = FIRST


class Phase(Enum):
    """Where a row is in its life."""

    QUEUED = auto()
    RUNNING = auto()
    APPLIED = auto()
    REFUSED = auto()


class Row:
    """Consecutive steps of one track.

    Attributes:
        track: whose steps they are.
        position: where they begin.
        steps: how many they are.
        inputs: the arrays, one an input of the model; none once refused.
        size: bytes that they hold.
        deadline: the time after which the row must not be applied; None for never.
        on_end: called once, by whoever delivers, when the row has ended.
        priority: 1 first, 2 as usual, 3 last.
        queued_at: when it was submitted.
        number: how many rows were submitted before it.
        phase: where it is in its life.
        outputs: once applied, the arrays, one an output of the model.
        error: once refused, why.
    """

    __slots__ = (
        "deadline",
        "error",
        "inputs",
        "number",
        "on_end",
        "outputs",
        "phase",
        "position",
        "priority",
        "queued_at",
        "size",
        "steps",
        "track",
        "unwanted",
    )

    def __init__(
        self,
        track: Track,
        position: int,
        steps: int,
        inputs: Sequence[Any],
        on_end: Callable[[Row], None],
        deadline: float | None = None,
        priority: int = USUAL,
    ) -> None:
        self.track = track
        self.position = position
        self.steps = steps
        self.inputs = inputs
        self.size: int = sum(array.nbytes for array in inputs)
        self.on_end = on_end
        self.deadline = deadline
        self.priority = priority
        self.queued_at = 0.0
        self.number = 0
        self.phase = Phase.QUEUED
        self.outputs: Sequence[Any] | None = None
        self.error: ConveyorError | None = None
        self.unwanted = False

    def refuse(self, error: ConveyorError) -> None:
        """End the row without applying it."""
        # A cancelled row stays in the queue until a tick is cut: it must not hold memory that nobody counts any more.
        self.inputs = ()
        self.phase = Phase.REFUSED
        self.error = error


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the queue and a tick.

    Attributes:
        queued_rows: most rows that wait.
        tick_rows: most rows in one tick.
        tick_steps: most steps in one tick, padding counted, unless one row alone has more.
        ragged: whether rows of one tick may differ in length.
        queued_bytes: most bytes that the inputs of waiting rows hold.
    """

    queued_rows: int
    tick_rows: int
    tick_steps: int
    ragged: bool = True
    queued_bytes: int = 1 << 30


class Scheduler:
    """The queue of one model version."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queues: dict[int, deque[Row]] = {priority: deque() for priority in PRIORITIES}
        self._queued = 0
        self._submitted = 0
        self._ticks = 0
        self._bytes = 0

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._queued

    def submit(self, rows: Sequence[Row], now: float = 0.0) -> None:
        """Queue rows: all of them or, over the limit, none.

        Args:
            rows: in the order in which they are to run, as far as they are of one track.
            now: the time.

        Raises:
            InvalidRequest: if they would not fit into an empty queue.
            Full: if they do not fit now.
        """
        limits = self._limits
        size = sum(row.size for row in rows)
        if len(rows) > limits.queued_rows or size > limits.queued_bytes:
            raise InvalidRequest(
                f"{len(rows)} rows of {size} bytes never fit: a model's queue holds up to {limits.queued_rows} rows "
                f"and {limits.queued_bytes} bytes; send fewer at a time"
            )
        if self._queued + len(rows) > limits.queued_rows:
            raise Full(
                f"{self._queued} rows are waiting for this model and {len(rows)} more would pass the limit of "
                f"{limits.queued_rows}; try again later"
            )
        if self._bytes + size > limits.queued_bytes:
            raise Full(
                f"{self._bytes} bytes of input are waiting for this model and {size} more would pass the limit of "
                f"{limits.queued_bytes}; try again later"
            )
        for row in rows:
            track = row.track
            if track.queued:
                row.priority = max(row.priority, track.priority)
            track.priority = row.priority
            track.queued += 1
            row.queued_at, row.number = now, self._submitted
            self._submitted += 1
            self._queues[row.priority].append(row)
        self._queued += len(rows)
        self._bytes += size

    def cancel(self, row: Row) -> bool:
        """Give a row up; one that runs is not applied when its tick is sealed.

        Returns:
            True if the row has ended by this; False if it runs, or had ended already.
        """
        if row.phase is not Phase.QUEUED:
            row.unwanted = True
            return False
        # It stays in its deque until cut comes by: taking it out of the middle would cost the length of the queue.
        row.refuse(_gone())
        self._leave(row)
        return True

    def cut(self, now: float) -> tuple[list[Row], list[Row]]:
        """Take the rows of the next tick.

        The oldest row of the highest priority leads, or in one tick of eight the oldest of all; those that join it wait
        behind no other row of their track, are at most twice as long or half as short, and keep rows times the longest
        within the limit of steps.

        Returns:
            The rows that run now, and those that were refused because they are late or their track is not where they
            begin.
        """
        tick = _Tick(self._limits)
        oldest_leads = self._ticks % _OLDEST_LEADS == _OLDEST_LEADS - 1
        while oldest_leads and not tick.rows and (queue := self._queue_of_the_oldest()) is not None:
            tick.take(queue.popleft(), now)
        for queue in self._queues.values():
            waiting: list[Row] = []
            while queue and len(tick.rows) < self._limits.tick_rows:
                row = queue.popleft()
                if row.phase is Phase.QUEUED and not tick.take(row, now):
                    waiting.append(row)
            queue.extendleft(reversed(waiting))
        for row in tick.rows:
            row.phase = Phase.RUNNING
            self._leave(row)
        for row in tick.refused:
            self._leave(row)
        self._ticks += bool(tick.rows)
        return tick.rows, tick.refused

    def _queue_of_the_oldest(self) -> deque[Row] | None:
        for queue in self._queues.values():
            while queue and queue[0].phase is not Phase.QUEUED:
                queue.popleft()
        return min((queue for queue in self._queues.values() if queue), key=lambda queue: queue[0].number, default=None)

    def _leave(self, row: Row) -> None:
        row.track.queued -= 1
        self._queued -= 1
        self._bytes -= row.size

    def seal(self, tick: Sequence[Row], now: float) -> list[int]:
        """End the rows of a tick whose run succeeded: the one moment in which positions move.

        Returns:
            The indices of the rows that were applied; their new states are to be kept, those of the others thrown away.
        """
        applied = []
        for index, row in enumerate(tick):
            if row.unwanted:
                row.refuse(_gone())
            elif row.deadline is not None and now >= row.deadline:
                row.refuse(_late())
            else:
                row.phase = Phase.APPLIED
                row.track.position = row.position + row.steps
                applied.append(index)
        return applied

    def clear(self, error: ConveyorError) -> list[Row]:
        """Refuse every row that still waits, and return them."""
        rows = [row for queue in self._queues.values() for row in queue if row.phase is Phase.QUEUED]
        rows.sort(key=lambda row: row.number)
        for row in rows:
            row.refuse(error)
            self._leave(row)
        for queue in self._queues.values():
            queue.clear()
        return rows


class _Tick:
    """A tick while it is cut."""

    def __init__(self, limits: Limits) -> None:
        self.rows: list[Row] = []
        self.refused: list[Row] = []
        self._limits = limits
        self._seen: set[Track] = set()
        self._longest = 0

    def take(self, row: Row, now: float) -> bool:
        """Add a row, or refuse it.

        Returns:
            False if it goes on waiting, and with it whatever comes later on its track.
        """
        if row.track in self._seen:
            return False
        if (error := _unfit(row, now)) is not None:
            row.refuse(error)
            self.refused.append(row)
            return True
        self._seen.add(row.track)
        if self.rows and not self._joins(row.steps):
            return False
        self.rows.append(row)
        self._longest = max(self._longest, row.steps)
        return True

    def _joins(self, steps: int) -> bool:
        limits, first = self._limits, self.rows[0].steps
        near = steps <= 2 * first and first <= 2 * steps if limits.ragged else steps == first
        return near and (len(self.rows) + 1) * max(self._longest, steps) <= limits.tick_steps


def _unfit(row: Row, now: float) -> ConveyorError | None:
    # The position first: a chunk that was applied already must not be told that the state has not moved.
    if row.position != row.track.position:
        return PositionConflict(
            f"the chunk begins at position {row.position}, and the session is at {row.track.position}: "
            "an earlier chunk was not applied",
            row.track.position,
        )
    if row.deadline is not None and now >= row.deadline:
        return _late()
    return None


def _late() -> Late:
    return Late("the deadline passed before the steps were applied; the state has not moved")


def _gone() -> Cancelled:
    return Cancelled("cancelled before the steps were applied; the state has not moved")
