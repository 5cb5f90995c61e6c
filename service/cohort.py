"""Sessions that step together again and again: what they have in common is kept once, in arrays, not in each of them.

Owns what a session has while it is in one: position, newest reply, what is under way, when it was used. Must not
know what tensors hold, nor grpc. Lives on the event loop's thread; only ``spell_out``, under the scheduler's lock, is
for the engine's thread too, and only while a block is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.session import Pending, Reply, Session, Waiter
from service.ticks.cohort import Cohort
from service.ticks.row import Block

Array = NDArray[np.generic]


class Waiters(Protocol):
    """Whoever is to be told what became of the chunks of a block: of all at once, or of each."""

    def waiter(self, index: int) -> Waiter:
        """Whoever is to be told of one of them alone."""

    def answer_all(self, outputs: Sequence[Array]) -> None:
        """Take the answer of all: an array [N, ...] an output of the model."""


class SessionCohort(Cohort):
    """Sessions of one model, at rest when it is made.

    Attributes:
        sessions: they.
        pendings: their chunks under way, once it is over.
        used_at: when they were last stepped.
        kept: bytes of the replies that are kept for them.

    Args:
        sessions: of one model, none of them in a cohort.
        used_at: when they were last stepped.
        dissolve: calls ``spell_out`` under the lock.
        parted: called once when it is over, by whatever thread.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        used_at: float,
        dissolve: Callable[[Cohort], None],
        parted: Callable[[], object],
    ) -> None:
        # Nobody waits, as long as nobody needs to know who does.
        self.pendings = [Pending(session, session.position, None) for session in sessions]
        super().__init__(self.pendings)
        self.sessions = sessions
        self.used_at = used_at
        self._dissolve = dissolve
        self._parted = parted
        self._epochs = [session.epoch for session in sessions]
        self._lasts = [session.join(self) for session in sessions]
        self.kept = sum(last.size for last in self._lasts if last is not None)
        # Instead of those, once they have stepped: their newest replies side by side, and how many steps these have.
        self._outputs: Sequence[Array] = ()
        self._steps = 0
        self._waiters: Waiters | None = None

    def follows(self, positions: Any, epochs: Sequence[int]) -> bool:
        """Whether chunks are the next ones, with nothing else under way.

        Args:
            positions: where they begin, N integers.
            epochs: the lives that they are meant for, 0 for whichever there is; or none.
        """
        if self.block is not None or np.fromiter(positions, np.int64).tobytes() != self.positions.tobytes():
            return False
        if len(epochs) not in (0, len(self._epochs)):
            return False
        return all(epoch in (0, own) for epoch, own in zip(epochs, self._epochs, strict=False))

    def begin(self, block: Block, waiters: Waiters) -> None:
        """Have a block of its rows under way, whose end the waiters are to be told."""
        self.block, self._waiters = block, waiters

    def give_up(self) -> None:
        """Have none under way: it was not taken."""
        self.block = self._waiters = None

    def end(self, steps: int, outputs: Sequence[Array], now: float) -> Waiters:
        """Note a block that was applied as ended.

        Args:
            steps: of each chunk.
            outputs: an array [N, ...] an output of the model, which nobody else holds.
            now: the time.

        Returns:
            Whom to tell.
        """
        waiters, self.block, self._waiters = self._waiters, None, None
        assert waiters is not None
        self.positions += steps
        self.used_at = now
        self._lasts, self._outputs, self._steps = [], outputs, steps
        self.kept = sum(output.nbytes for output in outputs)
        return waiters

    def dissolve(self) -> None:
        """Be over, from the event loop's thread."""
        self._dissolve(self)

    def to_each(self) -> None:
        """Give each session what is its own."""
        under_way, waiters = self.block is not None, self._waiters
        lasts = self._lasts or self._replies()
        own = zip(self.pendings, self.positions.tolist(), lasts, strict=True)
        for n, (pending, position, last) in enumerate(own):
            if under_way and waiters is not None:
                pending.waiters = {waiters.waiter(n): None}
            pending.session.have(position, self.used_at, last, pending if under_way else None)
        self._parted()

    def _replies(self) -> list[Reply]:
        """The newest replies, one by one, each with arrays of its own, so that keeping one does not keep them all."""
        size = sum(output.nbytes for output in self._outputs) // len(self.sessions)
        return [
            Reply(position - self._steps, self._steps, [output[n].copy() for output in self._outputs], size)
            for n, position in enumerate(self.positions.tolist())
        ]
