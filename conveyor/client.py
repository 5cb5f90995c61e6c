"""The blocking client: ``AsyncClient`` run in a background thread, for any number of threads."""

from __future__ import annotations

import weakref
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import grpc

from conveyor import background
from conveyor.async_client import AsyncClient, InferResult
from conveyor.errors import StepsFailed
from conveyor.model import Model
from conveyor.payload import Inputs, Outputs, Sequences, States
from conveyor.session import Session
from conveyor.state import SessionState
from conveyor.tensors import Array

Result = TypeVar("Result")


class Client:
    """A client of one server, for use from any number of threads.

    Calls that a lost connection interrupts, or that a server refuses because it drains or loads, are made again where
    that is safe, and here all are: sessions get their id from the client, chunks carry their position. Closing the
    client leaves its sessions on the server, where ``attach`` finds them until they expire. A process that forks needs
    a client of its own on either side, made after the fork.

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
        self._client = AsyncClient(
            target,
            key=key,
            timeout_s=timeout_s,
            reconnect_timeout_s=reconnect_timeout_s,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
            options=options,
        )
        self._background = background.shared()
        # A forgotten client's connection is closed too. Nobody waits for that: the collector may come by in any thread.
        self._forgotten = weakref.finalize(self, self._background.post, self._client.close)
        self._forgotten.atexit = False

    def models(self) -> list[Model]:
        """All models that are ready, each in its newest version, in alphabetical order."""
        return self._run(self._client.models())

    def model(self, name: str, version: int = 0) -> Model:
        """Describes one model; version 0 is the newest.

        Raises:
            ModelUnknown: there is none.
        """
        return self._run(self._client.model(name, version))

    @overload
    def infer(
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
    def infer(
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

    def infer(
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
        call: Any = self._client.infer
        return self._run(call(model, x, lengths, states, return_states, version, timeout_s))

    def session(
        self, model: str, version: int = 0, initial_states: States | None = None, session_id: str | None = None
    ) -> Session:
        """Opens a session: ``with client.session("name") as session`` closes it after.

        Args:
            model: its name.
            version: 0 is the newest; the session stays on the version that it was opened on.
            initial_states: to begin from, by name, each without the batch axis; the model's initial ones if None.
            session_id: an unguessable one if None. Whoever knows the id, and the key if there is one, can use the
                session.

        Raises:
            ConveyorError: as the server says; no session was opened.
        """
        return Session(self._run, self._run(self._client._session(model, version, initial_states, session_id)))

    def attach(self, session_id: str, position: int | None = None) -> Session:
        """Goes on with a session that is open on the server, of this client or another one.

        Leaving ``with client.attach(...)`` leaves the session open, for whoever opened it; ``close`` ends it.

        Args:
            session_id: of the session.
            position: where to go on; where the server is if None. Whoever was cut off between a chunk and its reply
                gives the position of that chunk and sends it again: the server then repeats the reply if it had applied
                the chunk. It knows a chunk by its position and length, not by its data: of two handles that send
                different data for the same steps, the second gets the outputs of the first one's.

        Raises:
            NotFound: there is no such session: unknown, expired or lost, as the type says.
        """
        return Session(self._run, self._run(self._client._attach(session_id, position)))

    def import_session(self, state: SessionState, session_id: str | None = None) -> Session:
        """Opens a session from a state that ``export`` gave, here or elsewhere.

        Args:
            state: what was exported.
            session_id: of the new session; an unguessable one if None.

        Raises:
            ConveyorError: as the server says; no session was opened.
        """
        return Session(self._run, self._run(self._client._import(state, session_id)))

    @overload
    def step_many(
        self, chunks: Mapping[Session, Inputs], /, *, timeout_s: float | None = None
    ) -> dict[Session, Outputs]: ...

    @overload
    def step_many(self, sessions: Sequence[Session], x: Inputs, /, *, timeout_s: float | None = None) -> Outputs: ...

    def step_many(
        self,
        chunks: Mapping[Session, Inputs] | Sequence[Session],
        x: Inputs | None = None,
        /,
        *,
        timeout_s: float | None = None,
    ) -> dict[Session, Outputs] | Outputs:
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
        inner: Any
        if isinstance(chunks, Mapping):
            inner = {session._session: given for session, given in chunks.items()}
        else:
            inner = [session._session for session in chunks]
        call: Any = self._client.step_many
        try:
            outputs = self._run(call(inner, x, timeout_s=timeout_s))
        except StepsFailed as failed:
            outer = {session._session: session for session in chunks}
            raise StepsFailed(
                {outer[session]: y for session, y in failed.outputs.items()},
                {outer[session]: error for session, error in failed.errors.items()},
            ) from None
        if isinstance(chunks, Mapping):
            return dict(zip(chunks, outputs.values(), strict=True))
        return outputs

    def close(self) -> None:
        """Closes the connection; sessions stay on the server until they expire."""
        if self._forgotten.detach() is not None and self._background.alive:
            self._run(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self._background.run(coroutine)
