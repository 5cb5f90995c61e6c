"""Calls that open a session, or find one that is open. Must not know what a session does afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from conveyor.connection import Connection
from conveyor.errors import ConveyorError, SessionExists
from conveyor.v1 import conveyor_pb2 as pb

if TYPE_CHECKING:
    from conveyor.async_session import AsyncSession


class Opening:
    """A session about to be had: await it, or enter it with ``async with``, which closes what it opened at the end."""

    def __init__(self, coroutine: Coroutine[Any, Any, AsyncSession]) -> None:
        self._coroutine = coroutine

    if not TYPE_CHECKING:  # a type checker is not to believe that it has every attribute

        def __getattr__(self, name: str) -> Any:
            what = f"the session is not open yet, and has no {name!r}"
            raise AttributeError(
                f"{what}: write session = await client.session(...), or async with; fork, attach and import_session "
                "likewise",
                name=name,
                obj=self,
            )

    def __await__(self) -> Generator[Any, Any, AsyncSession]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.__aexit__(kind, error, trace)


def new_session_id() -> str:
    """An id that nobody can guess. The client makes it, so that opening can be tried again when a reply is lost."""
    return uuid.uuid4().hex


async def open_session(
    connection: Connection, method: str, request: Any, session_id: str, *, chosen: bool, deadline: float
) -> pb.Session:
    """Opens a session, once, however often the connection is lost meanwhile.

    Args:
        connection: to the server.
        method: name of the call.
        request: its message.
        session_id: of the new session, as it stands in the request.
        chosen: whether the id is the user's. It may then be somebody else's too, while an id that the client made can
            only have been taken by an earlier attempt of the same call.
        deadline: for all of it, on the client's clock.

    Raises:
        ConveyorError: as the server says.
    """

    def taken(error: ConveyorError) -> ConveyorError | None:
        if not isinstance(error, SessionExists):
            return error
        if not chosen:
            return None
        return SessionExists(
            f"{error}; the connection was lost meanwhile, and an earlier attempt of this very call may have opened it: "
            "if nobody else uses the id, attach() goes on with it"
        )

    response = await connection.call(method, request, deadline=deadline, after_loss=taken)
    return await find_session(connection, session_id, deadline) if response is None else response.session


async def find_session(connection: Connection, session_id: str, deadline: float) -> pb.Session:
    """Looks at a session, until a deadline on the client's clock.

    Raises:
        NotFound: there is none: unknown, expired or lost, as the type says.
    """
    request = pb.GetSessionRequest(session_id=session_id)
    response: pb.GetSessionResponse = await connection.call("GetSession", request, deadline=deadline)
    return response.session
