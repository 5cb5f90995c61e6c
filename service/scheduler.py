"""Which rows run together, and what becomes of each: admission, queue, cutting ticks, sealing them.

Owns the queue of one model version. Pure: no I/O, no threads, no arrays looked into, and the time is handed in; whoever
shares a scheduler between threads holds one lock around each call. Must not know grpc, onnxruntime, or what a session
is.

The life of a row: ``submit`` queues it, ``cut`` takes it into a tick or refuses it, ``seal`` ends it after the run. A
row is applied only in ``seal``, and only if nobody has cancelled it and its deadline has not passed; that moment is the
one in which the position of its track moves. A row runs only where its track stands: when an earlier row of the same
track came to nothing, the ones behind it are refused with a position conflict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from service.errors import Cancelled, ConveyorError, Full, InvalidRequest, Late, PositionConflict


class Track:
    """A line of steps that follow each other: a session, or one sequence of a batch.

    Attributes:
        slot: where its states live.
        position: how many steps have been applied.
    """

    __slots__ = ("position", "slot")

    def __init__(self, slot: int, position: int = 0) -> None:
        self.slot = slot
        self.position = position


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
        phase: where it is in its life.
        outputs: once applied, the arrays, one an output of the model.
        error: once refused, why.
    """

    __slots__ = (
        "deadline",
        "error",
        "inputs",
        "on_end",
        "outputs",
        "phase",
        "position",
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
    ) -> None:
        self.track = track
        self.position = position
        self.steps = steps
        self.inputs = inputs
        self.size: int = sum(array.nbytes for array in inputs)
        self.on_end = on_end
        self.deadline = deadline
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
        self._queue: deque[Row] = deque()
        self._queued = 0
        self._bytes = 0

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._queued

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows: all of them or, over the limit, none.

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
        self._queue.extend(rows)
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
        # It stays in the deque until cut comes by: taking it out of the middle would cost the length of the queue.
        row.refuse(_gone())
        self._leave(row)
        return True

    def cut(self, now: float) -> tuple[list[Row], list[Row]]:
        """Take the rows of the next tick.

        The oldest row leads; those that join it wait behind no other row of their track, are at most twice as long or
        half as short, and keep rows times the longest within the limit of steps.

        Returns:
            The rows that run now, and those that were refused because they are late or their track is not where they
            begin.
        """
        limits = self._limits
        tick: list[Row] = []
        refused: list[Row] = []
        waiting: list[Row] = []
        taken: set[Track] = set()
        longest = 0
        while self._queue and len(tick) < limits.tick_rows:
            row = self._queue.popleft()
            if row.phase is not Phase.QUEUED:
                continue
            if row.track in taken:
                waiting.append(row)
                continue
            if (error := _unfit(row, now)) is not None:
                row.refuse(error)
                refused.append(row)
                continue
            taken.add(row.track)
            if tick and not self._joins(row.steps, longest, tick[0].steps, len(tick)):
                waiting.append(row)
                continue
            tick.append(row)
            longest = max(longest, row.steps)
        self._queue.extendleft(reversed(waiting))
        for row in tick:
            row.phase = Phase.RUNNING
            self._leave(row)
        for row in refused:
            self._leave(row)
        return tick, refused

    def _leave(self, row: Row) -> None:
        self._queued -= 1
        self._bytes -= row.size

    def _joins(self, steps: int, longest: int, first: int, rows: int) -> bool:
        near = steps <= 2 * first and first <= 2 * steps if self._limits.ragged else steps == first
        return near and (rows + 1) * max(longest, steps) <= self._limits.tick_steps

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
        rows = [row for row in self._queue if row.phase is Phase.QUEUED]
        for row in rows:
            row.refuse(error)
            self._leave(row)
        self._queue.clear()
        return rows


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
