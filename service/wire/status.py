"""Errors to gRPC status codes: one table.

Owns the table, and the form in which an error reaches a caller. No text of an unexpected error leaves the server.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import structlog

from conveyor.v1 import conveyor_pb2 as pb
from service.errors import (
    Cancelled,
    ConveyorError,
    EngineFailed,
    EpochConflict,
    Full,
    InvalidRequest,
    Late,
    NotFound,
    NotStreamable,
    PositionConflict,
    SessionExists,
    Unavailable,
    Unsupported,
)

log = structlog.get_logger()

DETAIL_KEY = "conveyor-error-bin"
"""Where the trailing metadata of a failed unary call holds a serialized ErrorDetail."""

_LONGEST_MESSAGE = 2000

_CODES: dict[type[ConveyorError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    NotStreamable: grpc.StatusCode.FAILED_PRECONDITION,
    PositionConflict: grpc.StatusCode.ABORTED,
    EpochConflict: grpc.StatusCode.ABORTED,
    SessionExists: grpc.StatusCode.ALREADY_EXISTS,
    Full: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Late: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    EngineFailed: grpc.StatusCode.INTERNAL,
}


def code(error: ConveyorError) -> grpc.StatusCode:
    """Return the status code of an error: its class's, or that of the nearest class above."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


def detail(error: Exception) -> pb.ErrorDetail:
    """Return an error as it stands in-band; one that is not ours without its text."""
    if not isinstance(error, ConveyorError):
        log.error("unexpected error", exc_info=error)
        error = EngineFailed("internal error")
    # It goes into trailing metadata, twice: clients refuse what is over 8 KiB there, and all but ASCII grows under way.
    message = str(error).encode("ascii", "backslashreplace").decode()[:_LONGEST_MESSAGE]
    position = error.position if isinstance(error, PositionConflict) else None
    return pb.ErrorDetail(code=code(error).value[0], reason=error.reason, message=message, position=position)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End a unary call with an error."""
    told = detail(error)
    status = code(error) if isinstance(error, ConveyorError) else grpc.StatusCode.INTERNAL
    # The context keeps what ends the call; in a circle through the error's frames that would be the request too.
    error.__traceback__ = None
    await context.abort(status, told.message, ((DETAIL_KEY, told.SerializeToString()),))
    raise AssertionError("abort returned")
