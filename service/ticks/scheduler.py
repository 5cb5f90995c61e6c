"""Which blocks of rows run together, for how many steps, and what becomes of each: the queue, ticks, their ends.

Owns the queue of one model version. Pure: no I/O, no threads, no arrays looked into, and the time is handed in; whoever
shares a scheduler between threads holds one lock around each call. Must not know grpc, onnxruntime, or what a session
is.

The life of a block: ``submit`` queues it or refuses it, ``cut`` takes it or a slice of it into a tick, ``seal`` ends
the tick after its run, and ``resume`` puts blocks that have steps left back in front. A block is applied only in
``seal``, after its last step, and only if nobody has cancelled it and its deadline has not passed; that moment is the
one in which the positions of its tracks move. Rows that have to end otherwise than the rest of their block are split
off first.

Who is next: chunks and batches take turns while both wait, so that neither waits behind more than one tick of the
other. While chunks come ticks of batches are short, and those of longer chunks the shorter the more single steps come.
Within each, callers share the steps evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import Cancelled, ConveyorError, Full, Late, PositionConflict
from service.ticks.admission import Admission, Limits
from service.ticks.fair import Fair
from service.ticks.pace import BESIDE_S, Pace
from service.ticks.rate import Rate
from service.ticks.row import PRIORITIES, Block, Kind, Phase, Row
from service.ticks.shape import choose, choose_whole

_PATIENCE = 7
"""How many ticks in a row a priority lets higher ones lead."""
_LIVELY_S = 1.0
"""How long after the last chunk ticks of batches stay short; and for how long about a single step counts as recent."""
_DEAR = 10.0
"""As dear as how many seconds of the engine it is that a single step waits for one second."""
_STALE = 64
"""How many blocks that were given up may stand in a queue beyond those that wait."""


@dataclass(slots=True)
class Tick:
    """Blocks that run together.

    Attributes:
        blocks: each once.
        lengths: how many of its steps each runs, from ``block.done`` on.
    """

    blocks: list[Block]
    lengths: list[int]

    @property
    def steps(self) -> int:
        """Of the longest."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """How many rows run side by side."""
        return sum(len(block.rows) for block in self.blocks)

    @property
    def cells(self) -> int:
        """Steps of all rows, without padding."""
        return sum(len(block.rows) * length for block, length in zip(self.blocks, self.lengths, strict=True))


@dataclass(slots=True)
class Sealed:
    """What a run has come to, by the blocks' indices in their tick.

    Attributes:
        applied: ended well; their states are those of their tracks from now on.
        advanced: have steps left. Their states are to be kept for the next slice, and they to be resumed then.
        kept: of blocks that some rows were split off, which of the rows that have run are left.
        gone: the blocks of those rows; they were refused.
    """

    applied: list[int]
    advanced: list[int]
    kept: dict[int, list[int]]
    gone: list[Block]


@dataclass(slots=True)
class _Measure:
    """By what a tick is measured while it is cut.

    Attributes:
        most: rows that it may have, if it has some of batches.
        rows: how many it is expected to have.
        seconds: how long it may take.
        slice_steps: most steps of it.
    """

    most: int
    rows: int
    seconds: float
    slice_steps: int


class Scheduler:
    """The queue of one model version."""

    def __init__(self, limits: Limits, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self._limits = limits
        efficient_rows = limits.tick_rows if pace is None else pace.efficient_rows(limits.tick_rows)
        self._admission = Admission(limits, self.pace, efficient_rows, self._slice_s)
        self._singles = Rate(_LIVELY_S)
        kinds = [(batch, priority) for batch in (False, True) for priority in PRIORITIES]
        self._queues: dict[Kind, Fair[Block]] = {kind: Fair() for kind in kinds}
        # Blocks that were given up and still stand in the queue.
        self._stale = dict.fromkeys(kinds, 0)
        self._patience = dict.fromkeys(kinds, _PATIENCE)
        self._batch_led = True
        self._lively_until = float("-inf")
        # When those came that have not been passed over by a tick, and till when they may wait for others.
        self._first_at = float("-inf")
        self._due = float("inf")
        # Those that were refused since the last tick was cut, and have not been handed out.
        self._refused: list[Block] = []

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._admission.rows

    def submit(self, blocks: Sequence[Block], now: float = 0.0) -> None:
        """Queue blocks: all of them or, over a limit, none.

        Args:
            blocks: in the order in which they are to run, as far as they have rows of one track; of one kind.
            now: the time.

        Raises:
            InvalidRequest: if they would not fit into an empty queue.
            Full: if they do not fit now, or would not be done in time.
        """
        self._admission.check(blocks, now)
        if not self.queued:
            self._first_at = now
        for block in blocks:
            block.queued_at = now
            if block.deadline is not None:
                # It needs some of its time to run.
                self._due = min(self._due, now + (block.deadline - now) / 2)
            self._admission.enter(block)
            behind = 0
            # Those of a cohort are at rest: it stands for them.
            for row in block.rows if block.cohort is None else ():
                waiting = row.track.waiting
                behind += bool(waiting)
                waiting.append(block)
            block.behind = behind
            # Others come into the queue when their turn is near: when each of their rows is the first of its track.
            if not behind:
                self._queues[block.kind].push(block.caller, block)
            if not block.batch:
                self._lively_until = now + _LIVELY_S
                if block.steps == 1:
                    self._singles.note(len(block.rows), now)

    def refuses(self, kind: Kind, steps: int, deadline: float, now: float) -> Full | None:
        """Say why a block of one row would be refused, if that can be told at one glance; see ``Admission.refuses``."""
        return self._admission.refuses(kind, steps, deadline, now)

    def cancel(self, rows: Sequence[Row]) -> list[Block]:
        """Give rows up; those that run are not applied when their tick is sealed.

        Returns:
            Blocks of those that have ended by this; of others the end is still to come, or past.
        """
        of_block: dict[Block, list[Row]] = {}
        for row in rows:
            of_block.setdefault(row.block, []).append(row)
        ended = []
        for block, gone in of_block.items():
            if block.phase is Phase.RUNNING:
                block.unwanted.update(gone)
            elif block.phase is not Phase.QUEUED:
                continue
            elif len(gone) == len(block.rows):
                self._drop(block, _gone())
                ended.append(block)
            else:
                ended.append(self._refuse_rows(block, gone, _gone()))
        return ended

    def _drop(self, block: Block, error: ConveyorError) -> None:
        """Refuse a block that waits."""
        in_queue = not block.behind
        self._admission.leave(block)
        self._end(block, error)
        if in_queue:
            self._let_go(block.kind)

    def _refuse_rows(self, block: Block, rows: Sequence[Row], error: ConveyorError) -> Block:
        """Refuse some rows of a block that waits, and return them in a block of their own."""
        behind = block.behind
        part = self._part(block, rows)
        block.compact()
        self._admission.leave(part)
        if behind and not block.behind:
            self._queues[block.kind].push(block.caller, block)
        self._end(part, error)
        return part

    def _let_go(self, kind: Kind) -> None:
        """Take blocks that were given up out of their queue, once they are many: each alone would cost its length."""
        self._stale[kind] += 1
        queue = self._queues[kind]
        if len(queue) > 2 * (len(queue) - self._stale[kind]) + _STALE:
            queue.keep(_waits)
            self._stale[kind] = 0

    def delay_s(self, now: float) -> float:
        """How long to wait before the next cut, so that others may come: 0 where the tick is full or time is up."""
        if not self._limits.delay_s or self.queued >= self._limits.tick_rows:
            return 0.0
        return max(0.0, min(self._first_at + self._limits.delay_s, self._due) - now)

    def cut(self, now: float) -> tuple[Tick | None, list[Block]]:
        """Take the blocks of the next tick.

        Returns:
            The tick, if any block can run now, and the blocks that were refused because they are late, unwanted or
            their tracks are not where they begin.
        """
        blocks: list[Block] = []
        rests: list[Block] = []
        try:
            tick = self._take_tick(now, blocks, rests)
        except Exception:
            # What was taken waits again, and those that were refused are handed out with what is cleared.
            for block in reversed(blocks + rests):
                if _waits(block):
                    self._queues[block.kind].put_back(block.caller, block)
            raise
        refused, self._refused = self._refused, []
        return tick, refused

    def _take_tick(self, now: float, blocks: list[Block], rests: list[Block]) -> Tick | None:
        """Take blocks from their queues, and the rests of those that are too wide, into lists; make a tick of them."""
        limits = self._limits
        waiting = [kind for kind, queue in self._queues.items() if queue]
        if not waiting:
            return None
        lead = self._lead(waiting)
        if self._admission.plain and len(waiting) == 1 and self.queued <= min(limits.tick_rows, limits.tick_steps):
            lengths = self._take_all(lead, now, blocks)
        else:
            lengths = self._take_some(waiting, lead, now, blocks, rests)
        for kind in waiting:
            if kind[0] == lead[0]:
                self._patience[kind] = _PATIENCE if kind == lead else self._patience[kind] - 1
        self._batch_led = lead[0]
        self._first_at = now - limits.delay_s
        self._due = float("inf")
        if not blocks:
            return None
        tick = Tick(list(blocks), lengths)
        for block, length in zip(tick.blocks, lengths, strict=True):
            self._admission.begin(block, length)
            block.phase = Phase.RUNNING
        return tick

    def _take_all(self, kind: Kind, now: float, blocks: list[Block]) -> list[int]:
        """Take everything, where it is chunks of one step without deadlines, as mostly it is; return the lengths."""
        queue = self._queues[kind]
        self._stale[kind] = 0
        # What stands behind a block that is refused comes into the queue meanwhile.
        while queue:
            looked_at = len(blocks)
            blocks += queue.drain()
            blocks[looked_at:] = [
                block
                for block in blocks[looked_at:]
                if _waits(block) and (not (block.unwanted or _out_of_place(block)) or self._fit(block, now, now))
            ]
        return [1] * len(blocks)

    def _take_some(
        self, waiting: Sequence[Kind], lead: Kind, now: float, blocks: list[Block], rests: list[Block]
    ) -> list[int]:
        """Take what belongs into one tick; return the lengths."""
        limits = self._limits
        order = waiting if len(waiting) == 1 else sorted(waiting, key=lambda kind: (kind != lead, kind[0] != lead[0]))
        lengths: list[int] = []
        taken = longest = 0
        efficient_rows = self._admission.efficient_rows
        measured: _Measure | None = None

        def measure() -> _Measure:
            # Mostly nobody asks: chunks of one step without a deadline, and no batches.
            nonlocal measured
            if measured is None:
                measured = self._measure(lead, now)
            return measured

        def length_of(block: Block) -> int:
            if not limits.sliced or block.left == 1:
                return block.left
            most = measure().slice_steps
            # A rest that is that small would cost a tick of its own. Of batches the rests are cut where others are.
            if not block.batch and max(measure().rows, len(block.rows)) * block.left <= limits.tick_steps:
                most += most // 4
            return block.left if block.left <= most else measure().slice_steps

        def give(block: Block, room: int) -> tuple[int, int] | None:
            nonlocal taken, longest
            if not _waits(block):
                self._stale[block.kind] -= 1
                return 0, 0
            width = len(block.rows)
            if blocks:
                # Before anything is looked up about it: many may be offered in vain.
                rows = taken + width
                # Chunks that take several ticks: more at a time would not be done sooner, and the first of them later.
                if rows > efficient_rows and block.left > 1 and not block.batch and limits.sliced:
                    return None
                length = length_of(block)
                # It may fill a tick of others, but not change its length much, nor make it take longer than it may.
                if block.kind != lead and not lengths[0] <= length <= 2 * lengths[0]:
                    return None
                together = max(length, longest)
                if block.batch != lead[0] and together * self.pace.step_s(rows, together) > measure().seconds:
                    return None
                if (limits.sliced or block.kind != lead) and rows * max(length, longest) > limits.tick_steps:
                    return None
            # The first one is judged by the time it is, not by what is expected of it: were that far too much, nothing
            # would run any more, and so nothing be learned.
            soon = now
            if blocks and block.deadline is not None:
                soon += block.left * self.pace.step_at_best_s(taken + width, length)
            if not self._fit(block, now, soon):
                return 0, 0
            width = len(block.rows)
            if not blocks and limits.sliced and block.left > 1 and min(width, room) > measure().rows:
                # What stands in front is not looked at before it is taken, and this is wider than the others.
                measure().slice_steps = self._admission.slice_steps(min(width, room), measure().seconds)
            length = length_of(block)
            if width > room:
                if blocks:
                    return None
                rests.append(self._part(block, block.rows[room:]))
            blocks.append(block)
            lengths.append(length)
            taken += len(block.rows)
            longest = max(longest, length)
            return len(block.rows), len(block.rows) * length

        for kind in order:
            # Chunks that wait run together, however many they are; batches must not keep new ones waiting.
            room = measure().most if kind[0] or lead[0] else limits.tick_rows
            if taken < room:
                self._queues[kind].take(give, room - taken)
        while rests:
            rest = rests.pop()
            self._queues[rest.kind].put_back(rest.caller, rest)
        if not blocks:
            return []
        steps, chosen = self._choose(blocks, lengths)
        if len(chosen) < len(blocks):
            kept = set(chosen)
            for index in reversed(range(len(blocks))):
                if index not in kept:
                    block = blocks[index]
                    self._queues[block.kind].put_back(block.caller, block, len(block.rows) * lengths[index])
        blocks[:] = [blocks[index] for index in chosen]
        return [min(lengths[index], steps) for index in chosen]

    def _fit(self, block: Block, now: float, soon: float) -> bool:
        """Refuse a block, or rows of it, that are not to run.

        Args:
            block: that waits.
            now: the time.
            soon: when it is expected to have run to its end, if it does from now on.

        Returns:
            Whether any of it is to run.
        """
        # The position first: a chunk that was applied already must not be told that the state has not moved.
        if conflicts := _out_of_place(block):
            part = block if len(conflicts) == len(block.rows) else self._part(block, conflicts)
            self._admission.leave(part)
            # Not needed any more, and to split them would take long.
            part.inputs = part.parts = []
            self._refuse_out_of_place(part)
            if part is block:
                return False
        if block.deadline is not None and soon >= block.deadline:
            # What came too late says nothing of how long the work takes.
            if block.deadline > block.queued_at:
                self._admission.note_late()
            self._refused.append(self._take_out(block, block.rows, _late() if now >= block.deadline else _too_late()))
        elif block.unwanted:
            self._refused.append(self._take_out(block, list(block.unwanted), _gone()))
        return _waits(block)

    def _refuse_out_of_place(self, block: Block) -> None:
        """Refuse rows that do not begin where their tracks are, each told where that is."""
        places = sorted({_place(row) for row in block.rows})
        if len(places) > 1:
            # In halves: one after the other would take too long where there are a thousand.
            middle = places[len(places) // 2]
            part = block.split([index for index, row in enumerate(block.rows) if _place(row) >= middle])
            self._refuse_out_of_place(block)
            self._refuse_out_of_place(part)
            return
        self._end(block, _conflict(block.rows[0]))
        self._refused.append(block)

    def _take_out(self, block: Block, rows: Sequence[Row], error: ConveyorError) -> Block:
        """Refuse rows of a block that has been taken from its queue; return their block."""
        if len(rows) < len(block.rows):
            return self._refuse_rows(block, rows, error)
        self._admission.leave(block)
        self._end(block, error)
        return block

    def _part(self, block: Block, rows: Sequence[Row]) -> Block:
        """Move some rows of a block that waits into a block of their own, and count both."""
        self._admission.leave(block)
        part = block.split(_places(block, rows))
        self._admission.enter(block)
        self._admission.enter(part)
        return part

    def _choose(self, blocks: Sequence[Block], lengths: Sequence[int]) -> tuple[int, list[int]]:
        """The steps of a tick, and which blocks are in it."""
        limits = self._limits
        widths = [len(block.rows) for block in blocks]
        if not limits.sliced:
            return max(lengths), choose_whole(lengths, widths, limits.tick_steps, limits.ragged)
        return choose(lengths, widths, lambda rows, steps: steps * self.pace.step_s(rows, steps), limits.ragged)

    def _lead(self, waiting: Sequence[Kind]) -> Kind:
        """Whose tick the next one is."""
        if len(waiting) == 1:
            return waiting[0]
        turn = [kind for kind in waiting if kind[0] is not self._batch_led] or waiting
        return next((kind for kind in reversed(turn) if self._patience[kind] <= 0), turn[0])

    def _measure(self, lead: Kind, now: float) -> _Measure:
        """Tell how large a tick may be."""
        limits, pace = self._limits, self.pace
        lively = now < self._lively_until
        seconds = limits.short_tick_s if lively else limits.long_tick_s
        most = pace.rows_within(seconds, limits.tick_rows) if lively else limits.tick_rows
        # As many as its blocks have on average; those at the front are not looked at before they are taken.
        ready = len(self._queues[lead]) * self.queued // max(1, self._admission.blocks)
        rows = max(1, min(ready, most if lead[0] else limits.tick_rows))
        if not lead[0]:
            seconds = self._slice_s(now)
            if len(self._queues[lead]) > self._admission.efficient_rows:
                # They are done one after the other in any case, and the first of them sooner.
                rows = min(rows, self._admission.efficient_rows)
        steps = self._admission.slice_steps(rows, seconds)
        return _Measure(most, rows, seconds, steps)

    def _slice_s(self, now: float) -> float:
        """How long a tick of chunks may take.

        Chunks of several steps take longer than a short one themselves, and cut into short slices all of them are done
        later. Single steps wait for half a tick on average: of those that come in a second, at this rate, each second
        costs ``_DEAR * rate * tick / 2``, and beginning ticks costs ``BESIDE_S / tick``. The sum is least here.
        """
        limits, rate = self._limits, self._singles.per_s(now)
        if _DEAR * rate * limits.long_tick_s**2 <= 2 * BESIDE_S:
            return limits.long_tick_s
        seconds = math.sqrt(2 * BESIDE_S / (_DEAR * rate))
        # Few lengths, so that what is known of one is asked for again.
        return max(limits.short_tick_s, min(limits.long_tick_s, 2 ** (round(2 * math.log2(seconds)) / 2)))

    def seal(self, tick: Tick, now: float) -> Sealed:
        """End a tick whose run succeeded: the one moment in which positions move.

        Returns:
            Which blocks have ended well and which go on; the others were refused, and their states are thrown away.
        """
        sealed = Sealed([], [], {}, [])
        in_time = False
        for index, block in enumerate(tick.blocks):
            if block.unwanted:
                if len(block.unwanted) == len(block.rows):
                    self._admission.stop(block)
                    self._end(block, _gone())
                    continue
                places = _places(block, block.unwanted)
                sealed.kept[index] = sorted(set(range(len(block.rows))).difference(places))
                part = block.split(places)
                self._end(part, _gone())
                sealed.gone.append(part)
            if block.deadline is not None and now >= block.deadline:
                self._admission.stop(block)
                self._admission.note_late()
                self._end(block, _late())
            elif block.left > tick.lengths[index]:
                sealed.advanced.append(index)
            else:
                self._admission.stop(block)
                in_time |= block.deadline is not None
                block.phase = Phase.APPLIED
                if block.cohort is None:
                    for row in block.rows:
                        row.track.position = row.position + block.steps
                self._next(block)
                sealed.applied.append(index)
        self._admission.learn(in_time)
        return sealed

    def resume(self, tick: Tick, sealed: Sealed) -> list[Block]:
        """Let the blocks that have steps left wait for their next slice; until this they cannot be taken out.

        Returns:
            Those blocks.
        """
        # From the last to the first, so that they stand in front in their old order.
        for index in reversed(sealed.advanced):
            block = tick.blocks[index]
            self._admission.stop(block)
            block.done += tick.lengths[index]
            block.phase = Phase.QUEUED
            self._admission.enter(block)
            self._queues[block.kind].put_back(block.caller, block)
        return [tick.blocks[index] for index in sealed.advanced]

    def halve(self, tick: Tick) -> tuple[Tick, Tick]:
        """The rows of a tick of several, in two ticks."""
        middle = len(tick.blocks) // 2
        if middle:
            return (
                Tick(tick.blocks[:middle], tick.lengths[:middle]),
                Tick(tick.blocks[middle:], tick.lengths[middle:]),
            )
        (block,) = tick.blocks
        part = block.split(range(len(block.rows) // 2, len(block.rows)))
        return Tick([block], tick.lengths), Tick([part], tick.lengths)

    def fail(self, blocks: Sequence[Block], error: ConveyorError) -> None:
        """End blocks of a tick whose run failed."""
        for block in blocks:
            self._admission.stop(block)
            self._end(block, error)

    def clear(self, error: ConveyorError) -> list[Block]:
        """Refuse every block that still waits, and return them, with those that a cut that failed had refused."""
        blocks, self._refused = self._refused, []
        while heads := [block for queue in self._queues.values() for block in queue.drain() if _waits(block)]:
            self._stale = dict.fromkeys(self._stale, 0)
            for block in heads:
                self._admission.leave(block)
                self._end(block, error)
            blocks += heads
        blocks.sort(key=lambda block: block.queued_at)
        return blocks

    def _end(self, block: Block, error: ConveyorError) -> None:
        block.refuse(error)
        self._next(block)

    def _next(self, block: Block) -> None:
        """Queue what stood behind a block that has ended, and behind no other."""
        for row in block.rows if block.cohort is None else ():
            waiting = row.track.waiting
            if waiting[0] is not block:
                waiting.remove(block)
                continue
            del waiting[0]
            if waiting:
                after = waiting[0]
                after.behind -= 1
                if not after.behind:
                    self._queues[after.kind].push(after.caller, after)


def _out_of_place(block: Block) -> list[Row]:
    """The rows of a block that do not begin where their tracks are; those of a cohort do."""
    return [row for row in block.rows if row.position != row.track.position] if block.cohort is None else []


def _place(row: Row) -> tuple[int, int]:
    """Where a row begins, and where its track is."""
    return row.position, row.track.position


def _places(block: Block, rows: Sequence[Row] | set[Row]) -> list[int]:
    """Where rows stand in their block, ascending."""
    wanted = set(rows)
    return [index for index, row in enumerate(block.rows) if row in wanted]


def _waits(block: Block) -> bool:
    return block.phase is Phase.QUEUED


def _conflict(row: Row) -> PositionConflict:
    return PositionConflict(
        f"the chunk begins at position {row.position}, and the session is at {row.track.position}: "
        "an earlier chunk was not applied",
        row.track.position,
    )


def _late() -> Late:
    return Late("the deadline passed before the steps were applied; the state has not moved")


def _too_late() -> Late:
    return Late("the deadline comes before the steps could be applied; the state has not moved")


def _gone() -> Cancelled:
    return Cancelled("cancelled before the steps were applied; the state has not moved")
