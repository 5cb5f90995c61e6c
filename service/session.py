"""One session: what a chunk means to it, and what it keeps.

Owns position, order, epoch, the newest reply, and who waits for what is under way. Must not know what tensors hold, nor
grpc or onnxruntime. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.errors import (
    ConveyorError,
    EpochConflict,
    PositionConflict,
    SessionUnknown,
    Unavailable,
)
from service.row import Row, Track


@dataclass(frozen=True, slots=True)
class Reply:
    """What a chunk was answered, kept until the next one is."""

    position: int
    steps: int
    outputs: Sequence[Any]

    @property
    def size(self) -> int:
        """Bytes that the outputs hold."""
        return sum(output.nbytes for output in self.outputs)

    def answers(self, row: Row) -> bool:
        """Whether this is what a row was or would be answered."""
        return (self.position, self.steps) == (row.position, row.steps)


def new_epoch() -> int:
    """Draw an epoch: not 0, and fit for a signed field of 64 bits."""
    return secrets.randbits(63) or 1


class Home(Protocol):
    """The model version that a session runs on, for as long as it lives."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def version(self) -> int:
        """Of it."""


class Waiter(Protocol):
    """Whoever is to be told what became of a chunk."""

    def answer(self, result: Reply | ConveyorError) -> None:
        """Take the answer; called once."""


@dataclass(slots=True)
class Pending:
    """A chunk under way, and who waits for it: more than one where it was sent again meanwhile."""

    row: Row
    waiters: list[Waiter]


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a chunk, and who is to be told."""

    waiters: Sequence[Waiter]
    result: Reply | ConveyorError

    def tell(self) -> None:
        """Tell them, once each."""
        for waiter in self.waiters:
            waiter.answer(self.result)


class Session:
    """A live sequence whose state the server holds.

    Attributes:
        owner: digest of the key that it was opened with; empty for none.
        identity: its id, unique to the owner.
        home: the model version that it was opened on and stays on.
        epoch: tells this life from others under the same id; drawn anew by a reset.
        track: its slot, and where the engine's thread has it.
        position: how many steps have been applied, as far as this thread has been told.
        pending: chunks accepted and not yet ended, by the position where they begin.
        orphans: rows that run for nobody: all who waited for them have gone.
        last: the newest reply.
        used_at: when it was opened or last stepped.
        closing: how many wait for it to be at rest to close it.
        guests: how many wait for it to be at rest to look at it or change it.
    """

    __slots__ = (
        "_idle",
        "closing",
        "epoch",
        "guests",
        "home",
        "identity",
        "last",
        "orphans",
        "owner",
        "pending",
        "position",
        "track",
        "used_at",
    )

    def __init__(self, owner: bytes, identity: str, home: Home, track: Track, now: float) -> None:
        self.owner = owner
        self.identity = identity
        self.home = home
        self.epoch = new_epoch()
        self.track = track
        self.position = track.position
        self.pending: dict[int, Pending] = {}
        self.orphans: set[Row] = set()
        self.last: Reply | None = None
        self.used_at = now
        self.closing = 0
        self.guests = 0
        self._idle: asyncio.Future[None] | None = None

    def match(self, epoch: int, position: int, steps: int) -> Reply | Pending | None:
        """Tell what a chunk is to this session.

        Args:
            epoch: the life that it is meant for; 0 for whichever there is.
            position: where it begins.
            steps: how many steps it has.

        Returns:
            The reply that it got, if it has been applied and was the last; what is pending, if it is under way; None if
            it is the next.

        Raises:
            EpochConflict: if it is meant for another life of the session.
            PositionConflict: if it is none of them.
            Unavailable: if somebody waits for the session to be at rest.
            SessionUnknown: if the session is being closed.
        """
        if self.closing:
            raise SessionUnknown(f"session {self.identity!r} is being closed")
        self.check_epoch(epoch)
        upcoming = self.position
        if self.pending:
            newest = next(reversed(self.pending.values())).row
            upcoming = newest.position + newest.steps
            pending = self.pending.get(position)
            if pending is not None and pending.row.steps == steps:
                return pending
        if position == upcoming:
            if self.guests:
                raise Unavailable(f"session {self.identity!r} is being exported, forked or reset; send the chunk again")
            return None
        last = self.last
        if last is not None and (last.position, last.steps) == (position, steps):
            return last
        accepted = f", with chunks accepted up to {upcoming}" if self.pending else ""
        raise PositionConflict(
            f"a chunk of {steps} steps at position {position} does not follow: "
            f"the session is at position {self.position}{accepted}",
            self.position,
        )

    def check_epoch(self, epoch: int) -> None:
        """Refuse what is meant for another life.

        Raises:
            EpochConflict: if ``epoch`` is neither 0 nor the session's.
        """
        if epoch not in (0, self.epoch):
            raise EpochConflict(
                f"epoch {epoch} of session {self.identity!r} is over: it was reset, or opened anew, since; "
                f"now it is in epoch {self.epoch}, at position {self.position}"
            )

    def begin(self, row: Row, waiter: Waiter) -> Pending:
        """Note a chunk as under way."""
        pending = self.pending[row.position] = Pending(row, [waiter])
        return pending

    def orphan(self, pending: Pending) -> None:
        """Forget who waited for a chunk that cannot be taken out of its run any more.

        Should the chunk come again, it is queued behind that run, which tells by the position whether it still is to be
        applied: ``end`` turns its conflict into the reply if not.
        """
        del self.pending[pending.row.position]
        self.orphans.add(pending.row)

    def end(self, row: Row) -> Told:
        """Note a row as ended, and keep its reply if it was applied.

        Returns:
            Whom to tell what, once all that hangs on the end has been done.
        """
        result: Reply | ConveyorError
        if row.outputs is not None:
            self.position = row.position + row.steps
            result = self.last = Reply(row.position, row.steps, row.outputs)
        else:
            assert row.error is not None
            result = row.error
            if isinstance(result, PositionConflict) and self.last is not None and self.last.answers(row):
                result = self.last
        waiters: Sequence[Waiter] = ()
        if row in self.orphans:
            self.orphans.discard(row)
        else:
            pending = self.pending.pop(row.position)
            # Each waiter knows what it waits for: in a circle they would hold the model until the collector comes by.
            waiters, pending.waiters = pending.waiters, []
        if self.at_rest and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None
        return Told(waiters, result)

    @property
    def at_rest(self) -> bool:
        """Whether nothing of the session is under way."""
        return not self.pending and not self.orphans

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while not self.at_rest:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)
