"""What a tick works on: tracks, their rows, and blocks of rows that run side by side. Must not know queues or time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum, auto
from typing import Any, Protocol, TypeAlias

from service.errors import ConveyorError

Kind: TypeAlias = tuple[bool, int]
"""Of a batch or not, and of which priority."""
FIRST, USUAL, LAST = PRIORITIES = (1, 2, 3)


class Track:
    """A line of steps that follow each other: a session, or one sequence of a batch.

    Attributes:
        slot: where its states live.
        position: how many steps have been applied.
        waiting: the blocks with a row of it that have not ended, in their order; only the first of them can run.
    """

    __slots__ = ("position", "slot", "waiting")

    def __init__(self, slot: int, position: int = 0) -> None:
        self.slot = slot
        self.position = position
        # A list, though taken from at the front: hundreds of thousands of them are empty, and none is long.
        self.waiting: list[Block] = []


class Row:
    """One track's part in a block: steps that follow each other.

    Attributes:
        track: whose steps they are.
        position: where they begin.
        block: which the row is in, until its end has been told.
    """

    __slots__ = ("block", "position", "track")

    block: Block

    def __init__(self, track: Track, position: int) -> None:
        self.track = track
        self.position = position


class Together(Protocol):
    """What stands for the rows of a block one by one, as long as nobody needs them one by one."""

    @property
    def slots(self) -> Any:
        """Where their states live, [N]."""

    def spell_out(self) -> None:
        """Give each row and each track what is its own; from then on the block stands by itself."""


class Phase(Enum):
    """Where a block is in its life."""

    QUEUED = auto()
    RUNNING = auto()
    APPLIED = auto()
    REFUSED = auto()


class Block:
    """Rows of different tracks, all with as many steps, that have come together and end together.

    A row that has to end otherwise is moved into a block of its own before. A chunk is a block of one row, and so is a
    sequence of a batch.

    Attributes:
        rows: at least one.
        steps: of each row.
        inputs: the arrays [N, T, ...], one an input of the model, row n of ``rows[n]``; none once refused.
        size: bytes that they hold.
        on_end: called once, by ``tell``, when the block has ended; also of blocks that its rows were moved into.
        deadline: the time after which the block must not be applied; None for never.
        kind: whether the rows are sequences of a batch, not chunks of sessions; and the priority: 1 first, 2 as
            usual, 3 last.
        caller: among whom the model's time is shared out evenly.
        queued_at: when it was submitted.
        behind: how many of its rows stand behind another block of their track.
        done: how many steps have run, of a block that takes several ticks; its tracks have not moved.
        scratch: the slots with the states after them. They may be the tracks' own, where nobody needs those they had.
        parts: the outputs of those steps.
        phase: where it is in its life.
        with_states: whether the states that its rows end in are wanted.
        states: those, once applied: of each row the array of each state, without the batch axis.
        outputs: once applied, the arrays [N, T, ...] or, without time, [N, ...], one an output of the model.
        error: once refused, why.
        unwanted: rows whose askers have gone.
        cohort: what knows of the rows instead of them and their tracks, which are not to be looked at then; None for
            most blocks. It has one step.
    """

    __slots__ = (
        "behind",
        "caller",
        "cohort",
        "deadline",
        "done",
        "error",
        "inputs",
        "kind",
        "on_end",
        "outputs",
        "parts",
        "phase",
        "queued_at",
        "rows",
        "scratch",
        "size",
        "states",
        "steps",
        "unwanted",
        "with_states",
    )

    def __init__(
        self,
        rows: Sequence[Row],
        steps: int,
        inputs: Sequence[Any],
        on_end: Callable[[Block], None],
        deadline: float | None = None,
        priority: int = USUAL,
        caller: Hashable = None,
        batch: bool = False,
        cohort: Together | None = None,
    ) -> None:
        self.rows = list(rows)
        self.cohort = cohort
        if cohort is None:
            for row in rows:
                row.block = self
        self.steps = steps
        self.inputs = inputs
        self.size: int = sum([array.nbytes for array in inputs])
        self.on_end = on_end
        self.deadline = deadline
        self.kind: Kind = (batch, priority)
        self.caller = caller
        self.queued_at = 0.0
        self.behind = 0
        self.done = 0
        self.scratch: list[int] | None = None
        self.parts: list[Sequence[Any]] = []
        self.with_states = False
        self.states: Sequence[Any] = ()
        self.phase = Phase.QUEUED
        self.outputs: Sequence[Any] | None = None
        self.error: ConveyorError | None = None
        self.unwanted: set[Row] = set()

    @property
    def batch(self) -> bool:
        """Whether the rows are sequences of a batch."""
        return self.kind[0]

    @property
    def plain(self) -> bool:
        """Whether the rows are chunks of one step without a deadline."""
        return self.steps == 1 and self.deadline is None and not self.kind[0]

    def tell(self) -> None:
        """Call ``on_end``, and hold no longer what it does."""
        on_end, self.on_end = self.on_end, _told
        try:
            on_end(self)
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Part from the rows: in a circle with them it would hold inputs and model until the collector comes by."""
        if self.cohort is not None:
            self.cohort = None
            return
        for row in self.rows:
            row.block = PAST

    @property
    def left(self) -> int:
        """How many steps have not run."""
        return self.steps - self.done

    @property
    def slots(self) -> Sequence[int]:
        """Where the states are from which its next step goes on, of each row."""
        if self.scratch is not None:
            return self.scratch
        cohort = self.cohort
        slots: Sequence[int] = [row.track.slot for row in self.rows] if cohort is None else cohort.slots
        return slots

    def spell_out(self) -> None:
        """Stand by itself, so that its rows can be looked at."""
        if self.cohort is not None:
            self.cohort.spell_out()

    def split(self, moved: Sequence[int]) -> Block:
        """Move some rows, not all, into a block of their own, in the same phase.

        Args:
            moved: their indices, ascending.
        """
        self.spell_out()
        width = len(self.rows)
        kept = sorted(set(range(width)).difference(moved))
        which = [_index(moved), _index(kept)]
        other, mine = ([array[index] for array in self.inputs] for index in which)
        block = Block(
            [self.rows[n] for n in moved],
            self.steps,
            other,
            self.on_end,
            self.deadline,
            caller=self.caller,
        )
        block.kind, block.with_states = self.kind, self.with_states
        block.queued_at, block.done, block.phase = self.queued_at, self.done, self.phase
        block.parts = [[array[which[0]] for array in part] for part in self.parts]
        block.unwanted = self.unwanted.intersection(block.rows)
        self.rows = [self.rows[n] for n in kept]
        self.inputs = mine
        self.size -= block.size
        self.parts = [[array[which[1]] for array in part] for part in self.parts]
        self.unwanted -= block.unwanted
        if self.scratch is not None:
            block.scratch = [self.scratch[n] for n in moved]
            self.scratch = [self.scratch[n] for n in kept]
        # Both wait for the same, each in its own tracks' lines.
        for row in block.rows:
            waiting = row.track.waiting
            for place, one in enumerate(waiting):
                if one is self:
                    waiting[place] = block
        block.behind = sum(row.track.waiting[0] is not block for row in block.rows)
        self.behind -= block.behind
        return block

    def compact(self) -> None:
        """Hold no more than its own rows of the arrays that they came in."""
        self.inputs = [array.copy() for array in self.inputs]

    def refuse(self, error: ConveyorError) -> None:
        """End the block without applying it."""
        # A cancelled block may stay in its queue for a while: it must not hold memory that nobody counts any more.
        self.inputs = self.parts = []
        self.phase = Phase.REFUSED
        self.error = error


def _told(block: Block) -> None:
    pass


PAST = Block((), 0, (), _told)
"""Where the rows are that have ended, and whose end has been told."""
PAST.phase = Phase.REFUSED


def _index(rows: Sequence[int]) -> slice | Sequence[int]:
    """Rows to index an array with; those that stand side by side give a view."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return rows
