"""One Stream call: chunks in, results out, as they become ready.

Owns the stream's order of reading and writing, and how much of it may be unanswered. Reading and writing go on side by
side: what finishes while a message is being written leaves together in the next one. When the call ends early, what it
had not been answered is given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Any

import grpc

from conveyor.v1 import conveyor_pb2 as pb
from service.errors import ConveyorError, Draining, InvalidRequest
from service.manifest import TensorSpec
from service.operations import Operations
from service.runner import Runner
from service.session import Pending, Reply, Session
from service.wire.codec import Codec, encode
from service.wire.malformed import Malformed
from service.wire.status import abort, detail

_RESPONSE_BYTES = 1 << 20
"""A message is closed once it holds this much: clients take 4 MiB by default."""


class Stream:
    """One call.

    Args:
        operations: what is asked.
        codec: gives a model's reader.
        owner: digest of the caller's key.
        limit: most chunks taken in and not answered; over it the stream is not read.
        limit_bytes: most bytes of results that wait to be written; over it the stream is not read either.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        operations: Operations,
        codec: Callable[[Runner], Codec],
        owner: bytes,
        limit: int,
        limit_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._operations = operations
        self._codec = codec
        self._owner = owner
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._result_bytes = 0
        self._clock = clock
        self._waiting: set[_Waiting] = set()
        self._results: deque[pb.ChunkResult] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._ending = False

    async def run(
        self, requests: AsyncIterable[pb.StreamRequest | Malformed], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Serve the call until the client half-closes and all is answered, or it goes away, or ``end`` is called."""
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            await self._write(reader, context)
            if self._ending:
                await abort(context, Draining("the server is about to stop; go on elsewhere, or later"))
            try:
                await reader
            except Exception as error:
                await abort(context, error)
        finally:
            reader.cancel()
            for waiting in self._waiting:
                waiting.abandon(self._operations)
            # Nobody reads them any more: do not hold them until the collector comes by.
            self._waiting.clear()
            self._results.clear()

    def end(self) -> None:
        """Answer what was taken in, then end the call."""
        self._ending = True
        self._wake.set()

    async def _read(self, requests: AsyncIterable[pb.StreamRequest | Malformed]) -> None:
        async for request in requests:
            if isinstance(request, Malformed):
                raise request.error
            for chunk in request.chunks:
                while len(self._waiting) + len(self._results) >= self._limit or self._result_bytes >= self._limit_bytes:
                    self._room.clear()
                    await self._room.wait()
                self._accept(chunk)

    async def _write(self, reader: asyncio.Task[None], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            if self._results:
                response = pb.StreamResponse()
                size = 0
                while self._results and size < _RESPONSE_BYTES:
                    result = self._results.popleft()
                    size += result.ByteSize()
                    response.results.append(result)
                self._result_bytes -= size
                self._room.set()
                await context.write(response)
            elif not self._waiting and (reader.done() or self._ending):
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _accept(self, chunk: pb.Chunk) -> None:
        try:
            session = self._operations.find(self._owner, chunk.session_id)
            runner = self._operations.runner(session)
            if chunk.position < 0 or chunk.timeout_us < 0:
                raise InvalidRequest(
                    f"position is {chunk.position} and timeout_us {chunk.timeout_us}; expected neither to be negative"
                )
            inputs = self._codec(runner).chunk(chunk.inputs)
            deadline = self._clock() + chunk.timeout_us * 1e-6 if chunk.timeout_us else None
            waiting = _Waiting(self, session, runner, chunk.position)
            self._waiting.add(waiting)
            try:
                waiting.pending = self._operations.step(
                    session, runner, chunk.epoch, chunk.position, inputs, deadline, waiting
                )
            except BaseException:
                self._waiting.discard(waiting)
                raise
        except Exception as error:
            self._put(pb.ChunkResult(session_id=chunk.session_id, position=chunk.position, error=detail(error)))

    def answered(self, waiting: _Waiting, result: pb.ChunkResult) -> None:
        """Take a chunk's result."""
        self._waiting.discard(waiting)
        self._put(result)

    def _put(self, result: pb.ChunkResult) -> None:
        self._results.append(result)
        self._result_bytes += result.ByteSize()
        self._wake.set()


class _Waiting:
    """A chunk of this stream that is not answered yet."""

    __slots__ = ("_position", "_runner", "_session", "_stream", "pending")

    def __init__(self, stream: Stream, session: Session, runner: Runner, position: int) -> None:
        self.pending: Pending | None = None
        self._stream = stream
        self._session = session
        self._runner = runner
        self._position = position

    def answer(self, result: Reply | ConveyorError) -> None:
        message = pb.ChunkResult(session_id=self._session.identity, position=self._position)
        if isinstance(result, Reply):
            message.steps = result.steps
            message.outputs.extend(_tensors(self._runner.manifest.outputs, result.outputs))
        else:
            message.error.CopyFrom(detail(result))
        self._stream.answered(self, message)

    def abandon(self, operations: Operations) -> None:
        if self.pending is not None:
            operations.abandon(self._session, self._runner, self.pending, self)


def _tensors(specs: Sequence[TensorSpec], arrays: Sequence[object]) -> list[pb.Tensor]:
    return [encode(spec.name, array) for spec, array in zip(specs, arrays, strict=True)]  # type: ignore[arg-type]
