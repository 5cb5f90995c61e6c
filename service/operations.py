"""What a caller can ask, through whatever door: run a batch; open, step, fork, reset, close, export a session.

Owns the order of things inside each request: who may, where it stands, what is queued, what is given back on failure.
Arrays come in decoded and checked against the model's manifest. Must not know grpc. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import structlog
from numpy.typing import NDArray

from service.batch import Batch
from service.errors import (
    ConveyorError,
    Draining,
    Loading,
    NotFound,
    NotStreamable,
    PositionConflict,
    SessionUnknown,
)
from service.metrics import Metrics
from service.replies import Replies
from service.repository import Repository
from service.row import USUAL, Block, Track
from service.runner import Runner
from service.session import Pending, Reply, Session, Waiter, new_epoch
from service.sessions import SessionTable

Array = NDArray[np.generic]
log = structlog.get_logger()


Chunk: TypeAlias = tuple[Session, int, int, Waiter]
"""Steps of a session, asked for together with those of others: the session, the life of it that they are meant for or 0
for whichever there is, where they begin, and whoever is to be told."""


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
        ready: whether models and the sessions of an earlier process are there; calls before are told to come again.
        draining: once true, no new work is taken.

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
        self.ready = False
        self.draining = False
        self._metrics = metrics
        self._clock = clock
        self._working = 0
        self._rested: asyncio.Event = asyncio.Event()
        self._rested.set()
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
        self.take_new_work()
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
        self._be_ready()
        return self.sessions.find(owner, identity)

    def find_many(self, owner: bytes, identities: Sequence[str]) -> list[Session | NotFound]:
        """Look sessions up; in the place of one that is not there, why.

        Raises:
            Loading: if those of an earlier process are being read still.
        """
        self._be_ready()
        return self.sessions.find_many(owner, identities)

    def runner(self, session: Session) -> Runner:
        """The model that a session runs on: the very one that it was opened on, also where a newer one is served."""
        assert isinstance(session.home, Runner)
        return session.home

    def step(
        self,
        session: Session,
        runner: Runner,
        epoch: int,
        position: int,
        inputs: Sequence[Array],
        deadline: float | None,
        waiter: Waiter,
        priority: int = USUAL,
        accepted: float | None = None,
        caller: Hashable = None,
        former: Session | None = None,
    ) -> Pending | None:
        """Queue a chunk. The waiter is answered once, now or later, unless it is abandoned.

        Args:
            session: the session.
            runner: its model.
            epoch: the life of the session that it is meant for; 0 for whichever there is.
            position: where the chunk begins.
            inputs: one array [T, ...] an input of the model.
            deadline: on the clock; None for none.
            waiter: whoever is to be told.
            priority: 1 first, 2 as usual, 3 last.
            accepted: when the chunk was accepted, if that was before this; it is taken then also while draining.
            caller: among whom the model's time is shared out evenly.
            former: the session that ends if this chunk is applied, and its reply with it.

        Returns:
            What to abandon if the caller goes away; None if the waiter has been answered already.

        Raises:
            EpochConflict, PositionConflict, SessionUnknown, Unavailable, Full: as their names say; the waiter is not
                answered then.
        """
        steps = len(inputs[0])
        pending = self._match(session, epoch, position, steps, waiter)
        if pending is None or session.pending.get(position) is pending:
            return pending
        if accepted is None:
            self.take_new_work()
        replaced = session.last if former is None else former.last
        self._queue(
            runner,
            [([pending], [array[np.newaxis] for array in inputs])],
            steps,
            deadline,
            priority,
            caller,
            0 if replaced is None else replaced.size,
        )
        return pending

    def step_together(
        self,
        runner: Runner,
        chunks: Sequence[Chunk],
        steps: int,
        inputs: Sequence[Array],
        deadline: float | None,
        caller: Hashable = None,
    ) -> list[Pending]:
        """Queue a chunk of each of several sessions; each waiter is answered once, now or later, unless abandoned.

        Args:
            runner: the model of all of them.
            chunks: of sessions that differ.
            steps: of each chunk.
            inputs: one array [N, T, ...] an input of the model, row n of ``chunks[n]``.
            deadline: on the clock; None for none.
            caller: among whom the model's time is shared out evenly.

        Returns:
            What to abandon if the caller goes away.
        """
        waited_for: list[Pending] = []
        # Those that can run at once together, and those that stand behind the same chunks: nobody waits for others.
        groups: dict[object, tuple[list[Pending], list[int]]] = {}
        replaced = 0
        for n, (session, epoch, position, waiter) in enumerate(chunks):
            behind: object = None
            if session.is_next(epoch, position):
                pending = Pending(session, position, waiter)
            else:
                try:
                    match = self._match(session, epoch, position, steps, waiter)
                except ConveyorError as error:
                    waiter.answer(error.with_traceback(None))
                    continue
                if match is None:
                    continue
                pending = match
                if session.pending.get(position) is pending:
                    waited_for.append(pending)
                    continue
                behind = session.newest.block if session.pending else session
            if behind is None and session.orphans:
                behind = session
            rows, places = groups.setdefault(behind, ([], []))
            rows.append(pending)
            places.append(n)
            if session.last is not None:
                replaced += session.last.size
        if not groups:
            return waited_for
        blocks = [
            (rows, list(inputs) if len(rows) == len(chunks) else [array[places] for array in inputs])
            for rows, places in groups.values()
        ]
        queued = [pending for rows, _ in blocks for pending in rows]
        try:
            self.take_new_work()
            self._queue(runner, blocks, steps, deadline, USUAL, caller, replaced)
        except ConveyorError as error:
            for pending in queued:
                for waiter in pending.waiters:
                    waiter.answer(error.with_traceback(None))
            return waited_for
        return queued + waited_for

    def _match(self, session: Session, epoch: int, position: int, steps: int, waiter: Waiter) -> Pending | None:
        """Tell what a chunk is to its session.

        Returns:
            What is under way already, and is answered to this waiter too; or what is to be queued; None if the waiter
            has been answered.
        """
        match = session.match(epoch, position, steps)
        if isinstance(match, Reply):
            self.count_replay()
            self.sessions.touch(session)
            waiter.answer(match)
            return None
        if match is not None:
            match.waiters[waiter] = None
            return match
        return Pending(session, position, waiter)

    def _queue(
        self,
        runner: Runner,
        groups: Sequence[tuple[Sequence[Pending], Sequence[Array]]],
        steps: int,
        deadline: float | None,
        priority: int,
        caller: Hashable,
        replaced: int,
    ) -> None:
        """Queue chunks that are the next of their sessions, in place of whose replies theirs will be kept.

        Those of a group run together, on its inputs [N, T, ...]. All of them are queued or none.
        """
        count = sum(len(rows) for rows, _ in groups)
        reply_bytes = runner.manifest.reply_bytes(steps) * count
        self.replies.reserve(reply_bytes, replaced)
        blocks = [Block(rows, steps, inputs, self._ended, deadline, priority, caller) for rows, inputs in groups]
        try:
            runner.submit(blocks)
        except BaseException:
            self.replies.replace(0, 0, reply_bytes)
            for block in blocks:
                block.let_go()
            raise
        self.count_in(count)
        for rows, _ in groups:
            for pending in rows:
                pending.session.pending[pending.position] = pending

    def count_replay(self) -> None:
        """Note a chunk as answered with a reply that was kept."""
        self._metrics.replays.inc()

    def abandon(self, runner: Runner, given_up: Sequence[tuple[Pending, Waiter]]) -> None:
        """Give chunks up on behalf of waiters, who are not answered; those go on that others wait for."""
        rows = []
        for pending, waiter in given_up:
            if waiter in pending.waiters:
                del pending.waiters[waiter]
                if not pending.waiters:
                    rows.append(pending)
        ended = runner.cancel(rows)
        there = {row for block in ended for row in block.rows}
        for pending in rows:
            if pending not in there:
                pending.session.orphan(pending)
        for block in ended:
            block.tell()

    def cancel(self, session: Session, pending: Pending) -> None:
        """Give a chunk up whose waiters still want to be told what became of it, now or when its run has ended."""
        for block in self.runner(session).cancel([pending]):
            block.tell()

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
            self.take_new_work()
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
            runner = self.runner(session)
            self.sessions.touch(session)
            return self.open(owner, new_identity, runner, session.track.slot, session.position)

    async def reset(self, owner: bytes, identity: str, position: int | None, epoch: int = 0) -> Session:
        """Put a session back to its model's initial state, after the chunks that it has accepted.

        Raises:
            PositionConflict: if ``position`` is given and is not where the session is.
            EpochConflict: if ``epoch`` is given and over.
        """
        async with self._at_rest(owner, identity, position, epoch) as session:
            self.runner(session).pool.reset(session.track.slot)
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

    async def export(self, owner: bytes, identity: str) -> tuple[Session, list[Array]]:
        """Copy a session's states out, each without the batch axis, after the chunks that it has accepted."""
        async with self._at_rest(owner, identity) as session:
            return session, self.runner(session).pool.read(session.track.slot)

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

    def _ended(self, block: Block) -> None:
        """Make everything follow the end of chunks, then answer them."""
        rows: Sequence[Any] = block.rows  # each is the Pending that it was queued as
        count, steps, outputs = len(rows), block.steps, block.outputs
        before = size = 0
        answers = []
        if outputs is None:
            assert block.error is not None
            answers = [pending.session.end(pending, block.error) for pending in rows]
        else:
            size = sum(output.nbytes for output in outputs) // count
            for n, pending in enumerate(rows):
                session: Session = pending.session
                if session.last is not None:
                    before += session.last.size
                # Each has arrays of its own, so that keeping one does not keep them all.
                own = tuple([output[n].copy() for output in outputs])
                answers.append(session.end(pending, Reply(pending.position, steps, own, size)))
        self.sessions.touch(*[pending.session for pending in rows])
        self.replies.replace(before, size * count, self._reply_bytes(rows[0].session, steps) * count)
        try:
            # Last of all: whoever is told may go on with the session at once, or end it.
            for waiters, result in answers:
                for waiter in waiters:
                    try:
                        waiter.answer(result)
                    except Exception:
                        # Whoever cannot take an answer must not cost the others theirs.
                        log.exception("a result was not taken", model=rows[0].session.home.name)
        finally:
            self.count_out(count)

    def _reply_bytes(self, session: Session, steps: int) -> int:
        """Bytes that were reserved for the reply of a chunk."""
        return self.runner(session).manifest.reply_bytes(steps)

    def _keep_reply(self, session: Session, reply: Reply | None) -> None:
        before = 0 if session.last is None else session.last.size
        self.replies.replace(before, 0 if reply is None else reply.size)
        session.last = reply

    def _free(self, session: Session, expired: bool) -> None:
        self._keep_reply(session, None)
        self.runner(session).pool.free(session.track.slot)
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
            self.take_new_work()
        batch = Batch(runner, with_states)
        try:
            for n, inputs in enumerate(rows):
                given = None if states is None else [state[n] for state in states]
                batch.add(given, inputs, deadline, priority, caller)
            runner.submit(batch.blocks)
        except Exception:
            batch.free()
            raise
        self.count_in(1)
        try:
            await batch.end()
        finally:
            self.count_out(1)
        outputs = [[output[0] for output in block.outputs or ()] for block in batch.blocks]
        return outputs, [batch.states[block] for block in batch.blocks if with_states]

    # --- drain ---

    async def rest(self) -> None:
        """Wait until nothing that was accepted is under way."""
        await self._rested.wait()

    def _be_ready(self) -> None:
        if not self.ready:
            raise Loading("the server is starting; try again in a moment")

    def take_new_work(self) -> None:
        """Refuse new work where none is taken.

        Raises:
            Loading, Draining: as their names say.
        """
        self._be_ready()
        if self.draining:
            raise Draining("the server is about to stop; go on elsewhere, or later")

    def count_in(self, count: int) -> None:
        """Note requests as accepted: ``rest`` waits for them."""
        self._working += count
        self._rested.clear()

    def count_out(self, count: int) -> None:
        """Note requests that were accepted as ended."""
        self._working -= count
        if not self._working:
            self._rested.set()
