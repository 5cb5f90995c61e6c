"""The one stream that carries the chunks of all sessions of a client: batches what queued, reconnects, sends again.

A chunk says the position at which it starts, so it can be sent any number of times: the server applies it once and
repeats its reply. Whatever has not been answered when the connection breaks is therefore sent again on the next one,
and what a server cannot take now, because it drains or loads, a little later. A block is only how chunks travel that
were laid side by side: what has to be sent again of one travels in another, or alone.

Knows chunks and their results; must not know tensors' contents, nor what a session is beyond its id.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import deque
from typing import Any

import grpc

from conveyor.chunks import Results
from conveyor.connection import Connection
from conveyor.errors import ConnectionLost, ConveyorError, InvalidRequest, Unavailable, from_detail, from_rpc
from conveyor.flight import Flight
from conveyor.v1 import conveyor_pb2 as pb

_BATCH_BYTES = 2**20
"""Chunks go together into one message up to this size; a larger chunk goes alone."""


class ChunkStream:
    """Sends chunks and hands back their results over any number of successive connections."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._settings = connection.settings
        self._outage = connection.outage
        self._flights: dict[str, Flight] = {}
        self._blocks: dict[int, list[Flight]] = {}
        self._tags = itertools.count(1)
        self._outbox: deque[Flight] = deque()
        self._refused: list[Flight] = []
        self._wake = asyncio.Event()
        self._heard = False
        self._task: asyncio.Task[None] | None = None
        self._pause: asyncio.Task[None] | None = None

    def submit(self, flight: Flight) -> None:
        """Queues a chunk of a session that has none under way; it leaves with whatever else queues meanwhile.

        Raises:
            InvalidRequest: the chunk is larger than a message may be, another handle of the session has one under way,
                or the client has been closed.
        """
        self._connection.check_open()
        if flight.size_bytes > self._connection.max_message_bytes:
            request = pb.StreamRequest(chunks=[self._chunk(flight, self._settings.clock())])
            if request.ByteSize() > self._connection.max_message_bytes:
                raise InvalidRequest(
                    f"a chunk of {request.chunks[0].ByteSize()} bytes does not fit into a message of "
                    f"{self._connection.max_message_bytes}; send fewer steps at a time"
                )
        if flight.session_id in self._flights:
            # Their results could not be told apart.
            raise InvalidRequest(
                f"a chunk of session {flight.session_id!r} is under way already, from another handle of it in this "
                "client; use one handle, or wait for the other's step, and if it was cancelled, settle it"
            )
        self._flights[flight.session_id] = flight
        self._outbox.append(flight)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="conveyor stream")
            self._task.add_done_callback(self._ended)

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
            delay_s = settings.pause_s(attempt, lost_at)
            # A server that drains ends its streams; another one, or the same one restarted, may take the sessions on.
            if not delay_s or not isinstance(error, Unavailable):
                self._fail_all(self._connection.given_up(error, lost_at))
            if self._flights:
                self._outage.begin(self, error)
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
            self._blocks.clear()

    async def _carry(self, call: Any) -> ConveyorError:
        """Writes and reads until the stream ends; says why it did."""
        writer = asyncio.create_task(self._write(call), name="conveyor stream writer")
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                for result in response.results:
                    self._land(result)
                for block_result in response.block_results:
                    self._land_block(block_result)
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
        together: list[Flight] = []
        while self._outbox and (not size_bytes or size_bytes + self._outbox[0].size_bytes <= limit_bytes):
            flight = self._outbox.popleft()
            size_bytes += flight.size_bytes
            if together and not _go_together(together, flight, limit_bytes):
                self._load(request, together, now)
                together = []
            together.append(flight)
        self._load(request, together, now)
        return request

    def _load(self, request: pb.StreamRequest, flights: list[Flight], now: float) -> None:
        """Adds chunks that go together to a message."""
        if len(flights) == 1:
            request.chunks.append(self._chunk(flights[0], now))
            return
        tag = next(self._tags)
        self._blocks[tag] = flights
        block = pb.Block(
            tag=tag,
            session_ids=[flight.session_id for flight in flights],
            positions=[flight.position for flight in flights],
            inputs=flights[0].chunks.tensors([flight.row for flight in flights]),
            timeout_us=_timeout_us(flights[0], now),
            epochs=[flight.epoch for flight in flights],
        )
        request.blocks.append(block)

    def _chunk(self, flight: Flight, now: float) -> pb.Chunk:
        return pb.Chunk(
            session_id=flight.session_id,
            position=flight.position,
            inputs=flight.chunks.tensors([flight.row]),
            timeout_us=_timeout_us(flight, now),
            epoch=flight.epoch,
        )

    def _land(self, result: pb.ChunkResult) -> None:
        flight = self._flights.get(result.session_id)
        if flight is None or flight.position != result.position:
            return
        if result.HasField("error"):
            self._refuse(flight, from_detail(result.error))
        else:
            self._end(flight, Results(flight.chunks, result.steps, result.outputs), 0)

    def _land_block(self, result: pb.BlockResult) -> None:
        flights = self._blocks.pop(result.tag, None)
        if flights is None:
            return
        if result.HasField("error"):
            self._refuse_block(flights, result.error)
            return
        refused = {refusal.index: refusal.error for refusal in result.errors}
        results = Results(flights[0].chunks, result.steps, result.outputs, len(flights))
        for place, flight in enumerate(flights):
            if flight.ended:
                continue
            if place in refused:
                self._refuse_in_block(flight, from_detail(refused[place]))
            else:
                self._end(flight, results, place)

    def _refuse_block(self, flights: list[Flight], detail: pb.ErrorDetail) -> None:
        for flight in flights:
            if not flight.ended:
                self._refuse_in_block(flight, from_detail(detail))

    def _refuse_in_block(self, flight: Flight, error: ConveyorError) -> None:
        if isinstance(error, InvalidRequest):
            # There may be too many together, or this one may not go with the others: that is no word on the chunk. It
            # is sent again, and told by itself.
            flight.alone = True
            self._outbox.append(flight)
            self._wake.set()
        else:
            self._refuse(flight, error)

    def _end(self, flight: Flight, results: Results, place: int) -> None:
        self._heard = True
        self._outage.end(self, flight)
        self._drop(flight)
        flight.end(results, place)

    def _refuse(self, flight: Flight, error: ConveyorError) -> None:
        if isinstance(error, Unavailable):
            if self._postpone(flight, error):
                return
            if flight.lost:
                # A server that is not in service says nothing of what another one, or itself before, may have applied.
                self._fail(flight, error)
                return
        self._heard = True
        if not isinstance(error, Unavailable):
            self._outage.end(self, flight)
        self._drop(flight)
        flight.end(error=error)

    def _postpone(self, flight: Flight, error: ConveyorError) -> bool:
        """Sends a chunk again later that the server cannot take now, unless it has been trying for too long."""
        now = self._settings.clock()
        if flight.refused_at is None:
            flight.refused_at = now
        delay_s = self._settings.pause_s(flight.refusals, flight.refused_at)
        flight.refusals += 1
        if not delay_s or now + delay_s > flight.deadline:
            return False
        self._refused.append(flight)
        self._outage.begin(flight, error)
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

    def _drop(self, flight: Flight) -> None:
        del self._flights[flight.session_id]
        self._outage.leave(flight)
        if not self._flights:
            self._outage.leave(self)

    def _fail(self, flight: Flight, error: BaseException) -> None:
        self._drop(flight)
        failure = copy.copy(error) if isinstance(error, ConveyorError) else ConveyorError()
        stands = f"session {flight.session_id!r} stands at position {flight.position}"
        failure.args = (f"{stands}, and whether the chunk sent there was applied is not known: {error}",)
        flight.end(failure=failure)

    def _fail_all(self, error: BaseException) -> None:
        for flight in list(self._flights.values()):
            self._fail(flight, error)
        self._outbox.clear()
        self._refused.clear()
        self._blocks.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(error)


def _go_together(flights: list[Flight], flight: Flight, limit_bytes: int) -> bool:
    """Whether a chunk goes into one block with others; those of one call that are not abandoned have one deadline."""
    first = flights[0]
    return (
        flight.chunks is first.chunks
        and flight.abandoned == first.abandoned
        and not flight.alone
        and not first.alone
        and len(flights) < first.chunks.block_size(limit_bytes)
    )


def _timeout_us(flight: Flight, now: float) -> int:
    return max(1, int((0.0 if flight.abandoned else flight.deadline - now) * 1e6))
