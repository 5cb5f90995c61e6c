# ruff: noqa: D102 - what the calls do stands in the wire contract.
"""A small real gRPC server for tests of the client: its model is a running sum, and its faults are scripted.

It keeps the position protocol as the wire contract says: a chunk that was applied already gets its reply again, one out
of place a position conflict. It counts every application, so that a test can tell a step applied once from one applied
twice.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import grpc
import numpy as np

from conveyor import errors
from conveyor.tensors import Array, decode_tensor, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs

WIDTH = 2
"""Of the model's input, output and state."""

Response = TypeVar("Response")

_epochs = itertools.count(1)


@dataclass
class Fault:
    """What goes wrong with one chunk or call.

    Attributes:
        when: the connection breaks before the work is done, or after it and before its reply; or the reply comes twice,
            or behind the one to the chunk before; or the work waits until the test releases it, or its reply does.
        code: with which the connection breaks.
        text: of that status.
        detail: what the server says of it; nothing if None, as when the connection broke.
    """

    when: Literal["before", "after", "twice", "stale", "held", "kept"]
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    text: str = "Socket closed"
    detail: errors.ConveyorError | None = None

    async def abort(self, context: Any) -> None:
        """Ends a call."""
        if self.detail is not None:
            await _abort(context, self.detail)
        await context.abort(self.code, self.text)


@dataclass
class Held:
    """A session as the server has it."""

    total: Array = field(default_factory=lambda: np.zeros(WIDTH, np.float32))
    position: int = 0
    last: pb.ChunkResult | None = None
    epoch: int = field(default_factory=lambda: next(_epochs))


