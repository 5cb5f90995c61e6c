"""How the messages of a service come from bytes and become bytes, beside what its stubs do.

Bytes that cannot be read become a ``Malformed``, and what a call has ``Written`` goes out as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from service.wire.assembly import Written
from service.wire.malformed import Malformed


class Messages(grpc.aio.ServerInterceptor):
    """The messages of one service.

    Args:
        service: its full name.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Wrap the ways in which a call's messages are read and written."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        deserialize, serialize = handler.request_deserializer, handler.response_serializer

        def read(data: bytes) -> object:
            try:
                return deserialize(data)
            except Exception:  # whatever the stubs' library raises: this room does not know which that is
                return Malformed(len(data))

        def write(message: object) -> object:
            return message.data if isinstance(message, Written) else serialize(message)

        return handler._replace(request_deserializer=read, response_serializer=write)
