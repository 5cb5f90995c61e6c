"""Messages that are none: bytes that cannot be read as the message that a call takes.

gRPC would end the call with UNKNOWN and the name of a Python class. Here the call gets a ``Malformed`` in the message's
place, and says so itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands where a message should have been."""

    size: int

    @property
    def error(self) -> InvalidRequest:
        """What the caller is told."""
        return InvalidRequest(f"the {self.size} bytes that were sent are not the message that this call takes")


class Reader(grpc.aio.ServerInterceptor):
    """Hands ``Malformed`` to the calls of one service.

    Args:
        service: its full name.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the way in which a call's messages are read."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        deserialize = handler.request_deserializer

        def read(data: bytes) -> object:
            try:
                return deserialize(data)
            except Exception:  # whatever the stubs' library raises: this room does not know which that is
                return Malformed(len(data))

        return handler._replace(request_deserializer=read)
