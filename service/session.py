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
from service.ticks.row import Row, Track


@dataclass(slots=True)
class Reply:
    """What a chunk was answered, kept until the next one is.

    Attributes:
        position: where the chunk began.
        steps: how many it had.
        outputs: the arrays [T, ...] or, without time, [...], one an output of the model.
        size: bytes that they hold.
    """

    position: int
    steps: int
    outputs: Sequence[Any]
    size: int

    def answers(self, position: int, steps: int) -> bool:
        """Whether this is what a chunk was or would be answered."""
        return self.position == position and self.steps == steps


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


class Shared(Protocol):
    """Sessions that step together, and what they have in common as long as they do."""

    @property
    def used_at(self) -> float:
        """When they were last stepped."""

    def dissolve(self) -> None:
        """Give each session what is its own."""


class Waiter(Protocol):
    """Whoever is to be told what became of a chunk."""

    def answer(self, result: Reply | ConveyorError) -> None:
        """Take the answer; called once."""


class Pending(Row):
    """A chunk under way, and who waits for it: more than one where it was sent again meanwhile."""

    __slots__ = ("session", "waiters")

    def __init__(self, session: Session, position: int, waiter: Waiter | None) -> None:
        self.track = session.track
        self.position = position
        self.session = session
        self.waiters: dict[Waiter, None] = {} if waiter is None else {waiter: None}


class Session:
    """A live sequence whose state the server holds.

    Attributes:
        owner: digest of the key that it was opened with; empty for none.
        identity: its id, unique to the owner.
        home: the model version that it was opened on and stays on.
        epoch: tells this life from others under the same id; drawn anew by a reset.
        track: its slot, and where the engine's thread has it.
        orphans: chunks that run for nobody: all who waited for them have gone.
        closing: how many wait for it to be at rest to close it.
        guests: how many wait for it to be at rest to look at it or change it.
        noted_at: by which the table keeps its order; its last use may be later.
        cohort: those with which it steps, if they step together: then what is its own stands there, and whoever asks
            for it parts them.
        stepped_with: tells with which others it was stepped last, by a number.
    """

    __slots__ = (
        "_idle",
        "_last",
        "_pending",
        "_position",
        "_used_at",
        "closing",
        "cohort",
        "epoch",
        "guests",
        "home",
        "identity",
        "noted_at",
        "orphans",
        "owner",
        "stepped_with",
        "track",
    )

    def __init__(self, owner: bytes, identity: str, home: Home, track: Track, now: float) -> None:
        self.owner = owner
        self.identity = identity
        self.home = home
        self.epoch = new_epoch()
        self.track = track
        self.orphans: list[Pending] = []
        self.closing = 0
        self.guests = 0
        self.noted_at = now
        self.cohort: Shared | None = None
        self.stepped_with = 0
        self._position = track.position
        self._pending: dict[int, Pending] = {}
        self._last: Reply | None = None
        self._used_at = now
        self._idle: asyncio.Future[None] | None = None

    @property
    def position(self) -> int:
        """How many steps have been applied, as far as this thread has been told."""
        self.part()
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self.part()
        self._position = position

    @property
    def pending(self) -> dict[int, Pending]:
        """Chunks accepted and not yet ended, by the position where they begin."""
        self.part()
        return self._pending

    @property
    def last(self) -> Reply | None:
        """The newest reply."""
        self.part()
        return self._last

    @last.setter
    def last(self, reply: Reply | None) -> None:
        self.part()
        self._last = reply

    @property
    def used_at(self) -> float:
        """When it was opened or last stepped."""
        cohort = self.cohort
        return self._used_at if cohort is None else cohort.used_at

    @used_at.setter
    def used_at(self, used_at: float) -> None:
        self.part()
        self._used_at = used_at

    def part(self) -> None:
        """Have what is its own, if it is in a cohort."""
        cohort = self.cohort
        if cohort is not None:
            cohort.dissolve()

    def have(self, position: int, used_at: float, last: Reply | None, pending: Pending | None) -> None:
        """Take what is its own out of its cohort, which is over."""
        self._position = position
        self._used_at = used_at
        self._last = last
        self._pending = {} if pending is None else {position: pending}
        # Last of all: whoever sees that it is alone may look at the rest.
        self.cohort = None

    def join(self, cohort: Shared) -> Reply | None:
        """Step with others from here on, at rest as it is.

        Returns:
            Its newest reply, which is kept there now.
        """
        last, self._last = self._last, None
        self.cohort = cohort
        return last

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
        if self._pending:
            newest = self.newest
            upcoming = newest.position + newest.block.steps
            pending = self._pending.get(position)
            if pending is not None and pending.block.steps == steps:
                return pending
        if position == upcoming:
            if self.guests:
                raise Unavailable(f"session {self.identity!r} is being exported, forked or reset; send the chunk again")
            return None
        last = self._last
        if last is not None and last.answers(position, steps):
            return last
        accepted = f", with chunks accepted up to {upcoming}" if self._pending else ""
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

    def orphan(self, pending: Pending) -> None:
        """Forget who waited for a chunk that cannot be taken out of its run any more.

        Should the chunk come again, it is queued behind that run, which tells by the position whether it still is to be
        applied: ``end`` turns its conflict into the reply if not.
        """
        del self.pending[pending.position]
        self.orphans.append(pending)

    def is_next(self, epoch: int, position: int) -> bool:
        """Whether a chunk is the next one, with nothing else under way: what it mostly is, and quick to tell."""
        self.part()
        return (
            position == self._position
            and not self._pending
            and (epoch == 0 or epoch == self.epoch)
            and not self.closing
            and not self.guests
        )

    def end(self, pending: Pending, result: Reply | ConveyorError) -> tuple[Sequence[Waiter], Reply | ConveyorError]:
        """Note a chunk as ended, and keep its reply if it was applied.

        Returns:
            Whom to tell what, once all that hangs on the end has been done.
        """
        if isinstance(result, Reply):
            self._position = result.position + result.steps
            self._last = result
        elif isinstance(result, PositionConflict):
            last = self._last
            if last is not None and last.answers(pending.position, pending.block.steps):
                result = last
        waiters: Sequence[Waiter] = ()
        if self.orphans and pending in self.orphans:
            self.orphans.remove(pending)
        else:
            del self._pending[pending.position]
            if not self._pending:
                # One that was not empty keeps its table: 160 bytes of each session at rest.
                self._pending = {}
            # Each waiter knows what it waits for: in a circle they would hold the model until the collector comes by.
            waiters, pending.waiters = list(pending.waiters), {}
        if self._idle is not None and self.at_rest:
            self._idle.set_result(None)
            self._idle = None
        return waiters, result

    @property
    def newest(self) -> Pending:
        """Of the chunks under way, of which there is one, the last."""
        return next(reversed(self.pending.values()))

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
