"""Which rows run together, for how many steps, and what becomes of each: admission, queue, cutting ticks, sealing them.

Owns the queue of one model version. Pure: no I/O, no threads, no arrays looked into, and the time is handed in; whoever
shares a scheduler between threads holds one lock around each call. Must not know grpc, onnxruntime, or what a session
is.

The life of a row: ``submit`` queues it or refuses it, ``cut`` takes it or a slice of it into a tick, ``seal`` ends the
tick after its run, and ``resume`` puts rows that have steps left back in front. A row is applied only in ``seal``,
after its last step, and only if nobody has cancelled it and its deadline has not passed; that moment is the one in
which the position of its track moves.

Who is next: chunks and batches take turns while both wait, so that neither waits behind more than one tick of the
other, and while chunks come a tick is short. Within each, callers share the steps evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from service.errors import Cancelled, ConveyorError, Full, InvalidRequest, Late, PositionConflict
from service.fair import Fair
from service.pace import Pace
from service.row import PRIORITIES, Phase, Row
from service.shape import choose, choose_whole

_PATIENCE = 7
"""How many ticks in a row a priority lets higher ones lead."""
_CAUTION = 1.25
"""How much longer than expected the work ahead may take without making late what was accepted."""
_LIVELY_S = 1.0
"""How long after the last chunk ticks stay short."""
_STALE = 64
"""How many rows that were given up may stand in a queue beyond those that wait."""


Kind: TypeAlias = tuple[bool, int]
"""Of a batch or not, and of which priority."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the queue and a tick.

    Attributes:
        queued_rows: most rows that wait.
        tick_rows: most rows in one tick.
        tick_steps: most steps in one tick, padding counted, unless one row alone has more.
        ragged: whether rows of one tick may differ in length.
        sliced: whether a row may run in slices. Not where a layer reads backward: it needs the whole row at once.
        queued_bytes: most bytes that the inputs of waiting rows hold.
        queued_s: most seconds of work that may wait in front of a row.
        short_tick_s: how long a tick may take while chunks come.
        long_tick_s: how long it may take otherwise.
    """

    queued_rows: int
    tick_rows: int
    tick_steps: int
    ragged: bool = True
    sliced: bool = True
    queued_bytes: int = 1 << 30
    queued_s: float = 60.0
    short_tick_s: float = 0.004
    long_tick_s: float = 0.05


@dataclass(slots=True)
class Tick:
    """Rows that run together.

    Attributes:
        rows: each once.
        lengths: how many of its steps each row runs, from ``row.done`` on.
    """

    rows: list[Row]
    lengths: list[int]

    @property
    def steps(self) -> int:
        """Of the longest."""
        return max(self.lengths)

    def halves(self) -> tuple[Tick, Tick]:
        """The same rows in two ticks."""
        middle = len(self.rows) // 2
        return (
            Tick(self.rows[:middle], self.lengths[:middle]),
            Tick(self.rows[middle:], self.lengths[middle:]),
        )


@dataclass(slots=True)
class Sealed:
    """What a run has come to, by the rows' indices in their tick.

    Attributes:
        applied: ended well; their states are those of their tracks from now on.
        advanced: have steps left. Their states are to be kept for the next slice, and they to be resumed then.
    """

    applied: list[int]
    advanced: list[int]


class Scheduler:
    """The queue of one model version."""

    def __init__(self, limits: Limits, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self._limits = limits
        kinds = [(batch, priority) for batch in (False, True) for priority in PRIORITIES]
        self._queues: dict[Kind, Fair[Row]] = {kind: Fair() for kind in kinds}
        self._steps = dict.fromkeys(kinds, 0)
        # Rows that were given up and still stand in the queue.
        self._stale = dict.fromkeys(kinds, 0)
        self._patience = dict.fromkeys(kinds, _PATIENCE)
        self._batch_led = True
        self._waiting = 0
        self._bytes = 0
        self._lively_until = float("-inf")

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._waiting

    def submit(self, rows: Sequence[Row], now: float = 0.0) -> None:
        """Queue rows: all of them or, over a limit, none.

        Args:
            rows: in the order in which they are to run, as far as they are of one track.
            now: the time.

        Raises:
            InvalidRequest: if they would not fit into an empty queue.
            Full: if they do not fit now, or would not be done in time.
        """
        self._admit(rows, now)
        for row in rows:
            row.queued_at = now
            waiting = row.track.waiting
            waiting.append(row)
            self._enter(row)
            # Those behind it come into the queue when their turn is near: when they are the first of their track.
            if len(waiting) == 1:
                self._queues[_kind(row)].push(row.caller, row)
            if not row.batch:
                self._lively_until = now + _LIVELY_S

    def _admit(self, rows: Sequence[Row], now: float) -> None:
        limits = self._limits
        size = sum(row.size for row in rows)
        if len(rows) > limits.queued_rows or size > limits.queued_bytes:
            raise InvalidRequest(
                f"{len(rows)} rows of {size} bytes never fit: a model's queue holds up to {limits.queued_rows} rows "
                f"and {limits.queued_bytes} bytes; send fewer at a time"
            )
        queued = self.queued
        if queued + len(rows) > limits.queued_rows:
            raise Full(
                f"{queued} rows are waiting for this model and {len(rows)} more would pass the limit of "
                f"{limits.queued_rows}; try again later"
            )
        if self._bytes + size > limits.queued_bytes:
            raise Full(
                f"{self._bytes} bytes of input are waiting for this model and {size} more would pass the limit of "
                f"{limits.queued_bytes}; try again later"
            )
        if not queued:
            return
        before = self._ahead(_kind(rows[0]))
        ahead = self.pace.work_s(queued, before, limits.tick_rows)
        if ahead > limits.queued_s:
            raise Full(
                f"{ahead:.1f} s of work are waiting for this model, which is over the limit of {limits.queued_s:g} s; "
                "try again later"
            )
        needed = self.pace.work_s(queued + len(rows), before + sum(row.steps for row in rows), limits.tick_rows)
        for row in rows:
            if row.deadline is not None and now < row.deadline < now + _CAUTION * needed:
                raise Full(
                    f"it would be done in {needed:.3f} s and its deadline is in {row.deadline - now:.3f} s; "
                    "try again later"
                )

    def _ahead(self, kind: Kind) -> int:
        """Steps that run before a new row of a kind does."""
        batch, priority = kind
        ours = sum(self._steps[batch, other] for other in PRIORITIES if other <= priority)
        theirs = sum(self._steps[not batch, other] for other in PRIORITIES)
        # They take turns: what is ahead of chunks is at most as much of the batches again.
        return ours + (theirs if batch else min(ours, theirs))

    def cancel(self, row: Row) -> bool:
        """Give a row up; one that runs is not applied when its tick is sealed.

        Returns:
            True if the row has ended by this; False if it runs, or had ended already.
        """
        if row.phase is not Phase.QUEUED:
            row.unwanted = True
            return False
        in_queue = row.track.waiting[0] is row
        self._leave(row)
        self._end(row, _gone())
        if in_queue:
            self._let_go(_kind(row))
        return True

    def _let_go(self, kind: Kind) -> None:
        """Take rows that were given up out of their queue, once they are many: each alone would cost its length."""
        self._stale[kind] += 1
        queue = self._queues[kind]
        if len(queue) > 2 * (len(queue) - self._stale[kind]) + _STALE:
            queue.keep(_waits)
            self._stale[kind] = 0

    def cut(self, now: float) -> tuple[Tick | None, list[Row]]:
        """Take the rows of the next tick.

        Returns:
            The tick, if any row can run now, and the rows that were refused because they are late or their track is not
            where they begin.
        """
        refused: list[Row] = []
        waiting = [kind for kind, queue in self._queues.items() if queue]
        if not waiting:
            return None, refused
        lead = self._lead(waiting)
        order = sorted(waiting, key=lambda kind: (kind != lead, kind[0] != lead[0]))
        rows: list[Row] = []
        lengths: list[int] = []
        most, longest = self._size(lead, now)
        soon = now + self.pace.step_s(min(self._waiting, most), 1)

        def give(row: Row) -> int | None:
            if not _waits(row):
                self._stale[_kind(row)] -= 1
                return 0
            # The first one is judged by the time it is, not by what the tick is expected to take: were that far too
            # much, nothing would run any more, and so nothing be learned.
            if (error := _unfit(row, soon if rows else now)) is not None:
                self._leave(row)
                self._end(row, error)
                refused.append(row)
                return 0
            length = min(row.left, longest) if self._limits.sliced else row.steps
            if rows and _kind(row) != lead:
                # It may fill a tick of others, but not change its length much.
                near = lengths[0] <= length <= 2 * lengths[0]
                if not near or (len(rows) + 1) * max(length, *lengths) > self._limits.tick_steps:
                    return None
            rows.append(row)
            lengths.append(length)
            return length

        for kind in order:
            # Chunks that wait run together, however many they are; batches must not keep new ones waiting.
            room = most if kind[0] or lead[0] else self._limits.tick_rows
            if len(rows) < room:
                self._queues[kind].take(give, room - len(rows))
        for kind in waiting:
            if kind[0] == lead[0]:
                self._patience[kind] = _PATIENCE if kind == lead else self._patience[kind] - 1
        self._batch_led = lead[0]
        if not rows:
            return None, refused
        steps, chosen = self._choose(lengths)
        if len(chosen) < len(rows):
            kept = set(chosen)
            for index in reversed(range(len(rows))):
                if index not in kept:
                    self._queues[_kind(rows[index])].put_back(rows[index].caller, rows[index], lengths[index])
            rows = [rows[index] for index in chosen]
            lengths = [lengths[index] for index in chosen]
        for row in rows:
            row.phase = Phase.RUNNING
            self._leave(row)
        return Tick(rows, [min(length, steps) for length in lengths]), refused

    def _choose(self, lengths: Sequence[int]) -> tuple[int, list[int]]:
        """The steps of a tick, and which rows are in it."""
        limits = self._limits
        if not limits.sliced:
            return max(lengths), choose_whole(lengths, limits.tick_steps, limits.ragged)
        return choose(lengths, lambda rows, steps: steps * self.pace.step_s(rows, steps), limits.ragged)

    def _lead(self, waiting: Sequence[Kind]) -> Kind:
        """Whose tick the next one is."""
        turn = [kind for kind in waiting if kind[0] is not self._batch_led] or waiting
        return next((kind for kind in reversed(turn) if self._patience[kind] <= 0), turn[0])

    def _size(self, lead: Kind, now: float) -> tuple[int, int]:
        """Most rows of a tick that has some of batches, and most steps."""
        limits = self._limits
        lively = now < self._lively_until
        seconds = limits.short_tick_s if lively else limits.long_tick_s
        most = self.pace.rows_within(seconds, limits.tick_rows) if lively else limits.tick_rows
        rows = min(len(self._queues[lead]), most if lead[0] else limits.tick_rows)
        return most, self.pace.steps_within(rows, seconds, max(1, limits.tick_steps // rows))

    def seal(self, tick: Tick, now: float) -> Sealed:
        """End a tick whose run succeeded: the one moment in which positions move.

        Returns:
            Which rows have ended well and which go on; the others were refused, and their states are thrown away.
        """
        sealed = Sealed([], [])
        for index, row in enumerate(tick.rows):
            if row.unwanted:
                self._end(row, _gone())
            elif row.deadline is not None and now >= row.deadline:
                self._end(row, _late())
            elif row.left > tick.lengths[index]:
                sealed.advanced.append(index)
            else:
                row.phase = Phase.APPLIED
                row.track.position = row.position + row.steps
                self._next(row)
                sealed.applied.append(index)
        return sealed

    def resume(self, tick: Tick, sealed: Sealed) -> list[Row]:
        """Let the rows that have steps left wait for their next slice; until this they cannot be taken out.

        Returns:
            Those that wait; the others were given up meanwhile, and have ended.
        """
        going_on = []
        # From the last to the first, so that they stand in front in their old order.
        for index in reversed(sealed.advanced):
            row = tick.rows[index]
            row.done += tick.lengths[index]
            if row.unwanted:
                self._end(row, _gone())
                continue
            row.phase = Phase.QUEUED
            self._enter(row)
            self._queues[_kind(row)].put_back(row.caller, row)
            going_on.append(row)
        return going_on

    def fail(self, rows: Sequence[Row], error: ConveyorError) -> None:
        """End rows of a tick whose run failed."""
        for row in rows:
            self._end(row, error)

    def clear(self, error: ConveyorError) -> list[Row]:
        """Refuse every row that still waits, and return them."""
        rows: list[Row] = []
        while heads := [row for queue in self._queues.values() for row in queue.drain() if _waits(row)]:
            self._stale = dict.fromkeys(self._stale, 0)
            for row in heads:
                self._leave(row)
                self._end(row, error)
            rows += heads
        rows.sort(key=lambda row: row.queued_at)
        return rows

    def _enter(self, row: Row) -> None:
        self._waiting += 1
        self._steps[_kind(row)] += row.left
        self._bytes += row.size

    def _leave(self, row: Row) -> None:
        self._waiting -= 1
        self._steps[_kind(row)] -= row.left
        self._bytes -= row.size

    def _end(self, row: Row, error: ConveyorError) -> None:
        row.refuse(error)
        if row.track.waiting[0] is row:
            self._next(row)
        else:
            row.track.waiting.remove(row)

    def _next(self, row: Row) -> None:
        """Queue the row behind one that has ended."""
        waiting = row.track.waiting
        waiting.popleft()
        if waiting:
            self._queues[_kind(waiting[0])].push(waiting[0].caller, waiting[0])


def _kind(row: Row) -> Kind:
    return row.batch, row.priority


def _waits(row: Row) -> bool:
    return row.phase is Phase.QUEUED


def _unfit(row: Row, soon: float) -> ConveyorError | None:
    """Why a row is not to run, in a tick that ends no earlier than ``soon``."""
    # The position first: a chunk that was applied already must not be told that the state has not moved.
    if row.position != row.track.position:
        return PositionConflict(
            f"the chunk begins at position {row.position}, and the session is at {row.track.position}: "
            "an earlier chunk was not applied",
            row.track.position,
        )
    if row.deadline is not None and soon >= row.deadline:
        return _late()
    return None


def _late() -> Late:
    return Late("the deadline passed before the steps were applied; the state has not moved")


def _gone() -> Cancelled:
    return Cancelled("cancelled before the steps were applied; the state has not moved")
