"""The way of a chunk: matched with its session, queued, and answered when it has ended.

Owns the order of things between a chunk and its answer: what it is to its session, room for its reply, its place in the
model's queue, what is kept of it, who is told. Arrays come in decoded and checked against the model's manifest. Must
not know grpc. Lives on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import structlog
from numpy.typing import NDArray

from service.cohort import SessionCohort, Waiters
from service.errors import ConveyorError, Full
from service.intake import Intake
from service.metrics import Metrics
from service.replies import Replies
from service.session import Pending, Reply, Session, Waiter
from service.sessions import SessionTable
from service.ticks.row import USUAL, Block
from service.ticks.runner import Runner

Array = NDArray[np.generic]
log = structlog.get_logger()


Chunk: TypeAlias = tuple[Session, int, int, Waiter]
"""Steps of a session, asked for together with those of others: the session, the life of it that they are meant for or 0
for whichever there is, where they begin, and whoever is to be told."""


def runner_of(session: Session) -> Runner:
    """The model that a session runs on: the very one that it was opened on, also where a newer one is served."""
    assert isinstance(session.home, Runner)
    return session.home


class Chunks:
    """Chunks of all sessions.

    Args:
        intake: whether work is taken.
        sessions: the session table.
        replies: the account of the replies that are kept.
        metrics: what is counted.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        intake: Intake,
        sessions: SessionTable,
        replies: Replies,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._intake = intake
        self._sessions = sessions
        self._replies = replies
        self._metrics = metrics
        self._clock = clock
        # By the owner of the sessions and their ids.
        self._cohorts: dict[tuple[bytes, tuple[str, ...]], SessionCohort] = {}

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
        if session.is_next(epoch, position):
            pending = Pending(session, position, waiter)
        else:
            match = self._match(session, epoch, position, steps, waiter)
            if match is None or session.pending.get(position) is match:
                return match
            pending = match
        if accepted is None:
            self._intake.check()
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
            self._intake.check()
            self._queue(runner, blocks, steps, deadline, USUAL, caller, replaced)
        except ConveyorError as error:
            for pending in queued:
                for waiter in pending.waiters:
                    waiter.answer(error.with_traceback(None))
            return waited_for
        return queued + waited_for

    def together(self, owner: bytes, identities: tuple[str, ...]) -> SessionCohort | None:
        """Return the sessions of these ids, in this order, if they step together and none has expired."""
        cohort = self._cohorts.get((owner, identities))
        if cohort is not None and self._clock() - cohort.used_at >= self._sessions.idle_timeout_s:
            cohort.dissolve()
            return None
        return cohort

    def gather(
        self,
        owner: bytes,
        identities: tuple[str, ...],
        sessions: Sequence[Session],
        positions: Sequence[int],
        epochs: Sequence[int],
    ) -> SessionCohort | None:
        """Have sessions step together from here on, if they did the last time, and can.

        Args:
            owner: of all of them.
            identities: their ids.
            sessions: at least one, of one model.
            positions: where their next chunks begin.
            epochs: the lives that those are meant for, 0 for whichever there is; or none.

        Returns:
            None if they cannot, or did not the last time.
        """
        if not _met(sessions[0], identities):
            return None
        runner = runner_of(sessions[0])
        if not 1 < len(sessions) <= runner.tick_rows or not all(
            session.is_next(epoch, position) and not session.orphans
            for session, position, epoch in zip(sessions, positions, epochs or [0] * len(sessions), strict=True)
        ):
            return None
        now = self._clock()
        self._sessions.touch(*sessions)
        cohort = SessionCohort(sessions, now, runner.spell_out, lambda: self._cohorts.pop((owner, identities), None))
        self._cohorts[owner, identities] = cohort
        return cohort

    def step_cohort(
        self,
        cohort: SessionCohort,
        inputs: Sequence[Array],
        deadline: float | None,
        waiters: Waiters,
        caller: Hashable = None,
    ) -> None:
        """Queue a chunk of one step of each session of a cohort, which are the next.

        Args:
            cohort: with nothing under way.
            inputs: one array [N, 1, ...] an input of the model.
            deadline: on the clock; None for none.
            waiters: are told once, all at once or each of them.
            caller: among whom the model's time is shared out evenly.

        Raises:
            Unavailable, Full: as their names say; nobody is told then.
        """
        self._intake.check()
        runner = runner_of(cohort.sessions[0])
        count = len(cohort.sessions)
        reply_bytes = runner.manifest.reply_bytes(1) * count
        self._reserve(runner, count, reply_bytes, cohort.kept)
        block = Block(cohort.rows, 1, inputs, self._ended, deadline, USUAL, caller, cohort=cohort)
        cohort.begin(block, waiters)
        try:
            runner.submit([block])
        except BaseException:
            self._replies.replace(0, 0, reply_bytes)
            cohort.give_up()
            block.let_go()
            raise
        self._intake.count_in(count)

    def _match(self, session: Session, epoch: int, position: int, steps: int, waiter: Waiter) -> Pending | None:
        """Tell what a chunk is to its session.

        Returns:
            What is under way already, and is answered to this waiter too; or what is to be queued; None if the waiter
            has been answered.
        """
        match = session.match(epoch, position, steps)
        if isinstance(match, Reply):
            self.count_replay()
            self._sessions.touch(session)
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
        count = sum([len(rows) for rows, _ in groups])
        reply_bytes = runner.manifest.reply_bytes(steps) * count
        self._reserve(runner, count, reply_bytes, replaced)
        blocks = [Block(rows, steps, inputs, self._ended, deadline, priority, caller) for rows, inputs in groups]
        try:
            runner.submit(blocks)
        except BaseException:
            self._replies.replace(0, 0, reply_bytes)
            for block in blocks:
                block.let_go()
            raise
        self._intake.count_in(count)
        for rows, _ in groups:
            for pending in rows:
                pending.session.pending[pending.position] = pending

    def _reserve(self, runner: Runner, count: int, size: int, former: int) -> None:
        """Hold room for the replies of chunks, in place of those that they had."""
        try:
            self._replies.reserve(size, former)
        except Full:
            runner.turn_away(count)
            raise

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
        for block in runner_of(session).cancel([pending]):
            block.tell()

    def _ended(self, block: Block) -> None:
        """Make everything follow the end of chunks, then answer them."""
        if block.cohort is not None:
            if block.outputs is not None:
                self._ended_together(block, block.outputs)
                return
            assert isinstance(block.cohort, SessionCohort)
            block.cohort.dissolve()
        rows: Sequence[Any] = block.rows  # each is the Pending that it was queued as
        count, steps, outputs = len(rows), block.steps, block.outputs
        before = size = 0
        answers = []
        if outputs is None:
            assert block.error is not None
            answers = [pending.session.end(pending, block.error) for pending in rows]
        else:
            size = sum([output.nbytes for output in outputs]) // count
            for n, pending in enumerate(rows):
                session: Session = pending.session
                if session.last is not None:
                    before += session.last.size
                # Each has arrays of its own, so that keeping one does not keep them all.
                own = tuple([output[n].copy() for output in outputs])
                answers.append(session.end(pending, Reply(pending.position, steps, own, size)))
        self._sessions.touch(*[pending.session for pending in rows])
        self._replies.replace(before, size * count, self._reply_bytes(rows[0].session, steps) * count)
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
            self._intake.count_out(count)

    def _ended_together(self, block: Block, outputs: Sequence[Array]) -> None:
        """The same for the chunks of a cohort that were applied."""
        cohort = block.cohort
        assert isinstance(cohort, SessionCohort)
        count, before = len(cohort.sessions), cohort.kept
        # Kept on, a part of what the whole tick has put out would keep all of it.
        own = [output if _alone(output) else output.copy() for output in outputs]
        waiters = cohort.end(block.steps, own, self._clock())
        self._replies.replace(before, cohort.kept, self._reply_bytes(cohort.sessions[0], block.steps) * count)
        try:
            waiters.answer_all(own)
        except Exception:
            log.exception("results were not taken", model=cohort.sessions[0].home.name)
        finally:
            self._intake.count_out(count)

    def _reply_bytes(self, session: Session, steps: int) -> int:
        """Bytes that were reserved for the reply of a chunk."""
        return runner_of(session).manifest.reply_bytes(steps)


def _met(leader: Session, identities: tuple[str, ...]) -> bool:
    """Note with which others a session is stepped, which may never happen again; whether it was with them before."""
    before, leader.stepped_with = leader.stepped_with, hash(identities)
    return leader.stepped_with == before


def _alone(array: Array) -> bool:
    """Whether an array holds no more memory than its own."""
    return array.base is None or getattr(array.base, "nbytes", None) == array.nbytes
