"""The tree of errors, its drawing, and the one table that turns it into status codes."""

from __future__ import annotations

import inspect

import grpc
import pytest

from service import errors
from service.errors import ConveyorError, PositionConflict
from service.wire.status import code, detail

EXPECTED = {
    "InvalidRequest": grpc.StatusCode.INVALID_ARGUMENT,
    "LoadFailed": grpc.StatusCode.INVALID_ARGUMENT,
    "NotFound": grpc.StatusCode.NOT_FOUND,
    "ModelUnknown": grpc.StatusCode.NOT_FOUND,
    "SessionUnknown": grpc.StatusCode.NOT_FOUND,
    "SequenceMissing": grpc.StatusCode.INVALID_ARGUMENT,
    "SequenceEnded": grpc.StatusCode.INVALID_ARGUMENT,
    "SequenceExpired": grpc.StatusCode.INVALID_ARGUMENT,
    "SequenceLost": grpc.StatusCode.INVALID_ARGUMENT,
    "SessionExpired": grpc.StatusCode.NOT_FOUND,
    "SessionLost": grpc.StatusCode.NOT_FOUND,
    "Unsupported": grpc.StatusCode.UNIMPLEMENTED,
    "NotStreamable": grpc.StatusCode.FAILED_PRECONDITION,
    "PositionConflict": grpc.StatusCode.ABORTED,
    "EpochConflict": grpc.StatusCode.ABORTED,
    "SessionExists": grpc.StatusCode.ALREADY_EXISTS,
    "Full": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "Late": grpc.StatusCode.DEADLINE_EXCEEDED,
    "Cancelled": grpc.StatusCode.CANCELLED,
    "Unavailable": grpc.StatusCode.UNAVAILABLE,
    "Draining": grpc.StatusCode.UNAVAILABLE,
    "Loading": grpc.StatusCode.UNAVAILABLE,
    "ControlRefused": grpc.StatusCode.UNAVAILABLE,
    "EngineFailed": grpc.StatusCode.INTERNAL,
}


def made(name: str) -> ConveyorError:
    """An error of that class."""
    kind = getattr(errors, name)
    made: ConveyorError = PositionConflict("moved", 5) if kind is PositionConflict else kind("what was wrong")
    return made


def classes() -> dict[str, type[ConveyorError]]:
    """Every class below the root."""
    return {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ConveyorError) and kind is not ConveyorError
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_every_error_has_its_status_code(name: str) -> None:
    """As the contract says."""
    assert code(made(name)) is EXPECTED[name]
    assert detail(made(name)).code == EXPECTED[name].value[0]


def test_no_error_is_left_out() -> None:
    """A new class needs a line in this table, and a reason that no other has."""
    assert classes().keys() == EXPECTED.keys()
    reasons = [kind.reason for kind in classes().values()]
    assert len(set(reasons)) == len(reasons)
    assert ConveyorError.reason not in reasons


def test_the_drawing_is_the_tree() -> None:
    """Each class stands in the module's docstring under the class that it derives from."""
    drawn: dict[str, str] = {}
    above = ["ConveyorError"]
    for line in (inspect.getdoc(errors) or "").splitlines():
        branch, found, rest = line.partition("── ")
        if found:
            depth, name = len(branch) // 4 - 1, rest.split()[0]
            drawn[name] = above[depth]
            above[depth + 1 :] = [name]
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in classes().items()}


def test_detail_says_what_was_wrong() -> None:
    """Reason and text, and with a position conflict where the server is, 0 told apart from none."""
    told = detail(PositionConflict("the session is at 0", 0))
    assert (told.reason, told.message, told.HasField("position"), told.position) == (
        "position_conflict",
        "the session is at 0",
        True,
        0,
    )
    assert not detail(made("Full")).HasField("position")


def test_the_text_of_an_unexpected_error_stays_inside() -> None:
    """It is told as ours, without a word of it."""
    told = detail(KeyError("secret"))
    assert (told.code, told.reason) == (grpc.StatusCode.INTERNAL.value[0], "engine_failed")
    assert "secret" not in str(told)