class SumServer(stubs.ConveyorServiceServicer):
    """The servicer.

    Attributes:
        sessions: open ones, by id.
        version: of the model.
        input: name of the model's input.
        applied: how often each (session, position) was applied.
        messages: how many chunks each StreamRequest held, in blocks or not.
        blocks: how many chunks each Block held.
        chunks: every chunk as it arrived, those of blocks too.
        streams: how many streams were opened.
        metadata: of the last call.
        calls: names of the unary calls that arrived.
        chunk_faults: for the chunks to come, in order of arrival; None for no fault.
        ragged: whether the last batch came without padding.
        call_faults: likewise for each unary call, by name.
        refusals: errors for the chunks to come, in-band; None for none.
        block_refusals: likewise for whole blocks.
        held: gets an item when a chunk or call is being held.
        released: what is held waits for this.
        ended: gets an item when a stream has ended.
        target: address, once it listens.

    Args:
        max_message_bytes: largest message that it takes, and says so; 0 for what gRPC takes, and no word of it.
    """

    def __init__(self, max_message_bytes: int = 0) -> None:
        self.max_message_bytes = max_message_bytes
        self.sessions: dict[str, Held] = {}
        self.version = 1
        self.input = "x"
        self.applied: dict[tuple[str, int], int] = defaultdict(int)
        self.messages: list[int] = []
        self.blocks: list[int] = []
        self.chunks: list[pb.Chunk] = []
        self.streams = 0
        self.ragged = False
        self.metadata: dict[str, str | bytes] = {}
        self.calls: list[str] = []
        self.chunk_faults: deque[Fault | None] = deque()
        self.call_faults: dict[str, deque[Fault | None]] = defaultdict(deque)
        self.refusals: deque[pb.ErrorDetail | None] = deque()
        self.block_refusals: deque[pb.ErrorDetail | None] = deque()
        self.held: asyncio.Queue[None] = asyncio.Queue()
        self.released = asyncio.Event()
        self.ended: asyncio.Queue[None] = asyncio.Queue()
        self.target = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        """Listens on a port; 0 for a free one."""
        limit = [("grpc.max_receive_message_length", self.max_message_bytes)] if self.max_message_bytes else []
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *limit])
        stubs.add_ConveyorServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def stop(self) -> None:
        """Cuts every connection."""
        assert self._server is not None
        await self._server.stop(None)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.target.rpartition(":")[2])

    # --- the wire contract ---

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return await self._call("ListModels", context, lambda: pb.ListModelsResponse(models=[self._model()]))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        def described() -> pb.GetModelResponse:
            _check_model(request.model)
            return pb.GetModelResponse(model=self._model())

        return await self._call("GetModel", context, described)

    async def Infer(self, request: pb.InferRequest, context: Any) -> pb.InferResponse:
        def infer() -> pb.InferResponse:
            self.ragged = request.ragged
            x = decode_tensor(request.inputs[0])
            lengths = list(request.lengths) or [x.shape[1]] * len(x)
            sequences = np.split(x, np.cumsum(lengths)[:-1]) if request.ragged else x
            initial = decode_tensor(request.initial_states[0]) if request.initial_states else [np.zeros(WIDTH)] * len(x)
            rows = [
                (start + np.cumsum(sequence[:length], 0)).astype(np.float32)
                for start, sequence, length in zip(initial, sequences, lengths, strict=False)
            ]
            steps = 0 if request.ragged else x.shape[1]
            padded = [np.pad(row, ((0, max(0, steps - len(row))), (0, 0))) for row in rows]
            return pb.InferResponse(
                version=self.version,
                outputs=[encode_tensor("y", np.concatenate(padded) if request.ragged else np.stack(padded))],
                final_states=[encode_tensor("s", np.stack([row[-1] for row in rows]))] if request.return_states else [],
            )

        return await self._call("Infer", context, infer)

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:
        def opened() -> pb.OpenSessionResponse:
            _check_model(request.model)
            held = Held()
            if request.initial_states:
                held.total = decode_tensor(request.initial_states[0])
            return pb.OpenSessionResponse(session=self._add(request.session_id, held))

        return await self._call("OpenSession", context, opened)

    async def GetSession(self, request: pb.GetSessionRequest, context: Any) -> pb.GetSessionResponse:
        return await self._call(
            "GetSession", context, lambda: pb.GetSessionResponse(session=self._describe(request.session_id))
        )

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Any) -> pb.ForkSessionResponse:
        def fork() -> pb.ForkSessionResponse:
            held = self._find(request.session_id)
            self._check_position(request, held)
            copy = Held(held.total, held.position)
            return pb.ForkSessionResponse(session=self._add(request.new_session_id, copy))

        return await self._call("ForkSession", context, fork)

    async def ResetSession(self, request: pb.ResetSessionRequest, context: Any) -> pb.ResetSessionResponse:
        def reset() -> pb.ResetSessionResponse:
            held = self._find(request.session_id)
            _check_epoch(request, held)
            self._check_position(request, held)
            self.sessions[request.session_id] = Held()
            return pb.ResetSessionResponse(session=self._describe(request.session_id))

        return await self._call("ResetSession", context, reset)

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:
        def close() -> pb.CloseSessionResponse:
            position = self._find(request.session_id).position
            del self.sessions[request.session_id]
            return pb.CloseSessionResponse(position=position)

        return await self._call("CloseSession", context, close)

    async def ExportSession(self, request: pb.ExportSessionRequest, context: Any) -> pb.ExportSessionResponse:
        def export() -> pb.ExportSessionResponse:
            held = self._find(request.session_id)
            states = [encode_tensor("s", held.total)]
            return pb.ExportSessionResponse(
                state=pb.SessionState(model="sum", version=self.version, position=held.position, states=states)
            )

        return await self._call("ExportSession", context, export)

    async def ImportSession(self, request: pb.ImportSessionRequest, context: Any) -> pb.ImportSessionResponse:
        def enter() -> pb.ImportSessionResponse:
            held = Held(decode_tensor(request.state.states[0]), request.state.position)
            return pb.ImportSessionResponse(session=self._add(request.session_id, held))

        return await self._call("ImportSession", context, enter)

    async def Stream(self, requests: AsyncIterable[pb.StreamRequest], context: Any) -> None:
        self.streams += 1
        self.metadata = dict(context.invocation_metadata())
        try:
            await self._stream(requests, context)
        finally:
            self.ended.put_nowait(None)

    async def _stream(self, requests: AsyncIterable[pb.StreamRequest], context: Any) -> None:
        async for request in requests:
            self.messages.append(len(request.chunks) + sum(len(block.session_ids) for block in request.blocks))
            for chunk in request.chunks:
                result, copies = await self._arrive(chunk, context)
                await context.write(pb.StreamResponse(results=[result] * copies))
            for block in request.blocks:
                self.blocks.append(len(block.session_ids))
                if self.block_refusals and (refusal := self.block_refusals.popleft()) is not None:
                    refused = pb.BlockResult(tag=block.tag, error=refusal)
                    await context.write(pb.StreamResponse(block_results=[refused]))
                    continue
                arrived = [await self._arrive(chunk, context) for chunk in _take_apart(block)]
                block_result = _lay(block, [result for result, _ in arrived])
                copies = max(copies for _, copies in arrived)
                await context.write(pb.StreamResponse(block_results=[block_result] * copies))

    async def _arrive(self, chunk: pb.Chunk, context: Any) -> tuple[pb.ChunkResult, int]:
        """Applies a chunk, with the fault that is due; says how often to send its result."""
        self.chunks.append(chunk)
        fault = self.chunk_faults.popleft() if self.chunk_faults else None
        if fault and fault.when == "before":
            await fault.abort(context)
        if fault and fault.when == "held":
            self.held.put_nowait(None)
            await self.released.wait()
        if fault and fault.when == "stale":
            last = self.sessions[chunk.session_id].last
            await context.write(pb.StreamResponse(results=[last] if last else []))
        result = self._step(chunk)
        if fault and fault.when == "after":
            await fault.abort(context)
        return result, 2 if fault and fault.when == "twice" else 1

    def _step(self, chunk: pb.Chunk) -> pb.ChunkResult:
        result = pb.ChunkResult(session_id=chunk.session_id, position=chunk.position)
        if self.refusals and (refusal := self.refusals.popleft()) is not None:
            result.error.CopyFrom(refusal)
            return result
        try:
            held = self._find(chunk.session_id)
            _check_epoch(chunk, held)
        except errors.ConveyorError as error:
            result.error.CopyFrom(_detail(error))
            return result
        x = decode_tensor(chunk.inputs[0])
        if held.last is not None and (held.last.position, held.last.steps) == (chunk.position, len(x)):
            return held.last
        if chunk.position != held.position:
            result.error.CopyFrom(_detail(errors.PositionConflict("out of place", held.position)))
        elif chunk.timeout_us == 1:
            # As the contract has it: past its deadline when it is looked at, and not applied before.
            result.error.CopyFrom(_detail(errors.Late("too late")))
        else:
            y = held.total + np.cumsum(x, 0)
            self.applied[chunk.session_id, chunk.position] += 1
            held.total, held.position = y[-1], held.position + len(x)
            result.steps = len(x)
            result.outputs.append(encode_tensor("y", y))
            held.last = result
        return result

    async def _call(self, name: str, context: Any, work: Callable[[], Response]) -> Response:
        self.metadata = dict(context.invocation_metadata())
        self.calls.append(name)
        faults = self.call_faults[name]
        fault = faults.popleft() if faults else None
        if fault and fault.when == "before":
            await fault.abort(context)
        if fault and fault.when == "held":
            self.held.put_nowait(None)
            await self.released.wait()
        try:
            response = work()
        except errors.ConveyorError as error:
            await _abort(context, error)
            raise
        if fault and fault.when == "after":
            await fault.abort(context)
        if fault and fault.when == "kept":
            self.held.put_nowait(None)
            await self.released.wait()
        return response

    def _find(self, session_id: str) -> Held:
        if session_id not in self.sessions:
            raise errors.SessionUnknown(f"no session {session_id!r}")
        return self.sessions[session_id]

    def _add(self, session_id: str, held: Held) -> pb.Session:
        if session_id in self.sessions:
            raise errors.SessionExists(f"session {session_id!r} is open")
        self.sessions[session_id] = held
        return self._describe(session_id)

    def _describe(self, session_id: str) -> pb.Session:
        held = self._find(session_id)
        return pb.Session(
            session_id=session_id, model="sum", version=self.version, position=held.position, epoch=held.epoch
        )

    def _check_position(self, request: pb.ForkSessionRequest | pb.ResetSessionRequest, held: Held) -> None:
        if request.HasField("position") and request.position != held.position:
            raise errors.PositionConflict("out of place", held.position)

    def _model(self) -> pb.Model:
        def spec(name: str, *axes: str) -> pb.TensorSpec:
            return pb.TensorSpec(
                name=name,
                data_type=pb.DATA_TYPE_FLOAT32,
                shape=[WIDTH if axis == "feature" else -1 for axis in axes],
                axes=axes,
            )

        return pb.Model(
            name="sum",
            version=self.version,
            inputs=[spec(self.input, "batch", "time", "feature")],
            outputs=[spec("y", "batch", "time", "feature")],
            states=[spec("s", "batch", "feature")],
            streamable=True,
            max_message_bytes=self.max_message_bytes,
        )


