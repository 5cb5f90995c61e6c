"""The session table: identity, owner, position, order, expiry, last reply.

Owns which sessions exist and what a chunk means to one: new, a repetition, or out of place. Must not know what tensors
hold, nor grpc or onnxruntime. Lives on the event loop's thread; the time is handed in.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.errors import (
    ConveyorError,
    EpochConflict,
    Full,
    InvalidRequest,
    NotFound,
    PositionConflict,
    SessionExists,
    SessionExpired,
    SessionLost,
    SessionUnknown,
    Unavailable,
)
from service.scheduler import Row, Track

_LONGEST_ID = 128
_REMEMBERED = 65_536
_WHY: dict[type[NotFound], str] = {
    SessionUnknown: "no session {identity!r} is open: it was closed, or never opened here, or not by you",
    SessionExpired: "session {identity!r} has expired: it was idle for more than {timeout_s:g} s",
    SessionLost: "session {identity!r} is lost: the server was started anew without its state",
}


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


class Waiter(Protocol):
    """Whoever is to be told what became of a chunk."""

    def answer(self, result: Reply | ConveyorError) -> None:
        """Take the answer; called once."""


@dataclass(slots=True)
class Pending:
    """A chunk under way, and who waits for it: more than one where it was sent again meanwhile."""

    row: Row
    waiters: list[Waiter]


class Session:
    """A live sequence whose state the server holds.

    Attributes:
        owner: digest of the key that it was opened with; empty for none.
        identity: its id, unique to the owner.
        model: name of its model.
        version: the version it was opened on.
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
        "identity",
        "last",
        "model",
        "orphans",
        "owner",
        "pending",
        "position",
        "track",
        "used_at",
        "version",
    )

    def __init__(self, owner: bytes, identity: str, model: str, version: int, track: Track, now: float) -> None:
        self.owner = owner
        self.identity = identity
        self.model = model
        self.version = version
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

    def end(self, row: Row) -> None:
        """Note a row as ended; keep its reply if it was applied, and tell who waits."""
        result: Reply | ConveyorError
        if row.outputs is not None:
            self.position = row.position + row.steps
            result = self.last = Reply(row.position, row.steps, row.outputs)
        else:
            assert row.error is not None
            result = row.error
            if isinstance(result, PositionConflict) and self.last is not None and self.last.answers(row):
                result = self.last
        if row in self.orphans:
            self.orphans.discard(row)
        else:
            for waiter in self.pending.pop(row.position).waiters:
                waiter.answer(result)
        if self.at_rest and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

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


class SessionTable:
    """All sessions of a server.

    Args:
        limit: most sessions open at once.
        idle_timeout_s: seconds without a chunk after which a session expires.
        clock: tells the time, in seconds.
        on_end: called with each session that ends, and whether it expired, to give back what it held.
    """

    def __init__(
        self, limit: int, idle_timeout_s: float, clock: Callable[[], float], on_end: Callable[[Session, bool], None]
    ) -> None:
        self.limit = limit
        self.idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._on_end = on_end
        # Least recently used first, so that whoever expires stands in front.
        self._sessions: OrderedDict[tuple[bytes, str], Session] = OrderedDict()
        self._gone: OrderedDict[tuple[bytes, str], type[NotFound]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def check_new(self, owner: bytes, identity: str) -> str:
        """Say whether a session may be opened, and under which id: the given one, or a new one that cannot be guessed.

        Raises:
            InvalidRequest: if the id is malformed.
            SessionExists: if it is taken.
            Full: if the table is.
        """
        if not identity:
            identity = secrets.token_urlsafe(18)
        elif len(identity) > _LONGEST_ID or not (identity.isascii() and identity.isprintable()):
            raise InvalidRequest(
                f"a session id is up to {_LONGEST_ID} printable ASCII characters, got {identity[:64]!r}"
            )
        self.expire()
        if (owner, identity) in self._sessions:
            raise SessionExists(f"session {identity!r} is open already")
        if len(self._sessions) >= self.limit:
            raise Full(f"{self.limit} sessions are open, which is the limit; close some or try again later")
        return identity

    def add(self, owner: bytes, identity: str, model: str, version: int, track: Track) -> Session:
        """Enter a session that ``check_new`` let pass."""
        session = Session(owner, identity, model, version, track, self._clock())
        self._sessions[owner, identity] = session
        self._gone.pop((owner, identity), None)
        return session

    def find(self, owner: bytes, identity: str) -> Session:
        """Look a session up.

        Raises:
            SessionExpired: if it was idle for too long.
            SessionLost: if its state did not outlive a restart.
            SessionUnknown: if the owner has no session of that id.
        """
        key = (owner, identity)
        session = self._sessions.get(key)
        if session is None:
            gone = self._gone.get(key, SessionUnknown)
            raise gone(_WHY[gone].format(identity=identity[:_LONGEST_ID], timeout_s=self.idle_timeout_s))
        if session.at_rest and not session.closing and self._clock() - session.used_at >= self.idle_timeout_s:
            self._end(key, session, expired=True)
            return self.find(owner, identity)
        return session

    def lose(self, owner: bytes, identity: str) -> None:
        """Note a session as lost."""
        self._remember((owner, identity), SessionLost)

    def touch(self, session: Session) -> None:
        """Note that a session is in use."""
        session.used_at = self._clock()
        self._sessions.move_to_end((session.owner, session.identity))

    def end(self, session: Session) -> None:
        """Take a session out, unless it is out already. Nothing of it may be under way."""
        if self._sessions.get((session.owner, session.identity)) is not session:
            return
        self._end((session.owner, session.identity), session, expired=False)

    def expire(self) -> int:
        """End the sessions that have been idle for too long.

        Returns:
            How many they were.
        """
        count, now = 0, self._clock()
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if now - session.used_at < self.idle_timeout_s:
                break
            if session.closing or not session.at_rest:
                self.touch(session)
                continue
            self._end(key, session, expired=True)
            count += 1
        return count

    def _end(self, key: tuple[bytes, str], session: Session, expired: bool) -> None:
        del self._sessions[key]
        if expired:
            self._remember(key, SessionExpired)
        self._on_end(session, expired)

    def _remember(self, key: tuple[bytes, str], why: type[NotFound]) -> None:
        self._gone[key] = why
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
