"""Every kind of bad input at every door: the status code, what was wrong, what was expected, and nobody else disturbed.

One table. Each case is a good request with one thing changed. After it, a session that was open before goes on, the
session that the bad request was for is where it was, nothing leaks, and the good request itself succeeds, all equal to
the reference.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from service.server import Server
from tests.conftest import calling, running
from tests.graphs import HIDDEN, INPUT, expected
from tests.wire.native import Caller, array, chunk, streaming, tensor

Change = Callable[[Any], object]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ABORTED = grpc.StatusCode.ABORTED
EXISTS = grpc.StatusCode.ALREADY_EXISTS

MAX_STEPS, MAX_BATCH = 8, 3
x = np.random.default_rng(0).standard_normal((2, 4, INPUT)).astype(np.float32)
zeros = np.zeros((2, 1, HIDDEN), np.float32)


# --- good requests ---


def states(*index: int) -> list[pb.Tensor]:
    """The initial states of a batch, or of one session."""
    return [tensor(zeros[index], name) for name in ("h", "c")]


GOOD: dict[str, Callable[[], Any]] = {
    "Infer": lambda: pb.InferRequest(
        model="lstm", version=1, inputs=[tensor(x, "x")], lengths=[4, 2], initial_states=states()
    ),
    "Stream": lambda: chunk("victim", 0, x[0], timeout_us=10_000_000),
    "OpenSession": lambda: pb.OpenSessionRequest(model="lstm", version=1, session_id="new", initial_states=states(0)),
    "ImportSession": lambda: pb.ImportSessionRequest(
        state=pb.SessionState(model="lstm", version=1, position=7, states=states(0)), session_id="new"
    ),
}
"""A request of each door that succeeds."""


# --- the table ---


@dataclass(frozen=True)
class Bad:
    """A good request with one thing changed.

    Attributes:
        door: the call that it is for.
        what: what is changed.
        change: does it, in place.
        says: what the error's text must hold: what was wrong, what was expected.
        code: the status.
        reason: the same for programs.
    """

    door: str
    what: str
    change: Change
    says: tuple[str, ...]
    code: grpc.StatusCode = INVALID
    reason: str = "invalid_request"

    def __str__(self) -> str:
        return f"{self.door}: {self.what}"


@dataclass(frozen=True)
class Place:
    """Where tensors stand in a door's request.

    Attributes:
        door: the call.
        kind: input or state.
        find: gives the repeated field.
        names: those that the model has.
        shape: how errors write what the first should be.
    """

    door: str
    kind: str
    find: Callable[[Any], Any]
    names: list[str]
    shape: str

    @property
    def good(self) -> Any:
        """What stands there in the good request."""
        return self.find(GOOD[self.door]())

    @property
    def called(self) -> str:
        """How errors call the first tensor."""
        return f"{self.kind} {self.names[0]!r}"

    def bad_tensor(self, what: str, change: Change, *says: str) -> Bad:
        """A change of the first tensor."""
        says = (f"{self.called} {says[0]}", *says[1:])
        return Bad(self.door, f"{self.kind}: {what}", lambda request: change(self.find(request)[0]), says)

    def bad_list(self, what: str, change: Change, *given: str) -> Bad:
        """A change of which tensors there are."""
        says = (f"{self.kind}s {list(given)} were given", f"expected each of {self.names} once")
        return Bad(self.door, f"{self.kind}: {what}", lambda request: change(self.find(request)), says)


PLACES = [
    Place("Infer", "input", lambda request: request.inputs, ["x"], "[N, T, 3]"),
    Place("Infer", "state", lambda request: request.initial_states, ["h", "c"], "[2, 1, 5]"),
    Place("Stream", "input", lambda request: request.inputs, ["x"], "[T, 3]"),
    Place("OpenSession", "state", lambda request: request.initial_states, ["h", "c"], "[1, 5]"),
    Place("ImportSession", "state", lambda request: request.state.states, ["h", "c"], "[1, 5]"),
]


def put(name: str, value: object) -> Change:
    """Set a field."""
    return lambda message: setattr(message, name, value)


def to_shape(*shape: int) -> Change:
    """Give a tensor another shape, and as many bytes as that has."""

    def change(message: pb.Tensor) -> None:
        message.shape[:] = shape
        message.data = bytes(4 * max(0, math.prod(shape)))

    return change


def to_hold(value: float) -> Change:
    """Put a number into a tensor, at its second place."""

    def change(message: pb.Tensor) -> None:
        values = array(message).copy()
        values.reshape(-1)[1] = value
        message.data = values.tobytes()

    return change


def bad_tensors(place: Place) -> Iterator[Bad]:
    """What can be wrong with a tensor."""
    sizes, data = tuple(place.good[0].shape), place.good[0].data
    bad = place.bad_tensor
    yield bad("another dtype", put("data_type", pb.DATA_TYPE_INT32), "is int32", "expected float32")
    yield bad("no dtype", put("data_type", 0), "is of no known dtype", "expected float32")
    yield bad("unknown dtype", put("data_type", 99), "is of no known dtype", "expected float32")
    for what, shape in (
        ("wrong last size", (*sizes[:-1], 7)),
        ("an axis too few", sizes[1:]),
        ("an axis too many", (1, *sizes)),
        ("no axes", ()),
        ("a negative size", (-1, *sizes[1:])),
        ("two negative sizes", (*sizes[:-2], -4, -INPUT)),
    ):
        yield bad(what, to_shape(*shape), f"has shape [{', '.join(map(str, shape))}]", f"expected {place.shape}")
    yield bad("many axes", to_shape(*[1] * 40), f"has shape [{'1, ' * 8}...]", f"expected {place.shape}")
    for what, held in (("a byte short", data[:-1]), ("an element long", data + bytes(4)), ("no bytes", b"")):
        yield bad(what, put("data", held), f"holds {len(held)} bytes", f"expected {len(data)}")
    for value in (np.nan, np.inf, -np.inf):
        yield bad(str(value), to_hold(value), "holds NaN or infinity", "expected finite numbers")


def bad_lists(place: Place) -> Iterator[Bad]:
    """What can be wrong with which tensors there are."""
    first, *rest = [message.name for message in place.good]
    bad = place.bad_list
    yield bad("misnamed", lambda tensors: setattr(tensors[0], "name", "z"), "z", *rest)
    yield bad("one twice", lambda tensors: tensors.append(tensors[0]), first, *rest, first)
    yield bad("one too many", lambda tensors: tensors.add(name="z"), first, *rest, "z")
    if place.kind == "input":
        yield bad("none", lambda tensors: tensors.pop())
    else:
        yield bad("one missing", lambda tensors: tensors.pop(), first)
        yield bad("one without name", lambda tensors: setattr(tensors[0], "name", ""), "", *rest)


def infer(what: str, change: Change, *says: str, **more: Any) -> Bad:
    """A bad batch."""
    return Bad("Infer", what, change, says, **more)


def stream(what: str, change: Change, *says: str, **more: Any) -> Bad:
    """A bad chunk."""
    return Bad("Stream", what, change, says, **more)


def sized(request: Any, *shape: int) -> None:
    """Another shape of the first input, and nothing else that would be wrong with it."""
    to_shape(*shape)(request.inputs[0])
    if isinstance(request, pb.InferRequest):
        del request.lengths[:], request.initial_states[:]


def bad_models(door: str) -> Iterator[Bad]:
    """What can be wrong with a model's name and version."""

    def bad(what: str, name: str, value: object, *says: str, **more: Any) -> Bad:
        def change(request: Any) -> None:
            setattr(request.state if door == "ImportSession" else request, name, value)

        return Bad(door, what, change, says, **more)

    unknown: dict[str, Any] = {"code": NOT_FOUND, "reason": "model_unknown"}
    yield bad("unknown model", "model", "gru", "no model 'gru' is served", "there are: lstm", **unknown)
    yield bad("no model", "model", "", "no model '' is served", "there are: lstm", **unknown)
    yield bad("model with a very long name", "model", "\N{GRINNING FACE}" * 10_000, "no model '\\U0001f600", **unknown)
    yield bad("unknown version", "version", 2, "'lstm' has no version 2", "there are: 1", **unknown)
    yield bad("negative version", "version", -1, "version is -1", "expected a positive integer, or 0")


