"""The native door: conveyor.v1.ConveyorService, its unary calls.

Decodes, asks Operations, encodes. Must not know scheduling.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
import numpy as np

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.errors import Full, InvalidRequest
from service.manifest import StateSpec, TensorSpec
from service.operations import Operations
from service.runner import Runner
from service.session import Session
from service.settings import Settings
from service.wire.codec import DATA_TYPES, Array, Codec, encode
from service.wire.malformed import Malformed
from service.wire.status import abort
from service.wire.streaming import Stream

_KEY = "conveyor-key"
_LAST_POSITION = 1 << 62
"""Room enough behind it that no session can step to where the wire's 64 bits end."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Request = TypeVar("Request")
Response = TypeVar("Response")


def _told(
    method: Callable[[ConveyorServicer, Request, Context], Awaitable[Response]],
) -> Callable[[ConveyorServicer, Request, Context], Coroutine[Any, Any, Response]]:
    """Turn what a method raises into the call's status."""

    @functools.wraps(method)
    async def call(self: ConveyorServicer, request: Request, context: Context) -> Response:
        try:
            if isinstance(request, Malformed):
                raise request.error
            with self.counted():
                return await method(self, request, context)
        except Exception as error:
            await abort(context, error)

    return call


class ConveyorServicer(stubs.ConveyorServiceServicer):
    """The calls of conveyor.v1."""

    def __init__(self, operations: Operations, settings: Settings, clock: Callable[[], float]) -> None:
        self._operations = operations
        self._settings = settings
        self._clock = clock
        self._codecs: dict[Runner, Codec] = {}
        self._streams: set[Stream] = set()
        self._calls = 0

    NAME = str(pb.DESCRIPTOR.services_by_name["ConveyorService"].full_name)

    def register(self, server: grpc.aio.Server) -> None:
        """Enter the calls into a server."""
        stubs.add_ConveyorServiceServicer_to_server(self, server)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Hold one of the places for calls.

        Raises:
            Full: if all are taken.
        """
        if self._calls >= self._settings.max_calls:
            raise Full(f"{self._calls} calls are under way, which is the limit; try again later")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    def codec(self, runner: Runner) -> Codec:
        """The reader of a model's tensors."""
        codec = self._codecs.get(runner)
        if codec is None:
            settings = self._settings
            codec = self._codecs[runner] = Codec(
                runner.manifest,
                max_steps=settings.max_steps,
                max_batch=settings.max_batch,
                max_bytes=settings.max_message_bytes,
                finite=settings.non_finite == "reject",
            )
        return codec

    # --- models ---

    @_told
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List the models that are served, each in its newest version."""
        repository = self._operations.repository
        return pb.ListModelsResponse(models=[self._model(repository.find(name)) for name in repository.names()])

    @_told
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describe one model."""
        return pb.GetModelResponse(model=self._model(self._find(request.model, request.version)))

    # --- batches ---

    @_told
    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:
        """Run a batch of whole sequences."""
        runner = self._find(request.model, request.version)
        codec = self.codec(runner)
        inputs, lengths = codec.batch(request.inputs, request.lengths)
        states = codec.states(request.initial_states, rows=len(lengths))
        codec.check_reply(len(lengths), inputs[0].shape[1], request.return_states)
        left = context.time_remaining()
        deadline = None if left is None else self._clock() + left
        outputs, finals = await self._operations.infer(runner, inputs, lengths, states, deadline)
        response = pb.InferResponse(version=runner.version)
        for index, output in enumerate(runner.manifest.outputs):
            rows = [row[index] for row in outputs]
            whole = np.stack(rows) if output.time_axis is None else _pad(rows, inputs[0].shape[1])
            response.outputs.append(encode(output.name, whole))
        if request.return_states:
            for index, state in enumerate(runner.manifest.states):
                response.final_states.append(encode(state.name, np.stack([row[index] for row in finals])))
        return response

    # --- sessions ---

    async def Stream(self, requests: AsyncIterable[pb.StreamRequest | Malformed], context: Context) -> None:
        """Step any number of sessions."""
        try:
            with self.counted():
                await self._stream(requests, context)
        except Full as error:
            await abort(context, error)

    async def _stream(self, requests: AsyncIterable[pb.StreamRequest | Malformed], context: Context) -> None:
        stream = Stream(
            self._operations,
            self.codec,
            owner(context),
            self._settings.max_stream_chunks,
            self._settings.max_message_bytes,
            self._clock,
        )
        self._streams.add(stream)
        try:
            await stream.run(requests, context)
        finally:
            self._streams.discard(stream)

    def end_streams(self) -> None:
        """Have every stream answer what it has accepted, and end."""
        for stream in self._streams:
            stream.end()

    @_told
    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        """Open a session at position 0."""
        runner = self._find(request.model, request.version)
        states = self.codec(runner).states(request.initial_states, rows=None)
        session = self._operations.open(owner(context), request.session_id, runner, states)
        return pb.OpenSessionResponse(session=self._session(session))

    @_told
    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """Look at a session."""
        session = self._operations.find(owner(context), request.session_id)
        return pb.GetSessionResponse(session=self._session(session))

    @_told
    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        """Open a second session from the state that one has."""
        position = request.position if request.HasField("position") else None
        fork = await self._operations.fork(owner(context), request.session_id, request.new_session_id, position)
        return pb.ForkSessionResponse(session=self._session(fork))

    @_told
    async def ResetSession(self, request: pb.ResetSessionRequest, context: Context) -> pb.ResetSessionResponse:
        """Put a session back to position 0."""
        position = request.position if request.HasField("position") else None
        session = await self._operations.reset(owner(context), request.session_id, position, request.epoch)
        return pb.ResetSessionResponse(session=self._session(session))

    @_told
    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        """End a session."""
        return pb.CloseSessionResponse(position=await self._operations.close(owner(context), request.session_id))

    @_told
    async def ExportSession(self, request: pb.ExportSessionRequest, context: Context) -> pb.ExportSessionResponse:
        """Copy a session's state out."""
        session, states = await self._operations.export(owner(context), request.session_id)
        specs = self._operations.runner(session).manifest.states
        return pb.ExportSessionResponse(
            state=pb.SessionState(
                model=session.home.name,
                version=session.home.version,
                position=session.position,
                states=[encode(spec.name, state) for spec, state in zip(specs, states, strict=True)],
            )
        )

    @_told
    async def ImportSession(self, request: pb.ImportSessionRequest, context: Context) -> pb.ImportSessionResponse:
        """Open a session from an exported state."""
        state = request.state
        runner = self._find(state.model, state.version)
        if not 0 <= state.position <= _LAST_POSITION:
            raise InvalidRequest(f"the state is at position {state.position}; expected 0 to {_LAST_POSITION}")
        states = self.codec(runner).states(state.states, rows=None)
        if states is None and runner.manifest.states:
            raise InvalidRequest(f"the state is empty; expected {[spec.name for spec in runner.manifest.states]}")
        session = self._operations.open(owner(context), request.session_id, runner, states, state.position)
        return pb.ImportSessionResponse(session=self._session(session))

    # --- what messages are made of ---

    def _find(self, model: str, version: int) -> Runner:
        if version < 0:
            raise InvalidRequest(f"version is {version}; expected a positive integer, or 0 for the newest")
        return self._operations.repository.find(model, version)

    def _session(self, session: Session) -> pb.Session:
        return pb.Session(
            session_id=session.identity,
            model=session.home.name,
            version=session.home.version,
            position=session.position,
            idle_timeout_s=self._settings.idle_timeout_s,
            idle_s=max(0.0, self._clock() - session.used_at),
            epoch=session.epoch,
        )

    def _model(self, runner: Runner) -> pb.Model:
        manifest = runner.manifest
        return pb.Model(
            name=runner.name,
            version=runner.version,
            inputs=[_sequence(spec) for spec in manifest.inputs],
            outputs=[_sequence(spec) for spec in manifest.outputs],
            states=[_state(spec) for spec in manifest.states],
            streamable=manifest.streamable,
            cells=[layer.cell for layer in manifest.layers],
            precision=manifest.precision,
            max_steps=self._settings.max_steps,
            max_batch=self._settings.max_batch,
            max_message_bytes=self._settings.max_message_bytes,
        )


