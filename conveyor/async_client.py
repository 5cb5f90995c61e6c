"""The client for asyncio: models, whole batches, and sessions over one shared stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast, overload

import grpc

from conveyor.async_session import AsyncSession, group, side_by_side, step_sessions
from conveyor.chunks import stack
from conveyor.connection import Connection, Settings
from conveyor.errors import ConveyorError, InvalidRequest, StepsFailed
from conveyor.model import Model, decode_model
from conveyor.opening import Opening, find_session, new_session_id, open_session
from conveyor.payload import (
    Inputs,
    Outputs,
    Sequences,
    States,
    are_ragged,
    decode_named,
    decode_outputs,
    encode_inputs,
    encode_lengths,
    encode_ragged,
    encode_states,
    split,
)
from conveyor.state import SessionState, encode_state
from conveyor.stream import ChunkStream
from conveyor.tensors import Array
from conveyor.v1 import conveyor_pb2 as pb


@dataclass(frozen=True)
class InferResult:
    """What ``infer`` gives when the final states are asked for.

    Attributes:
        outputs: as ``infer`` gives them without.
        states: by name, each with the batch axis first: [N, ...].
        version: of the model that ran.
    """

    outputs: Outputs
    states: dict[str, Array]
    version: int


class AsyncClient:
    """A client of one server, for use in one event loop.

    Calls that a lost connection interrupts, or that a server refuses because it drains or loads, are made again where
    that is safe, and here all are: sessions get their id from the client, chunks carry their position. Closing the
    client leaves its sessions on the server, where ``attach`` finds them until they expire.

    Args:
        target: address of the server, "host:port"; or a name in one of gRPC's own forms, such as "unix:/path".
        key: a secret of the caller's choosing; sessions opened with it exist only for calls that carry it. Without TLS
            anyone on the way can read it.
        timeout_s: for each call that does not say its own.
        reconnect_timeout_s: how long a server that cannot be reached, drains or loads is tried again before a call
            fails with ConnectionLost, Draining or Loading.
        max_message_bytes: largest message, either way; 1 MiB at least, up to which the server lays results together.
        credentials: for TLS; plain text without.
        options: further gRPC channel arguments.
    """

    def __init__(
        self,
        target: str,
        *,
        key: str | None = None,
        timeout_s: float = 60.0,
        reconnect_timeout_s: float = 30.0,
        max_message_bytes: int = 64 * 2**20,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._settings = Settings(
            target, key, timeout_s, reconnect_timeout_s, max_message_bytes, credentials, tuple(options)
        )
        self._open: tuple[Connection, ChunkStream] | None = None
        self._closed = False
        self._models: dict[tuple[str, int], Model] = {}

    async def models(self) -> list[Model]:
        """All models that are ready, each in its newest version, in alphabetical order."""
        response: pb.ListModelsResponse = await self._connection.call("ListModels", pb.ListModelsRequest())
        return [decode_model(model) for model in response.models]

    async def model(self, name: str, version: int = 0) -> Model:
        """Describes one model; version 0 is the newest.

        Raises:
            ModelUnknown: there is none.
        """
        return await self._model(name, version, self._connection.deadline())

    async def _model(self, name: str, version: int, deadline: float) -> Model:
        request = pb.GetModelRequest(model=name, version=version)
        response: pb.GetModelResponse = await self._connection.call("GetModel", request, deadline=deadline)
        model = decode_model(response.model)
        self._models[name, version] = self._models[name, model.version] = model
        connection = self._connection
        connection.max_message_bytes = min(
            self._settings.max_message_bytes, model.max_message_bytes or self._settings.max_message_bytes
        )
        return model

    @overload
    async def infer(
        self,
        model: str,
        x: Inputs | Sequences,
        lengths: Sequence[int] | Array | None = None,
        states: States | None = None,
        return_states: Literal[False] = False,
        version: int = 0,
        timeout_s: float | None = None,
    ) -> Outputs: ...

    @overload
    async def infer(
        self,
        model: str,
        x: Inputs | Sequences,
        lengths: Sequence[int] | Array | None = None,
        states: States | None = None,
        *,
        return_states: Literal[True],
        version: int = 0,
        timeout_s: float | None = None,
    ) -> InferResult: ...

    async def infer(
        self,
        model: str,
        x: Inputs | Sequences,
        lengths: Sequence[int] | Array | None = None,
        states: States | None = None,
        return_states: bool = False,
        version: int = 0,
        timeout_s: float | None = None,
    ) -> Outputs | InferResult:
        """Runs a batch of whole sequences; the server keeps nothing.

        Args:
            model: its name.
            x: [N, T, I], or [N, T] for tokens; or a list of arrays [T_n, I], each with a length of its own, which are
                sent without padding; a dict by name for several inputs.
            lengths: how many steps of each row are valid; all of them if None.
            states: to begin from, by name, each [N, ...]; the model's initial ones if None.
            return_states: whether to return the final states too.
            version: 0 is the newest.
            timeout_s: for the whole call; the client's own if None.

        Returns:
            [N, T, O] with zeros after a row's length, or [N, O] for an output that holds the last valid step's value; a
            list of rows, each [T_n, O] or [O], where x was a list; a dict by name for several outputs. With
            ``return_states`` an InferResult. The arrays are read-only.

        Raises:
            InvalidRequest: what was given does not fit the model, or not into a message; or the server says so.
            ConveyorError: as the server says.
        """
        deadline = self._connection.deadline(timeout_s)
        signature = self._models.get((model, version)) or await self._model(model, version, deadline)
        ragged = are_ragged(x)
        if ragged and lengths is not None:
            raise InvalidRequest("a list of sequences has lengths of its own; expected lengths=None")
        try:
            steps: list[int] = []
            if ragged:
                inputs, steps = encode_ragged(signature, cast("Sequences", x))
            else:
                inputs = encode_inputs(signature, cast("Inputs", x))
                if lengths is not None:
                    steps = encode_lengths(lengths, rows=inputs[0].shape[0])
            request = pb.InferRequest(
                model=model,
                version=version,
                inputs=inputs,
                lengths=steps,
                ragged=ragged,
                initial_states=() if states is None else encode_states(signature, states, batch=True),
                return_states=return_states,
            )
            response: pb.InferResponse = await self._connection.call("Infer", request, deadline=deadline)
        except InvalidRequest:
            # It may be another model by now, with another signature.
            self._models.pop((model, version), None)
            raise
        if response.version != signature.version:
            signature = await self._model(model, response.version, deadline)
            self._models.pop((model, 0), None)
        outputs = decode_outputs(signature, response.outputs)
        if ragged:
            outputs = split(signature, outputs, steps)
        if return_states:
            return InferResult(outputs, decode_named(response.final_states), response.version)
        return outputs

    def session(
        self, model: str, version: int = 0, initial_states: States | None = None, session_id: str | None = None
    ) -> Opening:
        """Opens a session: await it, or ``async with client.session("name") as session`` closes it after.

        Args:
            model: its name.
            version: 0 is the newest; the session stays on the version that it was opened on.
            initial_states: to begin from, by name, each without the batch axis; the model's initial ones if None.
            session_id: an unguessable one if None. Whoever knows the id, and the key if there is one, can use the
                session.

        Raises:
            ConveyorError: as the server says; no session was opened.
        """
        return Opening(self._session(model, version, initial_states, session_id))

    def attach(self, session_id: str, position: int | None = None) -> Opening:
        """Goes on with a session that is open on the server, of this client or another one.

        Leaving ``async with client.attach(...)`` leaves the session open, for whoever opened it; ``close`` ends it.

        Args:
            session_id: of the session.
            position: where to go on; where the server is if None. Whoever was cut off between a chunk and its reply
                gives the position of that chunk and sends it again: the server then repeats the reply if it had applied
                the chunk. It knows a chunk by its position and length, not by its data: of two handles that send
                different data for the same steps, the second gets the outputs of the first one's.

        Raises:
            NotFound: there is no such session: unknown, expired or lost, as the type says.
        """
        return Opening(self._attach(session_id, position))

    def import_session(self, state: SessionState, session_id: str | None = None) -> Opening:
        """Opens a session from a state that ``export`` gave, here or elsewhere.

        Args:
            state: what was exported.
            session_id: of the new session; an unguessable one if None.

        Raises:
            ConveyorError: as the server says; no session was opened.
        """
        return Opening(self._import(state, session_id))

    @overload
    async def step_many(
        self, chunks: Mapping[AsyncSession, Inputs], /, *, timeout_s: float | None = None
    ) -> dict[AsyncSession, Outputs]: ...

    @overload
    async def step_many(
        self, sessions: Sequence[AsyncSession], x: Inputs, /, *, timeout_s: float | None = None
    ) -> Outputs: ...

    async def step_many(
        self,
        chunks: Mapping[AsyncSession, Inputs] | Sequence[AsyncSession],
        x: Inputs | None = None,
        /,
        *,
        timeout_s: float | None = None,
    ) -> dict[AsyncSession, Outputs] | Outputs:
        """Applies one chunk to each of many sessions, together in as few messages as they fit in.

        Chunks of one model and one shape travel and are read as one; that is what makes thousands of them cheap.

        Args:
            chunks: by session, what ``step`` takes. The sessions are this client's own. Or a sequence of sessions of
                one model, for which ``x`` holds the chunks.
            x: a chunk of as many steps for each of the sessions: [N, T, I], or [N, I] for one step each; [N, T] or [N]
                for tokens. A dict by name for several inputs.
            timeout_s: as for ``step``.

        Returns:
            By session, in the order of ``chunks``, what ``step`` gives; or, with ``x``, the same side by side:
            [N, T, O], or [N, O] for one step each or an output that holds the last step's value; a dict by name for
            several outputs.

        Raises:
            InvalidRequest: the names, dtypes or shapes of some inputs do not fit their model, a session is not this
                client's, or the timeout makes no sense; nothing was sent.
            StepsFailed: some chunks failed, say because an input holds NaN. It holds the outputs of those that did not,
                and the error of each that did.
        """
        _, stream = self._opened()
        if any(session._stream is not stream for session in chunks):
            raise InvalidRequest("step_many takes sessions of its own client only")
        if isinstance(chunks, Mapping):
            if x is not None:
                raise InvalidRequest("the chunks stand in the mapping already; expected no x")
            groups = group(chunks.items())
        else:
            groups = [side_by_side(chunks, x)]
        outcomes = await step_sessions(groups, self._settings.timeout(timeout_s))
        errors = {session: y for session in chunks if isinstance(y := outcomes[session], ConveyorError)}
        if errors:
            raise StepsFailed({session: outcomes[session] for session in chunks if session not in errors}, errors)
        if isinstance(chunks, Mapping):
            return {session: outcomes[session] for session in chunks}
        return stack([outcomes[session] for session in chunks])

    async def close(self) -> None:
        """Closes the connection; sessions stay on the server until they expire."""
        self._closed = True
        if self._open is not None:
            connection, stream = self._open
            connection.closed = True
            await stream.close()
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _session(
        self, model: str, version: int, initial_states: States | None, session_id: str | None
    ) -> AsyncSession:
        deadline = self._connection.deadline()
        new_id = session_id or new_session_id()
        states: Sequence[pb.Tensor] = ()
        if initial_states is not None:
            states = encode_states(await self._model(model, version, deadline), initial_states, batch=False)
        request = pb.OpenSessionRequest(model=model, version=version, session_id=new_id, initial_states=states)
        return await self._new_session("OpenSession", request, new_id, bool(session_id), deadline)

    async def _import(self, state: SessionState, session_id: str | None) -> AsyncSession:
        new_id = session_id or new_session_id()
        request = pb.ImportSessionRequest(state=encode_state(state), session_id=new_id)
        return await self._new_session("ImportSession", request, new_id, bool(session_id), self._connection.deadline())

    async def _attach(self, session_id: str, position: int | None) -> AsyncSession:
        connection, stream = self._opened()
        deadline = connection.deadline()
        session = await find_session(connection, session_id, deadline)
        model = await self._model_of(session, deadline)
        return AsyncSession(connection, stream, model, session, position, attached=True)

    async def _new_session(
        self, method: str, request: Any, session_id: str, chosen: bool, deadline: float
    ) -> AsyncSession:
        connection, stream = self._opened()
        session = await open_session(connection, method, request, session_id, chosen=chosen, deadline=deadline)
        return AsyncSession(connection, stream, await self._model_of(session, deadline), session)

    async def _model_of(self, session: pb.Session, deadline: float) -> Model:
        known = self._models.get((session.model, session.version))
        return known or await self._model(session.model, session.version, deadline)

    @property
    def _connection(self) -> Connection:
        return self._opened()[0]

    def _opened(self) -> tuple[Connection, ChunkStream]:
        # Late, because a channel belongs to the event loop in which it is made, and a client may be made before there
        # is one.
        if self._closed:
            raise InvalidRequest("the client has been closed")
        if self._open is None:
            connection = Connection(self._settings)
            self._open = connection, ChunkStream(connection)
        return self._open
