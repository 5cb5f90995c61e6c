"""The blocking session: ``AsyncSession`` for threads."""

from __future__ import annotations

from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Protocol, TypeVar

from conveyor.async_session import AsyncSession
from conveyor.model import Model
from conveyor.payload import Inputs, Outputs
from conveyor.state import SessionState

Result = TypeVar("Result")


class Run(Protocol):
    """Runs a coroutine to its end in the client's event loop."""

    def __call__(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Return what it returns."""


class Session:
    """A live sequence whose state the server holds. Made by ``Client.session`` and its like; any thread may use it.

    At most one chunk is under way at a time; ``step`` called meanwhile waits its turn. A dropped connection neither
    loses nor doubles a step: the chunk is sent again with its position.

    A ``step`` that ends without the server's word on it (an interrupt, TimedOut, Unavailable) leaves the session *in
    doubt*: the chunk may have been applied or not. The next call that needs to know asks the server first. ``settle()``
    gives the chunk's outputs if it counted and None if it did not, and ``position`` is right from then on. To repeat a
    step only if it did not count::

        try:
            y = session.step(x)
        except (Unavailable, TimedOut):
            y = session.settle()
            if y is None:
                y = session.step(x)

    A ``reset`` that ends so leaves it in doubt too.
    """

    def __init__(self, run: Run, session: AsyncSession) -> None:
        # A method of the client, which is not collected and its connection not closed while a session is in use.
        self._run = run
        self._session = session

    def __repr__(self) -> str:
        return repr(self._session).replace(type(self._session).__name__, type(self).__name__)

    @property
    def session_id(self) -> str:
        """With which ``attach`` finds the session again; whoever knows it, and the client's key, can use it."""
        return self._session.session_id

    @property
    def model(self) -> Model:
        """That runs it."""
        return self._session.model

    @property
    def position(self) -> int:
        """How many steps are known to have been applied; while ``in_doubt``, one chunk more may have been."""
        return self._session.position

    @property
    def in_doubt(self) -> bool:
        """Whether a chunk was sent, or a reset, of which it is not known whether it was applied."""
        return self._session.in_doubt

    def step(self, x: Inputs, *, timeout_s: float | None = None) -> Outputs:
        """Applies the next steps.

        Args:
            x: [T, I] for a chunk, or [I] for one step; [T] or a number for tokens. A dict by name for several inputs.
            timeout_s: after which the server drops the chunk unless it has been applied; the client's own if None.

        Returns:
            [T, O], or [O] for one step or an output that holds the last step's value; a dict by name for several
            outputs. The arrays are read-only.

        Raises:
            InvalidRequest: x does not fit the model, or the timeout makes no sense; nothing was sent.
            ConveyorError: nothing was applied, unless the session is ``in_doubt`` after it, as after TimedOut and
                ConnectionLost. After a ProtocolError, ``position`` says what was.
            EpochConflict: somebody else has reset the session; ``attach`` goes on with it.
        """
        return self._run(self._session.step(x, timeout_s=timeout_s))

    def settle(self, *, timeout_s: float | None = None) -> Outputs | None:
        """Finds out what became of the step or reset in doubt.

        Returns:
            The step's outputs if it was applied; None if it was not, or none was in doubt.

        Raises:
            ConveyorError: if that could not be found out; the session stays in doubt.
        """
        return self._run(self._session.settle(timeout_s=timeout_s))

    def fork(self, session_id: str | None = None) -> Session:
        """Opens a second session from the state of this one; the two go on independently.

        Args:
            session_id: of the new one; an unguessable one if None.

        Raises:
            ConveyorError: as the server says; no session was opened.
        """
        return Session(self._run, self._run(self._session._fork(session_id)))

    def reset(self) -> None:
        """Goes back to position 0 and the model's initial state.

        Raises:
            ConveyorError: as the server says; the session is as it was, unless it is ``in_doubt`` after it.
            EpochConflict: somebody else has reset the session; ``attach`` goes on with it.
        """
        self._run(self._session.reset())

    def export(self) -> SessionState:
        """Copies the state out; the session goes on.

        Raises:
            ConveyorError: as the server says.
        """
        return self._run(self._session.export())

    def close(self, *, timeout_s: float | None = None) -> None:
        """Ends the session on the server, after a step that is under way; a second time does nothing.

        Raises:
            ConveyorError: the server could not be told. The session then ends there by itself when its idle timeout is
                over.
        """
        self._run(self._session.close(timeout_s=timeout_s))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._session.__aexit__(kind, error, trace))