def bad_ids(door: str) -> Iterator[Bad]:
    """What can be wrong with a new session's id."""
    for what, identity in (("id too long", "x" * 129), ("id not ASCII", "é"), ("id with a newline", "a\nb")):
        yield Bad(door, what, put("session_id", identity), ("up to 128 printable ASCII characters",))
    says = ("'neighbour' is open already",)
    yield Bad(door, "id taken", put("session_id", "neighbour"), says, EXISTS, "session_exists")


HUGE = 1 << 62

BAD = [
    *(bad for place in PLACES for bad in (*bad_tensors(place), *bad_lists(place))),
    # Sizes.
    infer("N = 0", lambda r: sized(r, 0, 4, 3), "no rows (N = 0)", "at least 1"),
    infer("T = 0", lambda r: sized(r, 2, 0, 3), "no steps (T = 0)", "at least 1"),
    infer("N = T = 0", lambda r: sized(r, 0, 0, 3), "no rows (N = 0)", "at least 1"),
    infer("N huge, T = 0", lambda r: sized(r, HUGE, 0, 3), "input 'x'", f"[{HUGE}, 0, 3]"),
    infer("N over the limit, T = 0", lambda r: sized(r, 1 << 20, 0, 3), f"{1 << 20} rows", f"up to {MAX_BATCH}"),
    infer("N large, T = 0", lambda r: sized(r, 1 << 40, 0, 3), "input 'x'", f"[{1 << 40}, 0, 3]"),
    infer("product over 64 bits", lambda r: r.inputs[0].shape.__setitem__(slice(2), [HUGE, HUGE]), "expected"),
    infer("too many rows", lambda r: sized(r, 4, 4, 3), "4 rows", f"up to {MAX_BATCH}"),
    infer("too many steps", lambda r: sized(r, 2, 9, 3), "9 steps", f"up to {MAX_STEPS}"),
    stream("T = 0", lambda r: sized(r, 0, 3), "no steps (T = 0)", "at least 1"),
    stream("T huge", lambda r: r.inputs[0].shape.__setitem__(0, HUGE), f"[{HUGE}, 3]", "expected [T, 3]"),
    stream("too many steps", lambda r: sized(r, 9, 3), "9 steps", f"up to {MAX_STEPS}"),
    # Lengths.
    infer("too few lengths", lambda r: r.lengths.pop(), "1 lengths for 2 rows", "one a row, or none"),
    infer("too many lengths", lambda r: r.lengths.append(1), "3 lengths for 2 rows", "one a row, or none"),
    infer("negative length", lambda r: r.lengths.__setitem__(1, -1), "row 1 has length -1", "expected 1 to 4"),
    infer("length 0", lambda r: r.lengths.__setitem__(0, 0), "row 0 has length 0", "expected 1 to 4"),
    infer("length over T", lambda r: r.lengths.__setitem__(1, 5), "row 1 has length 5", "expected 1 to 4"),
    infer("states for other rows", lambda r: to_shape(3, 1, 5)(r.initial_states[1]), "state 'c'", "[2, 1, 5]"),
    # Names, versions, positions.
    *(bad for door in ("Infer", "OpenSession", "ImportSession") for bad in bad_models(door)),
    *(bad for door in ("OpenSession", "ImportSession") for bad in bad_ids(door)),
    Bad("ImportSession", "no states", lambda r: r.state.states.__delitem__(slice(None)), ("empty", "['h', 'c']")),
    Bad("ImportSession", "negative position", lambda r: setattr(r.state, "position", -1), ("-1", "expected 0")),
    Bad(
        "ImportSession",
        "position near the end of int64",
        lambda r: setattr(r.state, "position", (1 << 63) - 1),
        (str((1 << 63) - 1), "expected 0"),
    ),
    Bad(
        "ImportSession",
        "nothing",
        lambda r: r.ClearField("state"),
        ("no model '' is served",),
        NOT_FOUND,
        "model_unknown",
    ),
    stream(
        "unknown session",
        lambda r: setattr(r, "session_id", "nobody"),
        "no session 'nobody' is open",
        code=NOT_FOUND,
        reason="session_unknown",
    ),
    stream(
        "very long session id",
        lambda r: setattr(r, "session_id", "x" * 100_000),
        "no session 'xxx",
        code=NOT_FOUND,
        reason="session_unknown",
    ),
    stream(
        "no session id",
        lambda r: setattr(r, "session_id", ""),
        "no session '' is open",
        code=NOT_FOUND,
        reason="session_unknown",
    ),
    stream("negative position", lambda r: setattr(r, "position", -1), "position is -1", "expected neither"),
    stream("negative timeout", lambda r: setattr(r, "timeout_us", -5), "timeout_us -5", "expected neither"),
    stream(
        "position ahead",
        lambda r: setattr(r, "position", 3),
        "at position 3 does not follow",
        "the session is at position 0",
        code=ABORTED,
        reason="position_conflict",
    ),
    stream(
        "position at the end of int64",
        lambda r: setattr(r, "position", (1 << 63) - 1),
        "the session is at position 0",
        code=ABORTED,
        reason="position_conflict",
    ),
    # What does not fit into the trailing metadata must not cost the caller its error.
    infer(
        "many tensors with long names",
        lambda r: r.inputs.extend(pb.Tensor(name=f"{n}" + "\N{GRINNING FACE}" * 1000) for n in range(100)),
        "inputs ['x', '0",
    ),
]


