"""The native door: conveyor.v1.ConveyorService, its unary calls.

Decodes, asks Operations, encodes. Must not know scheduling.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from functools import partial

import grpc

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.chunks import runner_of
from service.errors import InvalidRequest
from service.manifest import StateSpec, TensorSpec
from service.session import Session
from service.ticks.runner import Runner
from service.wire.assembly import Part, Written, assemble, size
from service.wire.codec import Array, Batch, join, stack
from service.wire.conveyor_tensors import DATA_TYPES, decode, encode, parts
from service.wire.door import Context, Door, caller, owner, told
from service.wire.malformed import Malformed
from service.wire.streaming import Stream

_LAST_POSITION = 1 << 62
"""Room enough behind it that no session can step to where the wire's 64 bits end."""


class ConveyorServicer(Door, stubs.ConveyorServiceServicer):
    """The calls of conveyor.v1."""

    NAME = str(pb.DESCRIPTOR.services_by_name["ConveyorService"].full_name)

    def register(self, server: grpc.aio.Server) -> None:
        """Enter the calls into a server."""
        stubs.add_ConveyorServiceServicer_to_server(self, server)

    # --- models ---

    @told
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List the models that are served, each in its newest version."""
        repository = self.operations.repository
        return pb.ListModelsResponse(models=[self._model(repository.find(name)) for name in repository.names()])

    @told
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describe one model."""
        return pb.GetModelResponse(model=self._model(self._find(request.model, request.version)))

    # --- batches ---

    @told
    async def Infer(self, request: pb.InferRequest, context: Context) -> Written:
        """Run a batch of whole sequences."""
        self.operations.intake.check()
        runner = self._find(request.model, request.version)
        with runner.in_use(), self.counting(runner), self.finishing():
            codec = self.codec_of(runner)
            given, given_states = decode(request.inputs), decode(request.initial_states)

            def read() -> tuple[Batch, list[Array] | None]:
                taken = codec.ragged if request.ragged else codec.batch
                batch = taken(given, request.lengths, request.return_states)
                return batch, codec.states(given_states, len(batch.rows))

            batch, states = await self.aside(sum(tensor.size for tensor in given + given_states), read)
            left = context.time_remaining()
            deadline = None if left is None else self.clock() + left
            outputs, finals = await self.operations.infer(
                runner,
                batch.rows,
                states,
                deadline,
                caller=caller(context),
                accepted=True,
                with_states=request.return_states,
            )
            reply: list[Part] = [pb.InferResponse(version=runner.version).SerializeToString()]
            for index, output in enumerate(runner.manifest.outputs):
                joined = join([row[index] for row in outputs], output, batch.steps)
                reply += parts(pb.InferResponse.OUTPUTS_FIELD_NUMBER, output.name, joined)
            if request.return_states:
                for index, state in enumerate(runner.manifest.states):
                    joined = stack([row[index] for row in finals])
                    reply += parts(pb.InferResponse.FINAL_STATES_FIELD_NUMBER, state.name, joined)
            return await self.aside(size(reply), partial(assemble, reply))

    # --- sessions ---

    async def Stream(self, requests: AsyncIterable[pb.StreamRequest | Malformed], context: Context) -> None:
        """Step any number of sessions."""
        stream = Stream(
            self.operations,
            self.codec_of,
            owner(context),
            caller(context),
            self.settings.max_stream_chunks,
            self.settings.max_message_bytes,
            self.clock,
        )
        async with self.streaming(stream, context):
            await stream.run(requests, context)

    @told
    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        """Open a session at position 0."""
        runner = self._find(request.model, request.version)
        states = self.codec_of(runner).states(decode(request.initial_states), rows=None)
        session = self.operations.open(owner(context), request.session_id, runner, states)
        return pb.OpenSessionResponse(session=self._session(session))

    @told
    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """Look at a session."""
        session = self.operations.find(owner(context), request.session_id)
        return pb.GetSessionResponse(session=self._session(session))

    @told
    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        """Open a second session from the state that one has."""
        position = request.position if request.HasField("position") else None
        fork = await self.operations.fork(owner(context), request.session_id, request.new_session_id, position)
        return pb.ForkSessionResponse(session=self._session(fork))

    @told
    async def ResetSession(self, request: pb.ResetSessionRequest, context: Context) -> pb.ResetSessionResponse:
        """Put a session back to position 0."""
        position = request.position if request.HasField("position") else None
        session = await self.operations.reset(owner(context), request.session_id, position, request.epoch)
        return pb.ResetSessionResponse(session=self._session(session))

    @told
    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        """End a session."""
        return pb.CloseSessionResponse(position=await self.operations.close(owner(context), request.session_id))

    @told
    async def ExportSession(self, request: pb.ExportSessionRequest, context: Context) -> pb.ExportSessionResponse:
        """Copy a session's state out."""
        session, position, states = await self.operations.export(owner(context), request.session_id)
        runner = runner_of(session)
        return pb.ExportSessionResponse(
            state=pb.SessionState(
                model=session.home.name,
                version=session.home.version,
                position=position,
                states=[encode(spec.name, state) for spec, state in zip(runner.manifest.states, states, strict=True)],
                digest=runner.digest,
            )
        )

    @told
    async def ImportSession(self, request: pb.ImportSessionRequest, context: Context) -> pb.ImportSessionResponse:
        """Open a session from an exported state."""
        state = request.state
        runner = self._find(state.model, state.version)
        if not 0 <= state.position <= _LAST_POSITION:
            raise InvalidRequest(f"the state is at position {state.position}; expected 0 to {_LAST_POSITION}")
        if state.digest and state.digest != runner.digest:
            raise InvalidRequest(
                f"the state is of another file than the one served as {runner.name!r} {runner.version}: its digest is "
                f"{state.digest[:12]!r}..., expected {runner.digest[:12]!r}..."
            )
        states = self.codec_of(runner).states(decode(state.states), rows=None)
        if states is None and runner.manifest.states:
            raise InvalidRequest(f"the state is empty; expected {[spec.name for spec in runner.manifest.states]}")
        session = self.operations.open(owner(context), request.session_id, runner, states, state.position)
        return pb.ImportSessionResponse(session=self._session(session))

    # --- what messages are made of ---

    def _find(self, model: str, version: int) -> Runner:
        if version < 0:
            raise InvalidRequest(f"version is {version}; expected a positive integer, or 0 for the newest")
        return self.operations.repository.find(model, version)

    def _session(self, session: Session) -> pb.Session:
        return pb.Session(
            session_id=session.identity,
            model=session.home.name,
            version=session.home.version,
            position=session.position,
            idle_timeout_s=self.settings.idle_timeout_s,
            idle_s=max(0.0, self.clock() - session.used_at),
            epoch=session.epoch,
        )

    def _model(self, runner: Runner) -> pb.Model:
        manifest, choice = runner.manifest, runner.choice
        return pb.Model(
            name=runner.name,
            version=runner.version,
            inputs=[_sequence(spec) for spec in manifest.inputs],
            outputs=[_sequence(spec) for spec in manifest.outputs],
            states=[_state(spec) for spec in manifest.states],
            streamable=manifest.streamable,
            cells=[layer.cell for layer in manifest.layers],
            precision=manifest.precision,
            max_steps=self.settings.max_steps,
            max_batch=self.settings.max_batch,
            max_message_bytes=self.settings.max_message_bytes,
            device=choice.device,
            fallback=choice.fallback,
            tf32=choice.tf32,
            tf32_difference=choice.tf32_difference or 0.0,
        )


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
