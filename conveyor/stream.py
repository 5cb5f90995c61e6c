"""The one stream that carries the chunks of all sessions of a client: batches what queued, reconnects, sends again.

A chunk says the position at which it starts, so it can be sent any number of times: the server applies it once and
repeats its reply. Whatever has not been answered when the connection breaks is therefore sent again on the next one.

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
from conveyor.errors import Cancelled, ConnectionLost, ConveyorError, InvalidRequest, Unavailable, from_rpc
from conveyor.v1 import conveyor_pb2 as pb

_BATCH_BYTES = 2**20
"""Chunks go together into one message up to this size; a larger chunk goes alone."""


@dataclass(eq=False)
class Flight:
    """A chunk on its way, from its submission to its answer.

    Attributes:
        chunk: what is sent.
        size_bytes: of the chunk on the wire.
        deadline: on the client's clock.
        answer: the server's result, or the error with which the stream gave up.
        abandoned: nobody waits any more. Sent again, the chunk then asks what became of it rather than to be applied.
        resent: a copy of it went out on a connection that broke since.
    """

    chunk: pb.Chunk
    size_bytes: int
    deadline: float
    answer: asyncio.Future[pb.ChunkResult]
    abandoned: bool = False
    resent: bool = False


class ChunkStream:
    """Sends chunks and hands back their results over any number of successive connections."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._settings = connection.settings
        self._flights: dict[str, Flight] = {}
        self._outbox: deque[Flight] = deque()
        self._wake = asyncio.Event()
        self._heard = False
        self._task: asyncio.Task[None] | None = None

    def submit(self, chunk: pb.Chunk, timeout_s: float, *, abandoned: bool = False) -> Flight:
        """Queues a chunk of a session that has none under way; it leaves with whatever else queues meanwhile.

        Raises:
            InvalidRequest: the chunk is larger than a message may be, or the client has been closed.
        """
        self._connection.check_open()
        size_bytes = chunk.ByteSize()
        # The message around it adds a tag and a length, and the deadline when it is set.
        if size_bytes + 32 > self._settings.max_message_bytes:
            raise InvalidRequest(
                f"a chunk of {size_bytes} bytes does not fit into a message of {self._settings.max_message_bytes}"
            )
        answer: asyncio.Future[pb.ChunkResult] = asyncio.get_running_loop().create_future()
        flight = Flight(chunk, size_bytes, self._settings.clock() + timeout_s, answer, abandoned)
        self._flights[chunk.session_id] = flight
        self._outbox.append(flight)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="conveyor stream")
            self._task.add_done_callback(self._ended)
        return flight

    async def close(self) -> None:
        """Ends the stream; chunks under way stay in doubt."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
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
                self._fail_all(error)
            if self._flights:
                await settings.sleep(delay_s)
                attempt += 1
                self._wake.set()
            else:
                # Nothing is lost with an idle stream: the next chunk opens another.
                attempt = 0
                self._wake.clear()
            self._outbox = deque(self._flights.values())
            for flight in self._outbox:
                flight.resent = True

    async def _carry(self, call: Any) -> ConveyorError:
        """Writes and reads until the stream ends; says why it did."""
        writer = asyncio.create_task(self._write(call), name="conveyor stream writer")
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                self._heard = True
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
        now = self._settings.clock()
        while self._outbox and (not size_bytes or size_bytes + self._outbox[0].size_bytes <= _BATCH_BYTES):
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
        if result.error.reason == Cancelled.reason and flight.resent and not flight.abandoned:
            # The server dropped the copy from the broken connection, and this one with it: neither was applied.
            flight.resent = False
            self._outbox.append(flight)
            self._wake.set()
            return
        del self._flights[result.session_id]
        flight.answer.set_result(result)

    def _fail_all(self, error: BaseException) -> None:
        for flight in self._flights.values():
            chunk = flight.chunk
            failure = copy.copy(error) if isinstance(error, ConveyorError) else ConveyorError()
            stands = f"session {chunk.session_id!r} stands at position {chunk.position}"
            failure.args = (f"{stands}, and whether the chunk sent there was applied is not known: {error}",)
            flight.answer.set_exception(failure)
            # Looked at, so that asyncio does not complain should nobody do so any more.
            flight.answer.exception()
        self._flights.clear()
        self._outbox.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(error)