# --- the test ---


class House:
    """A server, a stream to it, a neighbour under way, and a victim at position 0."""

    def __init__(self, server: Server, caller: Caller) -> None:
        self.server = server
        self.caller = caller

    async def send(self, door: str, request: Any) -> tuple[pb.ErrorDetail | None, Any]:
        """Send a request; give the error, or the reply."""
        if door == "Stream":
            (result,) = await self.caller.step(request)
            assert (result.session_id, result.position) == (request.session_id, request.position)
            if not result.HasField("error"):
                return None, result
            assert (result.steps, len(result.outputs)) == (0, 0)
            return result.error, None
        call = getattr(self.caller.stub, door)(request)
        code = await call.code()
        if code is grpc.StatusCode.OK:
            return None, await call
        metadata = dict(await call.trailing_metadata())
        error = pb.ErrorDetail.FromString(metadata["conveyor-error-bin"])
        assert (code.value[0], await call.details()) == (error.code, error.message)
        return error, None


@pytest.fixture
async def house(lstm_repository: Path) -> AsyncIterator[House]:
    """A server with small limits, where the neighbour has taken two steps of ``x[1]``."""
    async with (
        running(lstm_repository, max_steps=MAX_STEPS, max_batch=MAX_BATCH, threads=1) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        for name in ("neighbour", "victim"):
            await caller.open(session_id=name)
        (result,) = await caller.step(chunk("neighbour", 0, x[1, :2]))
        assert not result.HasField("error")
        yield House(server, caller)


def equal(given: pb.Tensor, reference: NDArray[Any]) -> None:
    """Hold a reply against the reference."""
    np.testing.assert_allclose(array(given), reference.astype(np.float64), rtol=0, atol=2e-6)


async def nobody_was_disturbed(house: House, door: str) -> None:
    """The neighbour goes on, the victim is where it was, nothing leaked, and a good request succeeds."""
    assert len(house.server.operations.sessions) == house.server.repository.find("lstm").pool.taken == 2
    (result,) = await house.caller.step(chunk("neighbour", 2, x[1, 2:]))
    equal(result.outputs[0], expected(x[1])[2:])
    assert await house.caller.position("victim") == 0
    error, reply = await house.send(door, GOOD[door]())
    assert error is None
    if door == "Infer":
        assert array(reply.outputs[0]).shape == (2, 4, 2)
        equal(reply.outputs[0], np.stack([expected(x[0]), np.pad(expected(x[1, :2]), ((0, 2), (0, 0)))]))
    elif door == "Stream":
        equal(reply.outputs[0], expected(x[0]))
    else:
        (result,) = await house.caller.step(chunk("new", reply.session.position, x[0]))
        equal(result.outputs[0], expected(x[0]))


@pytest.mark.parametrize("bad", BAD, ids=str)
async def test_bad_input(house: House, bad: Bad) -> None:
    """Told what was wrong and what was expected, under the right code, and nobody else is disturbed."""
    request = GOOD[bad.door]()
    bad.change(request)
    assert request != GOOD[bad.door]()
    error, _ = await house.send(bad.door, request)
    assert error is not None, "it was accepted"
    assert (error.code, error.reason) == (bad.code.value[0], bad.reason), error.message
    for words in bad.says:
        assert words in error.message
    assert len(error.message) <= 2000
    assert error.message.isascii()
    await nobody_was_disturbed(house, bad.door)


@pytest.mark.parametrize("door", GOOD)
async def test_the_good_requests_are_good(house: House, door: str) -> None:
    """What the table changes succeeds unchanged, so that each case fails by its change alone."""
    await nobody_was_disturbed(house, door)


async def test_bad_chunks_between_good_ones(house: House) -> None:
    """In one message: each is answered, the good ones as if they were alone, and the stream lives on."""
    requests = []
    cases = [bad for bad in BAD if bad.door == "Stream"]
    for bad in cases:
        request = GOOD["Stream"]()
        bad.change(request)
        requests.append(request)
    good = [chunk("neighbour", 2, x[1, 2:3]), chunk("neighbour", 3, x[1, 3:])]
    results = await house.caller.step(good[0], *requests, good[1])
    refused = [result.error for result in results if result.HasField("error")]
    assert [error.code for error in refused] == [bad.code.value[0] for bad in cases]
    first, second = (result.outputs[0] for result in results if not result.HasField("error"))
    equal(first, expected(x[1])[2:3])
    equal(second, expected(x[1])[3:])
    assert await house.caller.position("victim") == 0


# --- other doors, which take an id alone ---

BY_ID: dict[str, Callable[[str], Any]] = {
    "GetSession": lambda name: pb.GetSessionRequest(session_id=name),
    "ForkSession": lambda name: pb.ForkSessionRequest(session_id=name),
    "ResetSession": lambda name: pb.ResetSessionRequest(session_id=name),
    "CloseSession": lambda name: pb.CloseSessionRequest(session_id=name),
    "ExportSession": lambda name: pb.ExportSessionRequest(session_id=name),
}


@pytest.mark.parametrize("name", ["nobody", "", "x" * 100_000, "\N{GRINNING FACE}" * 1000, "a\nb"], ids=ascii)
@pytest.mark.parametrize("door", BY_ID)
async def test_sessions_that_are_not_there(house: House, door: str, name: str) -> None:
    """Whatever the id looks like."""
    error, _ = await house.send(door, BY_ID[door](name))
    assert error is not None
    assert (error.code, error.reason) == (NOT_FOUND.value[0], "session_unknown")
    await nobody_was_disturbed(house, "Infer")


@pytest.mark.parametrize("door", ["ForkSession", "ResetSession"])
@pytest.mark.parametrize("position", [-1, 1, 3, (1 << 63) - 1])
async def test_positions_where_the_session_is_not(house: House, door: str, position: int) -> None:
    """Told where it is, and nothing is done."""
    request = BY_ID[door]("neighbour")
    request.position = position
    error, _ = await house.send(door, request)
    assert error is not None
    assert (error.code, error.reason, error.position) == (ABORTED.value[0], "position_conflict", 2)
    await nobody_was_disturbed(house, "Infer")


async def test_a_fork_needs_a_new_id(house: House) -> None:
    """A malformed one and one that is taken are refused as when a session is opened."""
    for name, reason in (("neighbour", "session_exists"), ("victim", "session_exists"), ("é", "invalid_request")):
        error, _ = await house.send("ForkSession", pb.ForkSessionRequest(session_id="neighbour", new_session_id=name))
        assert error is not None
        assert error.reason == reason
    await nobody_was_disturbed(house, "Infer")


# --- NaN, where it is let in ---


async def test_non_finite_numbers_are_taken_where_they_are_accepted(lstm_repository: Path) -> None:
    """They may spoil their own row and no other of its tick, and nothing is refused for holding them.

    What becomes of them is the engine's: its LSTM on the CPU turns NaN into finite numbers.
    """
    spoiled = x.copy()
    spoiled[0, 1, 2] = np.nan
    async with (
        running(lstm_repository, non_finite="accept", threads=1) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        reply = await stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(spoiled)]))
        np.testing.assert_allclose(array(reply.outputs[0])[0, :1], expected(x[0, :1]), rtol=0, atol=2e-6)
        np.testing.assert_allclose(array(reply.outputs[0])[1], expected(x[1]), rtol=0, atol=2e-6)
        bad, good = await caller.open(), await caller.open()
        results = await caller.step(chunk(bad, 0, spoiled[0]), chunk(good, 0, x[1]))
        assert not any(result.HasField("error") for result in results)
        (of_good,) = (result for result in results if result.session_id == good)
        equal(of_good.outputs[0], expected(x[1]))
        infinite = [tensor(np.full((1, HIDDEN), np.inf), name) for name in ("h", "c")]
        state = pb.SessionState(model="lstm", version=1, position=4, states=infinite)
        imported = (await stub.ImportSession(pb.ImportSessionRequest(state=state))).session
        exported = (await stub.ExportSession(pb.ExportSessionRequest(session_id=imported.session_id))).state
        exported.ClearField("digest")
        assert exported == state


