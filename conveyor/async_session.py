"""A session, from the client's side: where it stands, the one chunk it may have under way, and what is in doubt.

Must not know how the stream reconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TypeAlias

from conveyor.chunks import Chunks, copy_chunks, lay_chunks
from conveyor.connection import Connection
from conveyor.errors import (
    ConveyorError,
    EpochConflict,
    InvalidRequest,
    NotFound,
    PositionConflict,
    ProtocolError,
    SessionLost,
    SessionUnknown,
    TimedOut,
    Unavailable,
)
from conveyor.flight import Flight, wait
from conveyor.model import Model
from conveyor.opening import Opening, find_session, new_session_id, open_session
from conveyor.payload import Inputs, Outputs, read_chunk
from conveyor.state import SessionState, decode_state
from conveyor.stream import ChunkStream
from conveyor.tensors import Array
from conveyor.v1 import conveyor_pb2 as pb

_GRACE_S = 1.0
"""How much longer than the server a client waits, so that the server's word on a deadline arrives."""

_FAREWELL_S = 2.0
"""How long a session that an error ends is given to close."""

Group: TypeAlias = "tuple[Sequence[AsyncSession], Chunks]"
"""Sessions of one model, and a chunk for each of them."""


class AsyncSession:
    """A live sequence whose state the server holds. Made by ``AsyncClient.session`` and its like.

    At most one chunk is under way at a time; ``step`` called meanwhile waits its turn. A dropped connection neither
    loses nor doubles a step: the chunk is sent again with its position.

    A ``step`` that ends without the server's word on it (cancelled, TimedOut, Unavailable) leaves the session *in
    doubt*: the chunk may have been applied or not. The next call that needs to know asks the server first, so steps
    never go missing unnoticed: ``await session.settle()`` gives the chunk's outputs if it counted and None if it did
    not, and ``position`` is right from then on. To repeat a step only if it did not count::

        try:
            y = await session.step(x)
        except (Unavailable, TimedOut):
            y = await session.settle()
            if y is None:
                y = await session.step(x)

    A ``reset`` that ends so leaves it in doubt too.

    Attributes:
        session_id: with which ``attach`` finds the session again; whoever knows it, and the client's key, can use it.
        model: that runs it.

    Args:
        connection: to the server.
        stream: that carries its chunks.
        model: that runs it.
        session: as the server described it.
        position: where to go on; where the server is if None.
        attached: whether somebody else opened it, so that the end of a ``with`` block is not its end.
    """

    def __init__(
        self,
        connection: Connection,
        stream: ChunkStream,
        model: Model,
        session: pb.Session,
        position: int | None = None,
        *,
        attached: bool = False,
    ) -> None:
        self.session_id = session.session_id
        self.model = model
        self._connection = connection
        self._stream = stream
        self._epoch = session.epoch
        self._position = session.position if position is None else position
        self._attached = attached
        self._pending: Flight | None = None
        self._resetting = False
        self._closed = False
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        doubt = ", in doubt" if self.in_doubt else ""
        return f"<{type(self).__name__} {self.session_id} of {self.model.name!r} at position {self._position}{doubt}>"

    @property
    def position(self) -> int:
        """How many steps are known to have been applied; while ``in_doubt``, one chunk more may have been."""
        return self._position

    @property
    def in_doubt(self) -> bool:
        """Whether a chunk was sent, or a reset, of which it is not known whether it was applied."""
        return self._pending is not None or self._resetting

    async def step(self, x: Inputs, *, timeout_s: float | None = None) -> Outputs:
        """Applies the next steps.

        Args:
            x: [T, I] for a chunk, or [I] for one step; [T] or a number for tokens. A dict by name for several inputs.
            timeout_s: after which the server drops the chunk unless it has been applied; the client's own if None.

        Returns:
            [T, O], or [O] for one step or an output that holds the last step's value; a dict by name for several
            outputs. The arrays are read-only.

        Raises:
            InvalidRequest: x does not fit the model, or the timeout makes no sense; nothing was sent.
            ConveyorError: nothing was applied, unless the session is ``in_doubt`` after it, as after TimedOut and
                ConnectionLost. After a ProtocolError, ``position`` says what was.
            EpochConflict: somebody else has reset the session; ``attach`` goes on with it.
        """
        timeout_s = self._connection.settings.timeout(timeout_s)
        (outcome,) = (await step_sessions(group([(self, x)]), timeout_s)).values()
        if isinstance(outcome, ConveyorError):
            raise outcome
        return outcome

    async def settle(self, *, timeout_s: float | None = None) -> Outputs | None:
        """Finds out what became of the step or reset in doubt.

        Returns:
            The step's outputs if it was applied; None if it was not, or none was in doubt.

        Raises:
            ConveyorError: if that could not be found out; the session stays in doubt.
        """
        timeout_s = self._connection.settings.timeout(timeout_s)
        async with self._lock:
            return await self._settle(timeout_s)

    def fork(self, session_id: str | None = None) -> Opening:
        """Opens a second session from the state of this one; the two go on independently.

        Await it, or ``async with session.fork() as other`` closes the second one after.

        Args:
            session_id: of the new one; an unguessable one if None.

        Raises:
            ConveyorError: as the server says; no session was opened.
        """
        return Opening(self._fork(session_id))

    async def _fork(self, session_id: str | None) -> AsyncSession:
        new_id = session_id or new_session_id()
        async with self._lock:
            await self._ready()
            request = pb.ForkSessionRequest(session_id=self.session_id, new_session_id=new_id, position=self._position)
            deadline = self._connection.deadline()
            with self._explained():
                fork = await open_session(
                    self._connection, "ForkSession", request, new_id, chosen=bool(session_id), deadline=deadline
                )
            return AsyncSession(self._connection, self._stream, self.model, fork)

    async def reset(self) -> None:
        """Goes back to position 0 and the model's initial state.

        Raises:
            ConveyorError: as the server says; the session is as it was, unless it is ``in_doubt`` after it.
            EpochConflict: somebody else has reset the session; ``attach`` goes on with it.
        """
        async with self._lock:
            await self._ready()
            request = pb.ResetSessionRequest(session_id=self.session_id, position=self._position, epoch=self._epoch)
            self._resetting = True
            try:
                with self._explained():
                    # The epoch that a repeated attempt finds over is the one that an earlier attempt ended.
                    response = await self._connection.call(
                        "ResetSession", request, after_loss=lambda e: None if isinstance(e, EpochConflict) else e
                    )
            except ConveyorError as error:
                self._resetting = isinstance(error, Unavailable | TimedOut)
                raise
            if response is None:
                await self._settle_reset(self._connection.settings.timeout_s)
            else:
                self._begin_anew(response.session)

    async def export(self) -> SessionState:
        """Copies the state out; the session goes on.

        Raises:
            ConveyorError: as the server says.
        """
        async with self._lock:
            await self._ready()
            request = pb.ExportSessionRequest(session_id=self.session_id)
            with self._explained():
                response: pb.ExportSessionResponse = await self._connection.call("ExportSession", request)
            return decode_state(response.state)

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Ends the session on the server, after a step that is under way; a second time does nothing.

        Raises:
            ConveyorError: the server could not be told. The session then ends there by itself when its idle timeout is
                over.
        """
        async with self._lock:
            if self._closed:
                return
            request = pb.CloseSessionRequest(session_id=self.session_id)
            # Gone is what was asked for, whether by an attempt whose reply was lost or otherwise.
            with suppress(NotFound):
                await self._connection.call("CloseSession", request, deadline=self._connection.deadline(timeout_s))
            self._closed = True

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attached:
            return
        if error is None:
            await self.close()
        else:
            # The error that ended the session is the one to tell of.
            with suppress(ConveyorError):
                await self.close(timeout_s=_FAREWELL_S)

    async def _ready(self, timeout_s: float | None = None) -> None:
        """Makes sure that the session is open and where it stands; to be called under the lock."""
        if self._closed:
            raise InvalidRequest(f"session {self.session_id!r} has been closed")
        await self._settle(self._connection.settings.timeout(timeout_s))

    async def _settle(self, timeout_s: float) -> Outputs | None:
        if self._resetting:
            await self._settle_reset(timeout_s)
        flight = self._pending
        if flight is None:
            return None
        if flight.failure is not None:
            flight = flight.again(self._connection.settings.clock() + timeout_s)
            self._submit(flight)
        await wait([flight], timeout_s + _GRACE_S)
        try:
            return self._take()
        except ConveyorError as error:
            if self.in_doubt or isinstance(error, NotFound | PositionConflict | EpochConflict | ProtocolError):
                raise
            return None

    async def _settle_reset(self, timeout_s: float) -> None:
        with self._explained():
            session = await find_session(self._connection, self.session_id, self._connection.deadline(timeout_s))
        if session.epoch == self._epoch:
            self._resetting = False
        else:
            self._begin_anew(session)

    def _begin_anew(self, session: pb.Session) -> None:
        self._resetting = False
        self._epoch = session.epoch
        self._position = session.position

    def _submit(self, flight: Flight) -> None:
        self._stream.submit(flight)
        self._pending = flight

    def _take(self) -> Outputs:
        """Takes the answer to the step that is under way, if it is there, and moves to where it says."""
        flight = self._pending
        assert flight is not None
        if not flight.ended:
            raise TimedOut(
                f"no answer in time: session {self.session_id!r} stands at position {self._position}, and whether the "
                f"{flight.chunks.steps} steps sent there were applied is not known yet; settle() finds out"
            )
        if flight.failure is not None:
            raise flight.failure
        self._pending = None
        if flight.error is not None:
            raise self._explain(flight.error)
        results = flight.results
        assert results is not None
        self._position += results.steps
        if results.steps != flight.chunks.steps:
            raise ProtocolError(
                f"a chunk of {flight.chunks.steps} steps was sent, and the reply is to one of {results.steps}: "
                f"session {self.session_id!r} is used by someone else too"
            )
        return results.row(flight.place)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (SessionUnknown, EpochConflict) as error:
            raise self._explain(error) from None

    def _explain(self, error: ConveyorError) -> ConveyorError:
        stood = f"session {self.session_id!r} stood at position {self._position}, and "
        if isinstance(error, SessionUnknown):
            return SessionLost(
                stood + "the server no longer knows it: it restarted, or another handle closed the session"
            )
        if isinstance(error, EpochConflict):
            return EpochConflict(stood + f"someone else has reset it or opened it anew; attach() goes on: {error}")
        return error


def group(chunks: Iterable[tuple[AsyncSession, Inputs]]) -> list[Group]:
    """Brings together the chunks of one model that have the same shapes and dtypes, in the order given.

    Raises:
        InvalidRequest: an input does not fit its model.
    """
    groups: dict[Hashable, tuple[list[AsyncSession], list[list[Array]]]] = {}
    for session, x in chunks:
        model = session.model
        arrays = read_chunk(model, x)
        key = (model.name, model.version, *[(array.shape, array.dtype) for array in arrays])
        sessions, together = groups.setdefault(key, ([], []))
        sessions.append(session)
        together.append(arrays)
    return [(sessions, lay_chunks(sessions[0].model, together)) for sessions, together in groups.values()]


def side_by_side(sessions: Sequence[AsyncSession], x: Inputs | None) -> Group:
    """A chunk for each of many sessions of one model, out of arrays that hold all of them.

    Raises:
        InvalidRequest: an input does not fit the model or the number of sessions; there are none, or of several models,
            or one twice; or the model leaves open how large an output is, so that they may not go into one array.
    """
    if not sessions or x is None:
        raise InvalidRequest("expected a mapping of chunks by session, or at least one session and x")
    if len(set(sessions)) != len(sessions):
        raise InvalidRequest("a session stands there twice; it takes one chunk at a time")
    models = {(session.model.name, session.model.version) for session in sessions}
    if len(models) != 1:
        raise InvalidRequest(f"sessions of {len(models)} models do not go into one array; give chunks by session")
    model = sessions[0].model
    chunks = copy_chunks(model, read_chunk(model, x), len(sessions))
    if chunks.output_bytes is None:
        raise InvalidRequest(f"model {model.name!r} leaves sizes of its outputs open; give chunks by session")
    return sessions, chunks


async def step_sessions(groups: Iterable[Group], timeout_s: float) -> dict[AsyncSession, Outputs | ConveyorError]:
    """Applies one chunk to each of many sessions of one client, and says for each its outputs or what went wrong."""
    rows = [(session, chunks, row) for sessions, chunks in groups for row, session in enumerate(sessions)]
    outcomes: dict[AsyncSession, Outputs | ConveyorError] = {session: None for session, _, _ in rows}
    if not outcomes:
        return outcomes
    flights: list[Flight] = []
    locked: list[asyncio.Lock] = []
    try:
        # One order for everybody, so that two calls cannot each hold what the other waits for.
        for session in sorted(outcomes, key=lambda each: (each.session_id, id(each))):
            await session._lock.acquire()
            locked.append(session._lock)
        clock = rows[0][0]._connection.settings.clock
        deadline = clock() + timeout_s
        unclear = [session for session in outcomes if session._closed or session.in_doubt]
        outcomes |= zip(
            unclear, await asyncio.gather(*(_why_not_ready(each, timeout_s) for each in unclear)), strict=True
        )
        # Nothing is awaited between the first chunk and the last: all leave together, and none is sent unwatched.
        for session, chunks, row in rows:
            if outcomes[session] is None:
                flight = Flight(chunks, row, session.session_id, session._position, session._epoch, deadline)
                try:
                    session._submit(flight)
                except ConveyorError as error:
                    outcomes[session] = error
                else:
                    flights.append(flight)
        await wait(flights, max(0.0, deadline - clock()) + _GRACE_S)
        for session in outcomes:
            if outcomes[session] is None:
                try:
                    outcomes[session] = session._take()
                except ConveyorError as error:
                    outcomes[session] = error
    finally:
        for lock in locked:
            lock.release()
    return outcomes


async def _why_not_ready(session: AsyncSession, timeout_s: float) -> ConveyorError | None:
    try:
        await session._ready(timeout_s)
    except ConveyorError as error:
        return error
    return None
