"""What a caller can ask, through whatever door: run a batch; open, fork, reset, close, export a session.

Owns the order of things inside each request: who may, where it stands, what is queued, what is given back on failure.
Arrays come in decoded and checked against the model's manifest. Must not know grpc. Lives on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from service.background import in_thread
from service.batch import Batch
from service.chunks import Chunks, runner_of
from service.cohort import SessionCohort
from service.errors import (
    NotFound,
    NotStreamable,
    PositionConflict,
    SessionUnknown,
)
from service.intake import Intake
from service.metrics import Metrics
from service.replies import Replies
from service.repository import Repository
from service.session import Reply, Session, new_epoch
from service.sessions import SessionTable
from service.ticks.row import USUAL, Track
from service.ticks.runner import Runner

Array = NDArray[np.generic]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Start:
    """A session that was opened in the place of another, as long as it is open which of them goes on.

    Attributes:
        session: the new one; it is in the table.
        former: the one that had its id, if there was one; it is not in the table, and keeps its slot.
    """

    session: Session
    former: Session | None


class Operations:
    """Everything that the doors offer.

    Attributes:
        repository: the models.
        sessions: the session table.
        replies: the account of the replies that are kept.
        intake: whether work is taken.
        chunks: steps of sessions.

    Args:
        repository: the models.
        max_sessions: most sessions open at once.
        max_reply_bytes: most bytes that the replies that are kept hold together before chunks are refused.
        idle_timeout_s: seconds without a chunk after which a session expires.
        metrics: what is counted.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        repository: Repository,
        max_sessions: int,
        max_reply_bytes: int,
        idle_timeout_s: float,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.repository = repository
        self.sessions = SessionTable(max_sessions, idle_timeout_s, clock, self._free)
        self.replies = Replies(max_reply_bytes, idle_timeout_s, clock)
        self.intake = Intake()
        self.chunks = Chunks(self.intake, self.sessions, self.replies, metrics, clock)
        self._metrics = metrics
        self._clock = clock
        metrics.sessions.set_function(lambda: len(self.sessions))

    # --- sessions ---

    def open(
        self,
        owner: bytes,
        identity: str,
        runner: Runner,
        states: Sequence[Array] | int | None = None,
        position: int = 0,
    ) -> Session:
        """Open a session.

        Args:
            owner: digest of the caller's key.
            identity: the id to give it; empty for a new one.
            runner: the model.
            states: to begin from, each without the batch axis, or the slot that has them; None for the initial ones.
            position: to begin at.

        Raises:
            Draining, NotStreamable, InvalidRequest, SessionExists, Full: as their names say.
        """
        self.intake.check()
        return self._open(owner, identity, runner, states, position)

    def _open(
        self, owner: bytes, identity: str, runner: Runner, states: Sequence[Array] | int | None, position: int
    ) -> Session:
        self.check_streamable(runner)
        identity = self.sessions.check_new(owner, identity)
        track = Track(runner.pool.allocate(states), position)
        return self.sessions.add(owner, identity, runner, track)

    def resume(
        self,
        owner: bytes,
        identity: str,
        runner: Runner,
        states: Sequence[Array],
        position: int,
        epoch: int,
        idle_s: float,
        last: Reply | None,
    ) -> None:
        """Go on with a session of an earlier process, before this one is ready.

        Raises:
            NotStreamable, SessionExists, Full: as their names say.
        """
        session = self._open(owner, identity, runner, states, position)
        session.epoch = epoch
        session.used_at -= idle_s
        session.noted_at = session.used_at
        self._keep_reply(session, last)

    def check_streamable(self, runner: Runner) -> None:
        """Refuse a model that cannot run step by step.

        Raises:
            NotStreamable: if it cannot.
        """
        if not runner.manifest.streamable:
            raise NotStreamable(
                f"model {runner.name!r} takes whole sequences only, because a layer reads backward or its model.yaml "
                "says streamable: false: it has no sessions, only Infer"
            )

    def find(self, owner: bytes, identity: str) -> Session:
        """Look a session up.

        Raises:
            Loading: if those of an earlier process are being read still.
            SessionExpired, SessionLost, SessionUnknown: as their names say.
        """
        self.intake.check_ready()
        return self.sessions.find(owner, identity)

    def find_many(self, owner: bytes, identities: Sequence[str]) -> list[Session | NotFound]:
        """Look sessions up; in the place of one that is not there, why.

        Raises:
            Loading: if those of an earlier process are being read still.
        """
        self.intake.check_ready()
        return self.sessions.find_many(owner, identities)

    def together(self, owner: bytes, identities: tuple[str, ...]) -> SessionCohort | None:
        """Look up sessions that step together.

        Raises:
            Loading: if those of an earlier process are being read still.
        """
        self.intake.check_ready()
        return self.chunks.together(owner, identities)

    def expire(self) -> int:
        """End the sessions that have been idle for too long, and forget what is kept of those that ended long ago.

        Returns:
            How many sessions they were.
        """
        self.replies.expire()
        return self.sessions.expire()

    # --- sessions in the place of others ---

    def start(
        self, owner: bytes, identity: str, runner: Runner, former: Session | None, epoch: int, accepted: bool
    ) -> Start:
        """Open a session, at first on trial: ``keep`` or ``undo`` has to follow, with nothing of it under way.

        Args:
            owner: digest of the caller's key.
            identity: the id to give it.
            runner: the model.
            former: the session that has the id, at rest; None if there is none.
            epoch: to give it; 0 for a new one.
            accepted: whether this is part of what was accepted before; it is done then also while draining.

        Raises:
            Draining, NotStreamable, InvalidRequest, Full: as their names say; nothing has changed then.
        """
        if not accepted:
            self.intake.check()
        if former is not None:
            self.sessions.set_aside(former)
        try:
            session = self._open(owner, identity, runner, None, 0)
        except BaseException:
            if former is not None:
                self.sessions.put_back(former)
            raise
        session.epoch = epoch or session.epoch
        return Start(session, former)

    def keep(self, start: Start) -> None:
        """Go on with the new session; the former one ends."""
        if start.former is not None:
            self._free(start.former, expired=False)

    def undo(self, start: Start) -> None:
        """Go on with the former session as though the new one had not been."""
        self.sessions.set_aside(start.session)
        self._free(start.session, expired=False)
        if start.former is not None:
            self.sessions.put_back(start.former)

    # --- sessions at rest ---

    async def fork(self, owner: bytes, identity: str, new_identity: str, position: int | None) -> Session:
        """Open a second session from the state that one has, after the chunks that it has accepted.

        Raises:
            PositionConflict: if ``position`` is given and is not where the session is.
        """
        async with self._at_rest(owner, identity, position) as session:
            runner = runner_of(session)
            self.sessions.touch(session)
            return self.open(owner, new_identity, runner, session.track.slot, session.position)

    async def reset(self, owner: bytes, identity: str, position: int | None, epoch: int = 0) -> Session:
        """Put a session back to its model's initial state, after the chunks that it has accepted.

        Raises:
            PositionConflict: if ``position`` is given and is not where the session is.
            EpochConflict: if ``epoch`` is given and over.
        """
        async with self._at_rest(owner, identity, position, epoch) as session:
            runner_of(session).pool.reset(session.track.slot)
            session.position = session.track.position = 0
            session.epoch = new_epoch()
            self._keep_reply(session, None)
            self.sessions.touch(session)
            return session

    async def close(self, owner: bytes, identity: str) -> int:
        """End a session, after the chunks that it has accepted; whoever asks meanwhile waits for the same end.

        Returns:
            How many steps had been applied.
        """
        session = self.find(owner, identity)
        session.closing += 1
        try:
            await session.idle()
        finally:
            # Also when the caller has gone meanwhile: then the session stays as it is.
            session.closing -= 1
        self.sessions.end(session)
        return session.position

    async def export(self, owner: bytes, identity: str) -> tuple[Session, int, list[Array]]:
        """Copy a session's states out, after the chunks that it has accepted.

        Returns:
            The session, which may have gone on meanwhile; the position of the copy; its states, without the batch axis.

        Raises:
            Full: if there is no slot to copy them to.
        """
        async with self._at_rest(owner, identity) as session:
            position, pool = session.position, runner_of(session).pool
            slot = pool.allocate(session.track.slot)
        # From a device that takes a while, for which neither the event loop nor the session waits.
        try:
            return session, position, await in_thread(pool.read, slot)
        finally:
            pool.free(slot)

    @asynccontextmanager
    async def _at_rest(
        self, owner: bytes, identity: str, position: int | None = None, epoch: int = 0
    ) -> AsyncIterator[Session]:
        """Find a session when nothing of it is under way. It takes no chunks while it is waited for."""
        session = self.find(owner, identity)
        session.guests += 1
        try:
            await session.idle()
        finally:
            session.guests -= 1
        # It may have ended while this waited.
        if self.find(owner, identity) is not session:
            raise SessionUnknown(f"session {identity!r} was closed meanwhile")
        session.check_epoch(epoch)
        if position is not None and position != session.position:
            raise PositionConflict(f"the session is at position {session.position}, not {position}", session.position)
        yield session

    def _keep_reply(self, session: Session, reply: Reply | None) -> None:
        before = 0 if session.last is None else session.last.size
        self.replies.replace(before, 0 if reply is None else reply.size)
        session.last = reply

    def _free(self, session: Session, expired: bool) -> None:
        self._keep_reply(session, None)
        runner_of(session).pool.free(session.track.slot)
        if expired:
            self._metrics.expired.inc()

    # --- batches ---

    async def infer(
        self,
        runner: Runner,
        rows: Sequence[Sequence[Array]],
        states: Sequence[Array] | None,
        deadline: float | None,
        priority: int = USUAL,
        caller: Hashable = None,
        accepted: bool = False,
        with_states: bool = True,
    ) -> tuple[list[list[Array]], list[list[Array]]]:
        """Run whole sequences.

        Args:
            runner: the model.
            rows: for each its inputs, one array [T_n, ...] an input of the model.
            states: to begin from, each [N, ...]; None for the initial ones.
            deadline: on the clock; None for none.
            priority: 1 first, 2 as usual, 3 last.
            caller: among whom the model's time is shared out evenly.
            accepted: whether that was said before; it is done then also while draining.
            with_states: whether the final states are wanted.

        Returns:
            For each row its outputs, each [T_n, ...] or [...], and its final states, each without the batch axis; of
            no row where they are not wanted.

        Raises:
            Draining, Full, Late, EngineFailed: as their names say.
        """
        if not accepted:
            self.intake.check()
        batch = Batch(runner, with_states)
        try:
            for n, inputs in enumerate(rows):
                given = None if states is None else [state[n] for state in states]
                batch.add(given, inputs, deadline, priority, caller)
            runner.submit(batch.blocks)
        except Exception:
            batch.free()
            raise
        self.intake.count_in(1)
        try:
            await batch.end()
        finally:
            self.intake.count_out(1)
        outputs = [[output[0] for output in block.outputs or ()] for block in batch.blocks]
        return outputs, [block.states[0] for block in batch.blocks if with_states]
