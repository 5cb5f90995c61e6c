"""Everything that can go wrong for a client, as a tree; owns the way from gRPC statuses and ErrorDetail to these types.

::

    ConveyorError
    ├── InvalidRequest            the request can never succeed as it stands
    ├── NotFound
    │   ├── ModelUnknown
    │   ├── SessionUnknown        no session has had this id there, or it was closed
    │   ├── SessionExpired        it was idle for too long
    │   └── SessionLost           its state is gone, and not through this handle of it
    ├── NotStreamable             the model cannot run step by step
    ├── PositionConflict          the chunk does not begin where the session is
    ├── EpochConflict             the session was reset, or opened anew, by somebody else
    ├── SessionExists
    ├── Full                      a limit of the server is reached; the text says which
    ├── Late                      the deadline passed, and the server says that nothing was applied
    ├── TimedOut                  the deadline passed without an answer
    ├── Cancelled                 dropped before it was applied
    ├── Unavailable
    │   ├── Draining
    │   ├── Loading
    │   └── ConnectionLost        the server could not be reached, or not again
    ├── EngineFailed              a run of the model failed
    ├── ProtocolError             the server's answer breaks the wire contract
    └── StepsFailed               some of the chunks of ``step_many`` failed; holds what the others gave

Knows grpc's status codes and the generated ErrorDetail; must not know channels, sessions or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from conveyor.v1 import conveyor_pb2 as pb

DETAIL_KEY = "conveyor-error-bin"
"""The trailing metadata entry in which a unary call's ErrorDetail stands."""


class ConveyorError(Exception):
    """Any error that the client raises.

    Attributes:
        code: the gRPC status code.
        reason: the kind of error as the wire names it, stable and fit for programs.
    """

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    reason: str = "internal"


class InvalidRequest(ConveyorError):
    """The request can never succeed as it stands."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid_request"


class NotFound(ConveyorError):
    """What was named is not there."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "not_found"


class ModelUnknown(NotFound):
    """No such model, or no such version of it."""

    reason = "model_unknown"


class SessionUnknown(NotFound):
    """No session of that id has been opened with this key, or it was closed."""

    reason = "session_unknown"


class SessionExpired(NotFound):
    """The session was idle for longer than its timeout."""

    reason = "session_expired"


class SessionLost(NotFound):
    """The session's state is gone: the server lost it, or another handle of the session closed it."""

    reason = "session_lost"


class NotStreamable(ConveyorError):
    """The model cannot run step by step."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "not_streamable"


class PositionConflict(ConveyorError):
    """The chunk, fork or reset does not begin where the session is.

    Attributes:
        position: the position that the server is at.
    """

    code = grpc.StatusCode.ABORTED
    reason = "position_conflict"

    def __init__(self, message: str, position: int = -1) -> None:
        super().__init__(message)
        self.position = position


class EpochConflict(ConveyorError):
    """The session was reset, or opened anew, by somebody else; nothing was applied. ``attach`` goes on with it."""

    code = grpc.StatusCode.ABORTED
    reason = "epoch_conflict"


class SessionExists(ConveyorError):
    """A session of that id is open already."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "session_exists"


class Full(ConveyorError):
    """A limit of the server is reached."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "full"


class Late(ConveyorError):
    """The deadline passed before the work was applied; the server says so."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "late"


class TimedOut(ConveyorError):
    """The deadline passed without an answer; a step may or may not have been applied."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "timed_out"


class Cancelled(ConveyorError):
    """The work was dropped before it was applied."""

    code = grpc.StatusCode.CANCELLED
    reason = "cancelled"


class Unavailable(ConveyorError):
    """Not now; later, or elsewhere."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "unavailable"


class Draining(Unavailable):
    """The server is about to stop."""

    reason = "draining"


class Loading(Unavailable):
    """The model is not ready yet."""

    reason = "loading"


class ConnectionLost(Unavailable):
    """The server could not be reached, or not again; a step may or may not have been applied."""

    reason = "connection_lost"


class EngineFailed(ConveyorError):
    """A run of the model failed."""

    reason = "engine_failed"


class ProtocolError(ConveyorError):
    """The server's answer breaks the wire contract."""

    reason = "protocol_error"


class StepsFailed(ConveyorError):
    """Some of the chunks of ``step_many`` failed; the others were applied.

    Attributes:
        outputs: by session, what the chunks that were applied gave.
        errors: by session, why the others were not.
    """

    reason = "steps_failed"

    def __init__(self, outputs: Mapping[Any, Any], errors: Mapping[Any, ConveyorError]) -> None:
        first = next(iter(errors.values()))
        super().__init__(f"{len(errors)} of {len(outputs) + len(errors)} chunks failed, the first one with: {first}")
        self.code = first.code
        self.outputs = dict(outputs)
        self.errors = dict(errors)


_BY_REASON: dict[str, type[ConveyorError]] = {
    kind.reason: kind
    for kind in (
        InvalidRequest, NotFound, ModelUnknown, SessionUnknown, SessionExpired, SessionLost, NotStreamable,
        PositionConflict, EpochConflict, SessionExists, Full, Late, Cancelled, Unavailable, Draining, Loading,
        EngineFailed,
    )
}  # fmt: skip

_BY_CODE: dict[grpc.StatusCode, type[ConveyorError]] = {
    kind.code: kind for kind in (InvalidRequest, NotFound, SessionExists, Full, Late, Cancelled, Unavailable)
}

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_detail(detail: pb.ErrorDetail) -> ConveyorError:
    """The typed error for what the server says of one; a reason that is not known here gives the type of its code."""
    code = _CODES.get(detail.code, grpc.StatusCode.UNKNOWN)
    kind = _BY_REASON.get(detail.reason) or _BY_CODE.get(code, ConveyorError)
    if kind is PositionConflict:
        return PositionConflict(detail.message, detail.position)
    error = kind(detail.message)
    error.code = code
    error.reason = detail.reason or kind.reason
    return error


def from_rpc(error: grpc.aio.AioRpcError) -> ConveyorError:
    """The typed error for a call that failed.

    Where the server attached no ErrorDetail, it has not spoken, and a status by which a broken connection shows becomes
    ConnectionLost. Proxies turn a dead server into INTERNAL or CANCELLED, so these count beside UNAVAILABLE.
    """
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return from_detail(pb.ErrorDetail.FromString(value))
            except DecodeError:
                return ProtocolError(f"the error detail of a call cannot be read; its status was {error.code().name}")
    return from_status(error.code(), error.details() or "")


def from_status(code: grpc.StatusCode, text: str) -> ConveyorError:
    """The typed error for a bare status."""
    message = f"{code.name}: {text}"
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED):
        return ConnectionLost(message)
    if code is grpc.StatusCode.UNKNOWN and ("connection" in text.lower() or "stream removed" in text.lower()):
        return ConnectionLost(message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(message)
    result = _BY_CODE.get(code, ConveyorError)(message)
    result.code = code
    return result
