"""The session table: which sessions exist, whose they are, when they expire, and what became of those that are gone.

Must not know what tensors hold, nor grpc or onnxruntime. Lives on the event loop's thread; the time is handed in.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from service.errors import (
    Full,
    InvalidRequest,
    NotFound,
    SessionExists,
    SessionExpired,
    SessionLost,
    SessionUnknown,
)
from service.session import Home, Session
from service.ticks.row import Track

_LONGEST_ID = 128
_REMEMBERED = 65_536
_WHY: dict[type[NotFound], str] = {
    SessionUnknown: "no session {identity!r} is open: it was closed, or never opened here, or not by you",
    SessionExpired: "session {identity!r} has expired: it was idle for more than {timeout_s:g} s",
    SessionLost: "session {identity!r} is lost: the server was started anew without its state",
}


def check_id(identity: str, noun: str = "session") -> None:
    """Refuse what is no id.

    Args:
        identity: the id.
        noun: what it is for.

    Raises:
        InvalidRequest: if it is too long, or has other than printable ASCII characters.
    """
    if len(identity) > _LONGEST_ID or not (identity.isascii() and identity.isprintable()):
        raise InvalidRequest(f"a {noun} id is up to {_LONGEST_ID} printable ASCII characters, got {identity[:64]!r}")


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
        check_id(identity)
        self.expire()
        if (owner, identity) in self._sessions:
            raise SessionExists(f"session {identity!r} is open already")
        if len(self._sessions) >= self.limit:
            raise Full(f"{self.limit} sessions are open, which is the limit; close some or try again later")
        return identity

    def add(self, owner: bytes, identity: str, home: Home, track: Track) -> Session:
        """Enter a session that ``check_new`` let pass."""
        session = Session(owner, identity, home, track, self._clock())
        self._sessions[owner, identity] = session
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
        session.part()
        if self._clock() - session.used_at >= self.idle_timeout_s and session.at_rest and not session.closing:
            self._end(key, session, expired=True)
            return self.find(owner, identity)
        return session

    def find_many(self, owner: bytes, identities: Sequence[str]) -> list[Session | NotFound]:
        """Look sessions up; in the place of one that is not there, why."""
        found: list[Session | NotFound] = []
        past = self._clock() - self.idle_timeout_s
        for identity in identities:
            session = self._sessions.get((owner, identity))
            if session is not None and session.used_at > past:
                found.append(session)
                continue
            try:
                found.append(self.find(owner, identity))
            except NotFound as error:
                found.append(error.with_traceback(None))
        return found

    def lose(self, owner: bytes, identity: str) -> None:
        """Note a session as lost."""
        self._remember((owner, identity), SessionLost)

    def touch(self, *sessions: Session) -> None:
        """Note that sessions are in use."""
        now = self._clock()
        for session in sessions:
            session.used_at = now
            self._note(session, now)

    def _note(self, session: Session, now: float) -> None:
        session.noted_at = now
        self._sessions.move_to_end((session.owner, session.identity))

    def end(self, session: Session) -> None:
        """Take a session out, unless it is out already. Nothing of it may be under way."""
        if self._sessions.get((session.owner, session.identity)) is not session:
            return
        self._gone.pop((session.owner, session.identity), None)
        self._end((session.owner, session.identity), session, expired=False)

    def set_aside(self, session: Session) -> None:
        """Take a session out without ending it; what is remembered of the id before stays. Nothing may be under way."""
        del self._sessions[session.owner, session.identity]

    def put_back(self, session: Session) -> None:
        """Enter a session that was set aside; that counts as a use of it."""
        session.used_at = session.noted_at = self._clock()
        self._sessions[session.owner, session.identity] = session

    def expire(self) -> int:
        """End the sessions that have been idle for too long.

        Returns:
            How many they were.
        """
        count, now = 0, self._clock()
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if now - session.noted_at < self.idle_timeout_s:
                break
            if now - session.used_at < self.idle_timeout_s:
                # In a cohort, or since it was in one: its use was not noted here.
                self._note(session, now)
                continue
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
        self._gone.move_to_end(key)
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
