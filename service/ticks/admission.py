"""How much work waits and runs, and whether more of it would be done in time: the account that admission goes by.

Owns the counts, the limits they are held against, and how careful experience has made it. Pure: the time is handed in.
Must not know in which order blocks run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.errors import Full, InvalidRequest
from service.ticks.pace import Pace
from service.ticks.row import PRIORITIES, Block, Kind

_CAUTION = 1.25
"""How much longer than expected the work ahead may take, at least, without making late what was accepted."""
_LESSON, _TRUST, _MOST_CAUTION = 1.05, 0.99, 2.5
"""By what caution grows with each tick in which something is late all the same, and shrinks with each in which all that
ends is in time; and its bound."""


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
        short_tick_s: how long a tick of batches may take while chunks come, and one of chunks while many single steps
            do.
        long_tick_s: how long either may take otherwise.
        delay_s: how long rows may wait for others to fill their tick. By default they do not: a tick takes what has
            come while the engine was busy.
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
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a row was refused that would not have been done in time.

    Attributes:
        kind: of its block.
        steps: of it.
        seconds: that it might have taken.
        text: what it was told.
    """

    kind: Kind
    steps: int
    seconds: float
    text: str


class Admission:
    """The account of one model version.

    Attributes:
        rows: how many wait.
        blocks: how many wait.
        efficient_rows: how many rows side by side are about as quick, step for step, as more would be.

    Args:
        limits: of its queue.
        pace: how long ticks take.
        efficient_rows: as it was measured with nothing else going on; what is learned later goes up and down too much.
        slice_s: tells how long a tick of chunks may take, now.
    """

    def __init__(self, limits: Limits, pace: Pace, efficient_rows: int, slice_s: Callable[[float], float]) -> None:
        self.rows = 0
        self.blocks = 0
        self.efficient_rows = efficient_rows
        # How many blocks wait that are not plain.
        self._others = 0
        self._slice_s = slice_s
        self._limits = limits
        self._pace = pace
        self._bytes = 0
        # Of the rows that wait, the steps that they have left; of those that run, what they have left after that.
        self._steps: dict[Kind, int] = {(batch, priority): 0 for batch in (False, True) for priority in PRIORITIES}
        self._waiting_steps = 0
        # The blocks that run, with the steps of their rows that do, those that are left then, and the rows; the sums of
        # the first and the last.
        self._running: dict[Block, tuple[int, int, int]] = {}
        self._running_steps = 0
        self._running_rows = 0
        self._caution = _CAUTION
        # The last of one row that was, as long as nothing has come, run, ended or been given up since.
        self._refusal: _Refusal | None = None
        # Whether anything has been late since ``learn`` was last called.
        self._late = False

    @property
    def plain(self) -> bool:
        """Whether all that waits is plain: nothing has to be thought about then."""
        return not self._others

    def check(self, blocks: Sequence[Block], now: float) -> None:
        """Refuse blocks for which there is no room, or no time.

        Args:
            blocks: of one kind.
            now: the time.

        Raises:
            InvalidRequest: if they would not fit into an empty queue.
            Full: if they do not fit now, or would not be done in time.
        """
        rows = size = steps = 0
        for block in blocks:
            rows += len(block.rows)
            size += block.size
            steps += len(block.rows) * block.steps
        self._check_room(rows, size)
        first = min((block.deadline for block in blocks if block.deadline is not None), default=None)
        # One step of one row after the other: mostly even that is quick enough, and there is nothing to think about.
        under_way = self._running_steps + self._waiting_steps
        longest = self._caution * (under_way + steps) * self._pace.slowest_s
        if longest <= self._limits.queued_s and (first is None or now + longest <= first):
            return
        if self.rows or self._running_steps:
            self._check_time(blocks, rows, steps, now)

    def _check_room(self, rows: int, size: int) -> None:
        limits = self._limits
        if rows > limits.queued_rows or size > limits.queued_bytes:
            raise InvalidRequest(
                f"{rows} rows of {size} bytes never fit: a model's queue holds up to {limits.queued_rows} rows "
                f"and {limits.queued_bytes} bytes; send fewer at a time"
            )
        if self.rows and self.rows + rows > limits.queued_rows:
            raise Full(
                f"{self.rows} rows are waiting for this model and {rows} more would pass the limit of "
                f"{limits.queued_rows}; try again later"
            )
        if self.rows and self._bytes + size > limits.queued_bytes:
            raise Full(
                f"{self._bytes} bytes of input are waiting for this model and {size} more would pass the limit of "
                f"{limits.queued_bytes}; try again later"
            )

    def _check_time(self, blocks: Sequence[Block], rows: int, steps: int, now: float) -> None:
        most, limit_s = self.efficient_rows, self._limits.queued_s
        before = self._running_steps + self._ahead(blocks[0].kind)
        under_way = self.rows + self._running_rows
        # What runs in slices takes longer than in one go.
        longest = self.slice_steps(most, self._slice_s(now))
        ahead = self._pace.work_s(under_way, before, most, longest)
        if ahead > limit_s:
            raise Full(
                f"{ahead:.1f} s of work are waiting for this model, which is over the limit of {limit_s:g} s; "
                "try again later"
            )
        work = self._pace.work_s(under_way + rows, before + steps, most, longest)
        each = self._pace.step_at_best_s(min(under_way + rows, most), 1)
        for block in blocks:
            # It takes part in as many ticks as it has steps at worst, and in each the others that run beside it do too.
            needed = max(work, block.steps * each)
            seconds = self._caution * needed
            if block.deadline is not None and now < block.deadline < now + seconds:
                text = (
                    f"with the work that is ahead of them these steps may take {seconds:.3f} s, and their deadline "
                    "comes sooner; the state has not moved, try again later"
                )
                if rows == 1:
                    self._refusal = _Refusal(block.kind, steps, seconds, text)
                raise Full(text)

    def refuses(self, kind: Kind, steps: int, deadline: float, now: float) -> Full | None:
        """Say at one glance that a row would not be done in time, if another has just been refused for that.

        Over capacity most are, and to think about each would leave less time for those that are not. But for the time
        nothing has changed since.

        Args:
            kind: of its block.
            steps: of it.
            deadline: of it.
            now: the time.

        Returns:
            What the other was told, if it holds for this one; None if that is to be found out.
        """
        last = self._refusal
        if last is None or last.kind != kind or steps < last.steps or not now < deadline < now + last.seconds:
            return None
        return Full(last.text)

    def slice_steps(self, rows: int, seconds: float) -> int:
        """Most steps of a tick of so many rows that is to take no longer."""
        return self._pace.steps_within(rows, seconds, max(1, self._limits.tick_steps // rows))

    def _ahead(self, kind: Kind) -> int:
        """Steps that run before a new block of a kind does."""
        batch, priority = kind
        ours = sum(self._steps[batch, other] for other in PRIORITIES if other <= priority)
        theirs = sum(self._steps[not batch, other] for other in PRIORITIES)
        # They take turns: what is ahead of chunks is at most as much of the batches again.
        return ours + (theirs if batch else min(ours, theirs))

    def enter(self, block: Block) -> None:
        """Count a block as one that waits."""
        rows = len(block.rows)
        steps = rows * (block.steps - block.done)
        # Also what comes may let others be done sooner: more of them run side by side.
        self._refusal = None
        self.blocks += 1
        self.rows += rows
        self._others += not block.plain
        self._waiting_steps += steps
        self._steps[block.kind] += steps
        self._bytes += block.size

    def leave(self, block: Block) -> None:
        """Count a block as one that waits no more."""
        rows = len(block.rows)
        steps = rows * (block.steps - block.done)
        self._refusal = None
        self.blocks -= 1
        self.rows -= rows
        self._others -= not block.plain
        self._waiting_steps -= steps
        self._steps[block.kind] -= steps
        self._bytes -= block.size

    def begin(self, block: Block, length: int) -> None:
        """Count a block that waited as one that runs, for so many steps; what it has left then still waits."""
        self.leave(block)
        rows = len(block.rows)
        running, rest = rows * length, rows * (block.left - length)
        self._running[block] = running, rest, rows
        self._running_steps += running
        self._running_rows += rows
        self._waiting_steps += rest
        self._steps[block.kind] += rest

    def stop(self, block: Block) -> None:
        """Count a block as one that runs no more."""
        running, rest, rows = self._running.pop(block, (0, 0, 0))
        self._refusal = None
        self._running_steps -= running
        self._running_rows -= rows
        self._waiting_steps -= rest
        self._steps[block.kind] -= rest

    def note_late(self) -> None:
        """Note that something accepted was not done in time."""
        self._late = True

    def learn(self, in_time: bool) -> None:
        """Be more careful from here on if anything was late, and less if it was not.

        Args:
            in_time: whether anything that had a deadline has met it.
        """
        self._refusal = None
        if self._late:
            self._caution = min(_MOST_CAUTION, self._caution * _LESSON)
        elif in_time:
            self._caution = max(_CAUTION, self._caution * _TRUST)
        self._late = False
