"""Typed errors: the tree, and the way into it from the wire."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

import conveyor
from conveyor import errors
from conveyor.v1 import conveyor_pb2 as pb
from service import errors as server_errors
from service.wire import status

CLIENT_ONLY = {"timed_out", "connection_lost", "protocol_error", "steps_failed"}
OTHER_DOOR = {
    "LoadFailed",
    "ControlRefused",
    "Unsupported",
    "SequenceMissing",
    "SequenceEnded",
    "SequenceExpired",
    "SequenceLost",
}
"""Errors of calls that conveyor.v1 does not have, and this client so never meets."""


def kinds(root: type[Any]) -> dict[str, type[Any]]:
    """All classes from a root down, by name."""
    found = {root.__name__: root}
    for kind in root.__subclasses__():
        found |= kinds(kind)
    return found


def of_this_door() -> dict[str, type[Any]]:
    """The server's errors that this client can meet, by name."""
    return {name: kind for name, kind in kinds(server_errors.ConveyorError).items() if name not in OTHER_DOOR}


def test_the_tree_mirrors_the_servers() -> None:
    """Same names, same reasons, same parents; beside them only what a client alone can meet."""
    ours, theirs = kinds(errors.ConveyorError), of_this_door()
    assert kinds(server_errors.ConveyorError).keys() - theirs.keys() == OTHER_DOOR
    for name, kind in theirs.items():
        assert ours[name].reason == kind.reason
        assert [each.__name__ for each in ours[name].__mro__] == [each.__name__ for each in kind.__mro__]
    assert {ours[name].reason for name in ours.keys() - theirs.keys()} == CLIENT_ONLY


@pytest.mark.parametrize("kind", of_this_door().values())
def test_every_error_of_the_server_arrives_as_its_namesake(kind: type[Any]) -> None:
    """Through the server's own table: type, code, reason and text."""
    original = kind("what was wrong", 7) if kind is server_errors.PositionConflict else kind("what was wrong")
    arrived = errors.from_detail(status.detail(original))
    assert type(arrived).__name__ == kind.__name__
    assert arrived.code is status.code(original)
    assert (arrived.reason, str(arrived)) == (kind.reason, "what was wrong")
    if isinstance(arrived, errors.PositionConflict):
        assert arrived.position == 7


def test_all_types_can_be_imported_from_the_package() -> None:
    """A user catches what the package exports."""
    assert set(kinds(errors.ConveyorError)) <= set(conveyor.__all__)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Full),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.PERMISSION_DENIED, errors.ConveyorError),
    ],
)
def test_an_unknown_reason_gives_the_type_of_its_code(code: grpc.StatusCode, kind: type[errors.ConveyorError]) -> None:
    """A newer server's reasons do not break an older client; the reason can still be read."""
    error = errors.from_detail(pb.ErrorDetail(code=code.value[0], reason="brand_new", message="m"))
    assert type(error) is kind
    assert (error.code, error.reason) == (code, "brand_new")


def _failed(code: grpc.StatusCode, text: str = "", trailing: Metadata | None = None) -> AioRpcError:
    return AioRpcError(code, Metadata(), trailing or Metadata(), details=text)


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", errors.ConnectionLost),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM", errors.ConnectionLost),
        (grpc.StatusCode.CANCELLED, "upstream reset", errors.ConnectionLost),
        (grpc.StatusCode.UNKNOWN, "Connection reset by peer", errors.ConnectionLost),
        (grpc.StatusCode.UNKNOWN, "Stream removed", errors.ConnectionLost),
        (grpc.StatusCode.UNKNOWN, "Unexpected <class 'KeyError'>", errors.ConveyorError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", errors.TimedOut),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", errors.Full),
        (grpc.StatusCode.UNAUTHENTICATED, "who", errors.ConveyorError),
    ],
)
def test_a_bare_status_is_told_apart_from_the_servers_word(
    code: grpc.StatusCode, text: str, kind: type[errors.ConveyorError]
) -> None:
    """Where no detail is attached nobody has spoken for the server: the connection is lost, or time is up."""
    error = errors.from_rpc(_failed(code, text))
    assert type(error) is kind
    assert error.code is (kind.code if kind is errors.ConnectionLost else code)


def test_an_attached_detail_wins_over_the_status() -> None:
    """The server's word is taken, so what it refuses is not mistaken for a lost connection."""
    detail = status.detail(server_errors.Draining("stopping")).SerializeToString()
    error = errors.from_rpc(_failed(grpc.StatusCode.UNAVAILABLE, "x", Metadata((errors.DETAIL_KEY, detail))))
    assert type(error) is errors.Draining


def test_an_unreadable_detail_is_a_protocol_error() -> None:
    """Garbage in the metadata is named, not raised through."""
    error = errors.from_rpc(_failed(grpc.StatusCode.INTERNAL, "x", Metadata((errors.DETAIL_KEY, b"\xff\xff"))))
    assert type(error) is errors.ProtocolError
