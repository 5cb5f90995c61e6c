"""One Stream call of conveyor.v1: chunks in, results out.

Owns what a chunk and its result are made of; the order of things and their bounds are the flow's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from conveyor.v1 import conveyor_pb2 as pb
from service.errors import ConveyorError, InvalidRequest
from service.manifest import Manifest, TensorSpec
from service.operations import Operations
from service.runner import Runner
from service.session import Pending, Reply, Session
from service.wire.codec import Codec
from service.wire.conveyor_tensors import decode, encode
from service.wire.flow import Flow
from service.wire.status import detail

_RESPONSE_BYTES = 1 << 20
"""A message is closed once it holds this much: clients take 4 MiB by default."""


class Stream(Flow[pb.StreamRequest, pb.Chunk, pb.ChunkResult]):
    """One call.

    Args:
        operations: what is asked.
        codec: gives a model's reader.
        owner: digest of the caller's key.
        caller: among whom a model's time is shared out.
        limit: most chunks taken in and not answered; over it the stream is not read.
        limit_bytes: most bytes of results that wait to be written; over it the stream is not read either.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        operations: Operations,
        codec: Callable[[Manifest], Codec],
        owner: bytes,
        caller: Hashable,
        limit: int,
        limit_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(limit, limit_bytes)
        self._operations = operations
        self._codec = codec
        self._owner = owner
        self._caller = caller
        self._clock = clock

    def parts(self, request: pb.StreamRequest) -> Iterable[pb.Chunk]:
        """The chunks of a message."""
        return request.chunks

    def message(self) -> pb.StreamResponse:
        """As many results as one message should hold."""
        response = pb.StreamResponse()
        size = 0
        while size < _RESPONSE_BYTES and (taken := self.take()) is not None:
            response.results.append(taken[0])
            size += taken[1]
        return response

    def accept(self, chunk: pb.Chunk) -> None:
        """Queue a chunk, or answer it."""
        began, runner = self._clock(), None
        try:
            session = self._operations.find(self._owner, chunk.session_id)
            runner = self._operations.runner(session)
            if chunk.position < 0 or chunk.timeout_us < 0:
                raise InvalidRequest(
                    f"position is {chunk.position} and timeout_us {chunk.timeout_us}; expected neither to be negative"
                )
            inputs = self._codec(runner.manifest).chunk(decode(chunk.inputs))
            deadline = began + chunk.timeout_us * 1e-6 if chunk.timeout_us else None
            waiting = _Waiting(self, self._operations, session, runner, chunk.position, began)
            self.wait(waiting, max(chunk.ByteSize(), runner.manifest.reply_bytes(len(inputs[0]))))
            try:
                waiting.pending = self._operations.step(
                    session, runner, chunk.epoch, chunk.position, inputs, deadline, waiting, caller=self._caller
                )
            except BaseException:
                self.answered(waiting)
                raise
        except Exception as error:
            if runner is not None:
                self.count(runner, False, began)
            self.put(pb.ChunkResult(session_id=chunk.session_id, position=chunk.position, error=detail(error)))

    def count(self, runner: Runner, succeeded: bool, began: float) -> None:
        """Count a chunk that has ended."""
        runner.statistics.request(succeeded, self._clock() - began)


class _Waiting:
    """A chunk of this stream that is not answered yet."""

    __slots__ = ("_began", "_operations", "_position", "_runner", "_session", "_stream", "pending")

    def __init__(
        self,
        stream: Stream,
        operations: Operations,
        session: Session,
        runner: Runner,
        position: int,
        began: float,
    ) -> None:
        self.pending: Pending | None = None
        self._stream = stream
        self._operations = operations
        self._session = session
        self._runner = runner
        self._position = position
        self._began = began

    def answer(self, result: Reply | ConveyorError) -> None:
        message = pb.ChunkResult(session_id=self._session.identity, position=self._position)
        if isinstance(result, Reply):
            message.steps = result.steps
            message.outputs.extend(_tensors(self._runner.manifest.outputs, result.outputs))
        else:
            message.error.CopyFrom(detail(result))
        self._stream.count(self._runner, isinstance(result, Reply), self._began)
        self._stream.answered(self)
        self._stream.put(message)

    def abandon(self) -> None:
        self._stream.count(self._runner, False, self._began)
        if self.pending is not None:
            self._operations.abandon(self._session, self._runner, self.pending, self)


def _tensors(specs: Sequence[TensorSpec], arrays: Sequence[object]) -> list[pb.Tensor]:
    return [encode(spec.name, array) for spec, array in zip(specs, arrays, strict=True)]  # type: ignore[arg-type]
