"""The one stream that carries the chunks of all sessions of a client: batches what queued, reconnects, sends again.

A chunk says the position at which it starts, so it can be sent any number of times: the server applies it once and
repeats its reply. Whatever has not been answered when the connection breaks is therefore sent again on the next one,
and what a server cannot take now, because it drains or loads, a little later.

Knows chunks and their results; must not know tensors' contents, nor what a session is beyond its id.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from dataclasses import dataclass
from typing import Any

import grpc

from conveyor.connection import Connection
from conveyor.errors import ConnectionLost, ConveyorError, InvalidRequest, Unavailable, from_detail, from_rpc
from conveyor.v1 import conveyor_pb2 as pb

_BATCH_BYTES = 2**20
"""Chunks go together into one message up to this size; a larger chunk goes alone."""

_FRAME_BYTES = 32
"""More than a message adds to a chunk: a tag, a length, and the deadline that is set when it leaves."""


@dataclass(eq=False)
class Flight:
    """A chunk on its way, from its submission to its answer.

    Attributes:
        chunk: what is sent.
        size_bytes: of the chunk in a message.
        deadline: on the client's clock.
        answer: the server's result, or the error with which the stream gave up.
        abandoned: nobody waits any more. Sent again, the chunk then asks what became of it rather than to be applied.
        lost: a copy of it went out on a connection that broke since, and may have been applied.
        refused_at: when the server first said that it cannot take it now; None if it has not.
        refusals: how often it said so.
    """

    chunk: pb.Chunk
    size_bytes: int
    deadline: float
    answer: asyncio.Future[pb.ChunkResult]
    abandoned: bool = False
    lost: bool = False
    refused_at: float | None = None
    refusals: int = 0


class ChunkStream:
    """Sends chunks and hands back their results over any number of successive connections."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._settings = connection.settings
        self._flights: dict[str, Flight] = {}
        self._outbox: deque[Flight] = deque()
        self._refused: list[Flight] = []
        self._wake = asyncio.Event()
        self._heard = False
        self._task: asyncio.Task[None] | None = None
        self._pause: asyncio.Task[None] | None = None

    def submit(self, chunk: pb.Chunk, timeout_s: float, *, abandoned: bool = False) -> Flight:
        """Queues a chunk of a session that has none under way; it leaves with whatever else queues meanwhile.

        Raises:
            InvalidRequest: the chunk is larger than a message may be, another handle of the session has one under way,
                or the client has been closed.
        """
        self._connection.check_open()
        size_bytes = chunk.ByteSize() + _FRAME_BYTES
        if size_bytes > self._connection.max_message_bytes:
            raise InvalidRequest(
                f"a chunk of {chunk.ByteSize()} bytes does not fit into a message of "
                f"{self._connection.max_message_bytes}; send fewer steps at a time"
            )
        if chunk.session_id in self._flights:
            # Their results could not be told apart.
            raise InvalidRequest(
                f"a chunk of session {chunk.session_id!r} is under way already, from another handle of it in this "
                "client; use one handle, or wait for the other's step, and if it was cancelled, settle it"
            )
        answer: asyncio.Future[pb.ChunkResult] = asyncio.get_running_loop().create_future()
        # What is abandoned from the start asks about a copy that went out before.
        flight = Flight(chunk, size_bytes, self._settings.clock() + timeout_s, answer, abandoned, lost=abandoned)
        self._flights[chunk.session_id] = flight
        self._outbox.append(flight)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="conveyor stream")
            self._task.add_done_callback(self._ended)
        return flight

    async def close(self) -> None:
        """Ends the stream; chunks under way stay in doubt."""
        tasks = [task for task in (self._task, self._pause) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._fail_all(ConnectionLost("the client was closed"))

    async def _run(self) -> None:
        settings = self._settings
        attempt = 0
        lost_at = 0.0
        while True:
            await self._wake.wait()
            self._heard = False
            error = await self._carry(self._connection.stream())
            if self._heard or not attempt:
                attempt = 0
                lost_at = settings.clock()
            delay_s = settings.backoff.delay_s(attempt)
            gives_up = settings.clock() + delay_s - lost_at > settings.reconnect_timeout_s
            # A server that drains ends its streams; another one, or the same one restarted, may take the sessions on.
            if gives_up or not isinstance(error, Unavailable):
                self._fail_all(self._connection.given_up(error, lost_at))
            if self._flights:
                await settings.sleep(delay_s)
                attempt += 1
                self._wake.set()
            else:
                # Nothing is lost with an idle stream: the next chunk opens another.
                attempt = 0
                self._wake.clear()
            unsent = {*self._outbox, *self._refused}
            for flight in self._flights.values():
                flight.lost |= flight not in unsent
            self._outbox = deque(self._flights.values())
            self._refused.clear()

    async def _carry(self, call: Any) -> ConveyorError:
        """Writes and reads until the stream ends; says why it did."""
        writer = asyncio.create_task(self._write(call), name="conveyor stream writer")
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                for result in response.results:
                    self._land(result)
            return ConnectionLost("the server ended the stream")
        except grpc.aio.AioRpcError as error:
            return from_rpc(error)
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.wait([writer])

    async def _write(self, call: Any) -> None:
        try:
            while True:
                while self._outbox:
                    await call.write(self._next_request())
                self._wake.clear()
                await self._wake.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The reader learns why the stream ended.

    def _next_request(self) -> pb.StreamRequest:
        request = pb.StreamRequest()
        size_bytes = 0
        limit_bytes = min(_BATCH_BYTES, self._connection.max_message_bytes)
        now = self._settings.clock()
        while self._outbox and (not size_bytes or size_bytes + self._outbox[0].size_bytes <= limit_bytes):
            flight = self._outbox.popleft()
            left_s = 0.0 if flight.abandoned else flight.deadline - now
            flight.chunk.timeout_us = max(1, int(left_s * 1e6))
            request.chunks.append(flight.chunk)
            size_bytes += flight.size_bytes
        return request

    def _land(self, result: pb.ChunkResult) -> None:
        flight = self._flights.get(result.session_id)
        if flight is None or flight.chunk.position != result.position:
            return
        error = from_detail(result.error) if result.HasField("error") else None
        if isinstance(error, Unavailable):
            if self._postpone(flight):
                return
            if flight.lost:
                # A server that is not in service says nothing of what another one, or itself before, may have applied.
                self._fail(flight, error)
                return
        self._heard = True
        del self._flights[result.session_id]
        flight.answer.set_result(result)

    def _postpone(self, flight: Flight) -> bool:
        """Sends a chunk again later that the server cannot take now, unless it has been trying for too long."""
        now = self._settings.clock()
        if flight.refused_at is None:
            flight.refused_at = now
        delay_s = self._settings.backoff.delay_s(flight.refusals)
        flight.refusals += 1
        if now + delay_s > min(flight.deadline, flight.refused_at + self._settings.reconnect_timeout_s):
            return False
        self._refused.append(flight)
        if self._pause is None:
            # All that are refused meanwhile leave together after it.
            self._pause = asyncio.create_task(self._resend(delay_s), name="conveyor stream pause")
        return True

    async def _resend(self, delay_s: float) -> None:
        await self._settings.sleep(delay_s)
        self._pause = None
        self._outbox.extend(self._refused)
        self._refused.clear()
        self._wake.set()

    def _fail(self, flight: Flight, error: BaseException) -> None:
        chunk = flight.chunk
        del self._flights[chunk.session_id]
        failure = copy.copy(error) if isinstance(error, ConveyorError) else ConveyorError()
        stands = f"session {chunk.session_id!r} stands at position {chunk.position}"
        failure.args = (f"{stands}, and whether the chunk sent there was applied is not known: {error}",)
        flight.answer.set_exception(failure)
        # Looked at, so that asyncio does not complain should nobody do so any more.
        flight.answer.exception()

    def _fail_all(self, error: BaseException) -> None:
        for flight in list(self._flights.values()):
            self._fail(flight, error)
        self._outbox.clear()
        self._refused.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(error)
