"""What a tick works on: tracks, rows, and where a row is in its life. Must not know queues, slots' contents or time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from enum import Enum, auto
from typing import Any

from service.errors import ConveyorError

FIRST, USUAL, LAST = PRIORITIES = (1, 2, 3)


class Track:
    """A line of steps that follow each other: a session, or one sequence of a batch.

    Attributes:
        slot: where its states live.
        position: how many steps have been applied.
        waiting: its rows that have not ended, in their order; only the first of them can run.
    """

    __slots__ = ("position", "slot", "waiting")

    def __init__(self, slot: int, position: int = 0) -> None:
        self.slot = slot
        self.position = position
        self.waiting: deque[Row] = deque()


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
        on_end: called once, by ``tell``, when the row has ended.
        priority: 1 first, 2 as usual, 3 last.
        caller: among whom the model's time is shared out evenly.
        batch: whether it is a sequence of a batch, and not a chunk of a session.
        queued_at: when it was submitted.
        done: how many steps have run, of a row that takes several ticks; its track has not moved.
        scratch: the slot with the states after them. It may be the track's own, where nobody needs those it had before.
        parts: the outputs of those steps.
        phase: where it is in its life.
        outputs: once applied, the arrays, one an output of the model.
        error: once refused, why.
        unwanted: whoever asked has gone.
    """

    __slots__ = (
        "batch",
        "caller",
        "deadline",
        "done",
        "error",
        "inputs",
        "on_end",
        "outputs",
        "parts",
        "phase",
        "position",
        "priority",
        "queued_at",
        "scratch",
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
        caller: Hashable = None,
        batch: bool = False,
    ) -> None:
        self.track = track
        self.position = position
        self.steps = steps
        self.inputs = inputs
        self.size: int = sum(array.nbytes for array in inputs)
        self.on_end = on_end
        self.deadline = deadline
        self.priority = priority
        self.caller = caller
        self.batch = batch
        self.queued_at = 0.0
        self.done = 0
        self.scratch: int | None = None
        self.parts: list[Sequence[Any]] = []
        self.phase = Phase.QUEUED
        self.outputs: Sequence[Any] | None = None
        self.error: ConveyorError | None = None
        self.unwanted = False

    def tell(self) -> None:
        """Call ``on_end``, and hold no longer what it does."""
        on_end, self.on_end = self.on_end, _told
        on_end(self)

    @property
    def left(self) -> int:
        """How many steps have not run."""
        return self.steps - self.done

    def refuse(self, error: ConveyorError) -> None:
        """End the row without applying it."""
        # A cancelled row may stay in its queue for a while: it must not hold memory that nobody counts any more.
        self.inputs = self.parts = []
        self.phase = Phase.REFUSED
        self.error = error


def _told(row: Row) -> None:
    pass
