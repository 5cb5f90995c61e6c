"""One way to ask both doors for the same things, so that a promise is one test and not one for each protocol.

A door opens sessions, steps and ends them, and runs batches. What the protocols do not share is not here: the native
door's forks and exports, the other one's rows for several sequences in one request.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as native_pb
from conveyor.v1 import conveyor_pb2_grpc as native_stubs
from service.server import Server
from service.session import Session
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_stubs import inference_pb2_grpc as stubs
from service.wire.status import DETAIL_KEY
from tests.graphs import OUTPUT
from tests.wire import inference, native

Array = NDArray[Any]
MODEL = "lstm"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive steps of a session, x [T, I], from a position on, in its present epoch unless another is given."""

    session: str
    position: int
    x: Array
    timeout_us: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a chunk was answered.

    Attributes:
        data: the bytes of the outputs; none with an error.
        error: the name of its status code; empty for none.
        text: of the error.
        position: where the session is, if the error says so.
    """

    data: bytes = b""
    error: str = ""
    text: str = ""
    position: int | None = None

    @property
    def y(self) -> Array:
        """The outputs [T, O]."""
        assert not self.error, self.text
        return np.frombuffer(self.data, "<f4").reshape(-1, OUTPUT)


Cancel = Callable[[], object]


class Door(Protocol):
    """A caller of one server, under one key."""

    async def open(self, session: str = "") -> str:
        """Open a session, or make ready to; return its id."""

    async def step(self, *chunks: Chunk) -> list[Answer]:
        """Send chunks without waiting in between where the protocol can, and return an answer for each."""

    async def begin(self, chunk: Chunk) -> Cancel:
        """Send a chunk in a call of its own, and return what cancels that."""

    async def restart(self, session: str) -> None:
        """Have the session's next chunk, at position 0, begin from the initial state, in a new epoch."""

    async def end(self, chunk: Chunk) -> Answer:
        """Step a last time, and end the session."""

    async def infer(
        self, x: Array, lengths: Sequence[int] = (), states: Sequence[Array] = ()
    ) -> tuple[Array, list[Array]]:
        """Run a batch [N, T, I]; return its outputs [N, T, O] and its final states, each [N, ...]."""

    async def begin_infer(self, x: Array) -> Cancel:
        """Send a batch, and return what cancels it."""

    def find(self, server: Server, session: str) -> Session:
        """The session, inside the server."""


class Native:
    """The native door: one stream for all chunks."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._stub = native_stubs.ConveyorServiceStub(channel)
        self._metadata = (("conveyor-key", key),) if key else ()
        self._owner = _digest(key)
        self._epochs: dict[str, int] = {}
        self._caller = native.Caller(self._stub, self._stub.Stream(metadata=self._metadata))

    async def open(self, session: str = "") -> str:
        """Open a session."""
        request = native_pb.OpenSessionRequest(model=MODEL, session_id=session)
        opened = (await self._stub.OpenSession(request, metadata=self._metadata)).session
        self._epochs[opened.session_id] = opened.epoch
        return str(opened.session_id)

    async def step(self, *chunks: Chunk) -> list[Answer]:
        """Send all in one message."""
        results = defaultdict(list)
        for result in await self._caller.step(*map(self._chunk, chunks)):
            results[result.session_id, result.position].append(result)
        return [self._answer(results[chunk.session, chunk.position].pop(0)) for chunk in chunks]

    async def begin(self, chunk: Chunk) -> Cancel:
        """Send a chunk on a stream of its own."""
        call = self._stub.Stream(metadata=self._metadata)
        await call.write(native_pb.StreamRequest(chunks=[self._chunk(chunk)]))
        return call.cancel  # type: ignore[no-any-return]

    async def restart(self, session: str) -> None:
        """Reset it."""
        reset = await self._stub.ResetSession(
            native_pb.ResetSessionRequest(session_id=session), metadata=self._metadata
        )
        self._epochs[session] = reset.session.epoch

    async def end(self, chunk: Chunk) -> Answer:
        """Step, then close."""
        (answer,) = await self.step(chunk)
        await self._stub.CloseSession(native_pb.CloseSessionRequest(session_id=chunk.session), metadata=self._metadata)
        return answer

    async def infer(
        self, x: Array, lengths: Sequence[int] = (), states: Sequence[Array] = ()
    ) -> tuple[Array, list[Array]]:
        """Run a batch."""
        named = [native.tensor(state, name) for name, state in zip(("h", "c"), states, strict=False)]
        reply = await self._stub.Infer(
            native_pb.InferRequest(
                model=MODEL, inputs=[native.tensor(x)], lengths=lengths, initial_states=named, return_states=True
            )
        )
        return native.array(reply.outputs[0]), [native.array(state) for state in reply.final_states]

    async def begin_infer(self, x: Array) -> Cancel:
        """Send a batch."""
        call = self._stub.Infer(native_pb.InferRequest(model=MODEL, inputs=[native.tensor(x)]))
        return call.cancel  # type: ignore[no-any-return]

    def find(self, server: Server, session: str) -> Session:
        """The session, inside the server."""
        return server.operations.sessions.find(self._owner, session)

    def _chunk(self, chunk: Chunk) -> native_pb.Chunk:
        message = native.chunk(chunk.session, chunk.position, chunk.x, chunk.timeout_us)
        message.epoch = chunk.epoch or self._epochs.get(chunk.session, 0)
        return message

    def _answer(self, result: native_pb.ChunkResult) -> Answer:
        if not result.HasField("error"):
            return Answer(result.outputs[0].data)
        error = result.error
        position = error.position if error.HasField("position") else None
        return Answer(b"", _CODES[error.code], error.message, position)


class Inference:
    """The door of the Open Inference Protocol; with positions and epochs, as the promises ask for."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._stub = stubs.GRPCInferenceServiceStub(channel)
        self._metadata = (("conveyor-key", key),) if key else ()
        self._owner = _digest(key) + b"/" + MODEL.encode()
        self._epochs: dict[str, int] = {}

    async def open(self, session: str = "") -> str:
        """Choose an id: its first chunk will say START."""
        session = session or f"session-{secrets.token_hex(8)}"
        await self.restart(session)
        return session

    async def restart(self, session: str) -> None:
        """Draw another epoch: the next chunk at position 0 will say START in it."""
        self._epochs[session] = secrets.randbits(62) + 1

    async def infer(
        self, x: Array, lengths: Sequence[int] = (), states: Sequence[Array] = ()
    ) -> tuple[Array, list[Array]]:
        """Run a batch."""
        inputs = {"x": x, **dict(zip(("h", "c"), states, strict=False))}
        if lengths:
            inputs["sequence_lengths"] = np.array(lengths, np.int32)
        reply = await self._stub.ModelInfer(inference.request(inputs, "y", "h", "c"))
        return inference.output(reply, "y"), [inference.output(reply, name) for name in ("h", "c")]

    async def begin_infer(self, x: Array) -> Cancel:
        """Send a batch."""
        return self._stub.ModelInfer(inference.request(x)).cancel  # type: ignore[no-any-return]

    def find(self, server: Server, session: str) -> Session:
        """The session, inside the server."""
        return server.operations.sessions.find(self._owner, session)

    def _request(self, chunk: Chunk, id: str = "", end: bool = False) -> pb.ModelInferRequest:
        return inference.request(
            chunk.x[None].astype(np.float32),
            id=id,
            sequence_id=chunk.session,
            sequence_position=chunk.position,
            sequence_epoch=chunk.epoch or self._epochs.get(chunk.session, 0),
            sequence_start=chunk.position == 0,
            sequence_end=end,
            timeout=chunk.timeout_us,
        )