@asynccontextmanager
async def sum_server(max_message_bytes: int = 0) -> AsyncIterator[SumServer]:
    """A server on a free port, in this event loop."""
    server = SumServer(max_message_bytes)
    await server.start()
    try:
        yield server
    finally:
        server.released.set()
        await server.stop()


def _check_model(name: str) -> None:
    if name != "sum":
        raise errors.ModelUnknown(f"no model {name!r}")


def _check_epoch(request: pb.Chunk | pb.ResetSessionRequest, held: Held) -> None:
    if request.epoch not in (0, held.epoch):
        raise errors.EpochConflict(f"epoch {request.epoch} is over; now it is {held.epoch}")


def _take_apart(block: pb.Block) -> list[pb.Chunk]:
    x = decode_tensor(block.inputs[0])
    return [
        pb.Chunk(
            session_id=session_id,
            position=position,
            inputs=[encode_tensor("x", row)],
            timeout_us=block.timeout_us,
            epoch=epoch,
        )
        for session_id, position, epoch, row in zip(
            block.session_ids, block.positions, block.epochs or [0] * len(x), x, strict=True
        )
    ]


def _lay(block: pb.Block, results: list[pb.ChunkResult]) -> pb.BlockResult:
    steps = block.inputs[0].shape[1]
    y = np.zeros((len(results), steps, WIDTH), np.float32)
    refused = []
    for index, result in enumerate(results):
        if result.HasField("error"):
            refused.append(pb.BlockError(index=index, error=result.error))
        else:
            y[index] = decode_tensor(result.outputs[0])
    outputs = [encode_tensor("y", y)] if len(refused) < len(results) else []
    return pb.BlockResult(tag=block.tag, steps=steps, outputs=outputs, errors=refused)


def _detail(error: errors.ConveyorError) -> pb.ErrorDetail:
    position = error.position if isinstance(error, errors.PositionConflict) else None
    return pb.ErrorDetail(code=error.code.value[0], reason=error.reason, message=str(error), position=position)


async def _abort(context: Any, error: errors.ConveyorError) -> None:
    await context.abort(error.code, str(error), ((errors.DETAIL_KEY, _detail(error).SerializeToString()),))