def owner(context: Context) -> bytes:
    """Return the digest of the key that a call carries; empty for none."""
    for key, value in context.invocation_metadata() or ():
        if key == _KEY:
            secret = value if isinstance(value, bytes) else value.encode()
            return hashlib.sha256(secret).digest()
    return b""


def _pad(rows: list[Array], steps: int) -> Array:
    whole = np.zeros((len(rows), steps, *rows[0].shape[1:]), rows[0].dtype)
    for n, row in enumerate(rows):
        whole[n, : len(row)] = row
    return whole


def _sequence(spec: TensorSpec) -> pb.TensorSpec:
    axes = [
        "batch",
        *(["time"] if spec.time_axis is not None else []),
        *(f"feature_{n}" for n in range(len(spec.tail))),
    ]
    if len(spec.tail) == 1:
        axes[-1] = "feature"
    shape = [-1] * (len(axes) - len(spec.tail)) + [size or -1 for size in spec.tail]
    return pb.TensorSpec(name=spec.name, data_type=DATA_TYPES[spec.dtype], shape=shape, axes=axes)


def _state(spec: StateSpec) -> pb.TensorSpec:
    names = {1: ["hidden"], 2: ["layer", "hidden"]}.get(len(spec.tail), [f"axis_{n}" for n in range(len(spec.tail))])
    return pb.TensorSpec(
        name=spec.name, data_type=DATA_TYPES[spec.dtype], shape=[-1, *spec.tail], axes=["batch", *names]
    )