class Streamed(Inference):
    """It, with one ModelStreamInfer call for all chunks."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        super().__init__(channel, key)
        self._call = self._stub.ModelStreamInfer(metadata=self._metadata)

    async def step(self, *chunks: Chunk) -> list[Answer]:
        """Send all at once; the replies of each session must come in the order of its chunks."""
        return await self._ask([self._request(chunk, str(n)) for n, chunk in enumerate(chunks)])

    async def end(self, chunk: Chunk) -> Answer:
        """Step with END."""
        (answer,) = await self._ask([self._request(chunk, "0", end=True)])
        return answer

    async def begin(self, chunk: Chunk) -> Cancel:
        """Send a chunk on a stream of its own."""
        call = self._stub.ModelStreamInfer(metadata=self._metadata)
        await call.write(self._request(chunk))
        return call.cancel  # type: ignore[no-any-return]

    async def _ask(self, requests: Sequence[pb.ModelInferRequest]) -> list[Answer]:
        for request in requests:
            await self._call.write(request)
        answers: dict[int, Answer] = {}
        newest: dict[str, int] = {}
        for _ in requests:
            reply = await self._call.read()
            assert isinstance(reply, pb.ModelStreamInferResponse), "the stream ended"
            n = int(reply.infer_response.id)
            session = requests[n].parameters["sequence_id"].string_param
            assert newest.get(session, -1) < n, "a session's replies are out of order"
            newest[session] = n
            told = inference.parameters(reply.infer_response)
            if reply.error_message:
                answers[n] = Answer(b"", told["error_code"], reply.error_message, told.get("sequence_position"))
            else:
                answers[n] = Answer(reply.infer_response.raw_output_contents[0])
        return [answers[n] for n in range(len(requests))]


class Unary(Inference):
    """It, with a ModelInfer call for each chunk."""

    async def step(self, *chunks: Chunk) -> list[Answer]:
        """Send one after the other."""
        return [await self._ask(self._request(chunk)) for chunk in chunks]

    async def end(self, chunk: Chunk) -> Answer:
        """Step with END."""
        return await self._ask(self._request(chunk, end=True))

    async def begin(self, chunk: Chunk) -> Cancel:
        """Send a chunk."""
        return self._stub.ModelInfer(self._request(chunk), metadata=self._metadata).cancel  # type: ignore[no-any-return]

    async def _ask(self, request: pb.ModelInferRequest) -> Answer:
        try:
            reply = await self._stub.ModelInfer(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            trailing: Mapping[str, Any] = dict(error.trailing_metadata() or ())
            detail = native_pb.ErrorDetail.FromString(trailing[DETAIL_KEY])
            position = detail.position if detail.HasField("position") else None
            return Answer(b"", error.code().name, error.details() or "", position)
        return Answer(reply.raw_output_contents[0])


DOORS: dict[str, Callable[[grpc.aio.Channel, str], Door]] = {
    "native": Native,
    "inference, streamed": Streamed,
    "inference, unary": Unary,
}

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest() if key else b""


@asynccontextmanager
async def through(name: str, server: Server, key: str = "") -> AsyncIterator[Door]:
    """Call a server through a door."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield DOORS[name](channel, key)