async def test_bytes_that_are_no_message(lstm_repository: Path) -> None:
    """Unary calls and streams say so, not a word of what reads them; what a stream took before is answered first."""
    async with running(lstm_repository) as server, calling(server) as stub:
        session = (await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))).session.session_id
        good = pb.StreamRequest(chunks=[chunk(session, 0, np.ones((1, INPUT), np.float32))]).SerializeToString()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as opened:
            channel: Any = opened
            service = "/conveyor.v1.ConveyorService"
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await channel.unary_unary(f"{service}/GetModel")(b"\xff\xff\xff")
            stream = channel.stream_stream(f"{service}/Stream")(iter([good, b"\xff\xff\xff"]))
            answer = pb.StreamResponse.FromString(await stream.read())
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await stream.read()
        assert answer.results[0].steps == 1
        for error in (unary.value, ended.value):
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == "the 3 bytes that were sent are not the message that this call takes"


async def test_more_tensors_than_any_request_has(lstm_repository: Path) -> None:
    """They are counted and refused, not looked at one by one."""
    async with running(lstm_repository) as server, calling(server) as stub:
        request = pb.InferRequest(model="lstm", inputs=[pb.Tensor()] * 1025)
        with pytest.raises(grpc.aio.AioRpcError, match="there are 1025 tensors; a request has up to 1024") as caught:
            await stub.Infer(request)
        assert caught.value.code() is INVALID
