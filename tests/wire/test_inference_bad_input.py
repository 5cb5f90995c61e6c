"""Bad input at the second door: the status, what was wrong, what was expected, and nobody else disturbed.

One table. Each case is a good request with one thing changed. After it, the sequence that it was for goes on from where
it was, and nothing is left of it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from service.server import Server
from service.wire.inference_stubs import inference_pb2 as pb
from tests.conftest import running
from tests.graphs import HIDDEN, INPUT, expected
from tests.wire.inference import Stub, calling, output, parameter, refusal, request

MAX_STEPS, MAX_BATCH = 8, 3
x = np.random.default_rng(0).standard_normal((2, 4, INPUT)).astype(np.float32)
h = np.zeros((2, 1, HIDDEN), np.float32)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


def batch() -> pb.ModelInferRequest:
    """A good request for a batch, with lengths and states."""
    lengths = np.array([4, 2], np.int32)
    return request({"x": x, "sequence_lengths": lengths, "h": h, "c0": h}, "y", "hT", version="1", priority=1)


def one() -> pb.ModelInferRequest:
    """A good request for a sequence."""
    return request(x[:1], "y", sequence_id=5, sequence_start=True, sequence_position=0, timeout=10**9)


def many() -> pb.ModelInferRequest:
    """A good request for two sequences."""
    numbers = {"sequence_ids": np.array([5, 6]), "sequence_positions": np.array([0, 0])}
    return request({"x": x, **numbers, "sequence_start": np.array([True, True])})


@dataclass(frozen=True)
class Bad:
    """A good request with one thing changed.

    Attributes:
        what: is changed.
        good: makes the request.
        change: does it, in place.
        says: what the error's text must hold.
        code: the status.
    """

    what: str
    good: Callable[[], pb.ModelInferRequest]
    change: Callable[[pb.ModelInferRequest], object]
    says: tuple[str, ...]
    code: grpc.StatusCode = INVALID

    def __str__(self) -> str:
        return f"{self.good.__name__}: {self.what}"


def given(name: str, value: object) -> Callable[[pb.ModelInferRequest], object]:
    """Set a parameter."""
    return lambda message: message.parameters[name].CopyFrom(parameter(value))


def entry(index: int, value: np.ndarray[Any, Any], datatype: str = "") -> Callable[[pb.ModelInferRequest], object]:
    """Replace an input."""

    def change(message: pb.ModelInferRequest) -> None:
        replaced = request({"replaced": value}).inputs[0]
        message.inputs[index].shape[:] = replaced.shape
        message.inputs[index].datatype = datatype or replaced.datatype
        message.raw_input_contents[index] = value.tobytes()

    return change


def typed(datatype: str, **contents: list[Any]) -> Callable[[pb.ModelInferRequest], object]:
    """Give the input typed contents, and no raw ones."""

    def change(message: pb.ModelInferRequest) -> None:
        del message.raw_input_contents[:]
        message.inputs[0].datatype = datatype
        for field, values in contents.items():
            getattr(message.inputs[0].contents, field).extend(values)

    return change


def add(name: str, value: np.ndarray[Any, Any]) -> Callable[[pb.ModelInferRequest], object]:
    """Add an input."""

    def change(message: pb.ModelInferRequest) -> None:
        added = request({name: value})
        message.inputs.append(added.inputs[0])
        message.raw_input_contents.append(added.raw_input_contents[0])

    return change


CASES = [
    # The model, and what is asked of it.
    Bad("version", batch, lambda m: setattr(m, "model_version", "-1"), ("version '-1' is none", "positive integer")),
    Bad("output unknown", batch, lambda m: m.outputs.add(name="z"), ("output 'z' is none of model 'lstm'", "y")),
    Bad("output twice", batch, lambda m: m.outputs.add(name="y"), ("asked for twice",)),
    Bad(
        "classes",
        batch,
        lambda m: m.outputs[0].parameters["classification"].CopyFrom(parameter(3)),
        ("does not turn outputs into classes",),
        UNIMPLEMENTED,
    ),
    Bad(
        "shared memory",
        batch,
        lambda m: m.inputs[0].parameters["shared_memory_region"].CopyFrom(parameter("mine")),
        ("shares no memory",),
        UNIMPLEMENTED,
    ),
    Bad(
        "shared memory for an output",
        batch,
        lambda m: m.outputs[0].parameters["shared_memory_region"].CopyFrom(parameter("mine")),
        ("shares no memory",),
        UNIMPLEMENTED,
    ),
    Bad(
        "misspelt",
        one,
        given("sequence_postion", 4),
        ("parameter 'sequence_postion' is unknown", "sequence_position"),
    ),
    Bad(
        "too many parameters",
        one,
        lambda m: [m.parameters[str(n)].SetInParent() for n in range(1024)],  # type: ignore[func-returns-value]
        ("parameters; a request has up to 1024",),
    ),
    # Tensors.
    Bad("no inputs", one, lambda m: (m.inputs.pop(), m.raw_input_contents.pop()), ("inputs [] were given", "['x']")),
    Bad("input unknown", batch, add("z", x), ("inputs ['x', 'z'] were given", "['x']")),
    Bad("input twice", batch, add("x", x), ("inputs ['x', 'x'] were given",)),
    Bad("raw entry missing", batch, lambda m: m.raw_input_contents.pop(), ("3 entries for 4 inputs",)),
    Bad(
        "raw and typed",
        one,
        lambda m: m.inputs[0].contents.fp32_contents.append(1),
        ("input 'x' has contents beside raw_input_contents",),
    ),
    Bad("wrong dtype", one, entry(0, x[:1].astype(np.float64)), ("input 'x' is float64; expected float32",)),
    Bad("no dtype", one, entry(0, x[:1], "FP99"), ("input 'x' is of no known dtype; expected float32",)),
    Bad("rank", one, entry(0, x[0]), ("input 'x' has shape [4, 3]; expected [N, T, 3]",)),
    Bad("features", one, entry(0, x[:1, :, :2].copy()), ("has shape [1, 4, 2]; expected [N, T, 3]",)),
    Bad("bytes", one, lambda m: m.raw_input_contents.__setitem__(0, b"12"), ("holds 2 bytes; expected 48",)),
    Bad("negative size", one, lambda m: m.inputs[0].shape.__setitem__(1, -4), ("has shape [1, -4, 3]",)),
    Bad("no rows", batch, entry(0, x[:0]), ("no rows",)),
    Bad("too many rows", batch, entry(0, np.zeros((4, 2, 3), np.float32)), ("4 rows", "up to 3")),
    Bad("no steps", one, entry(0, x[:1, :0]), ("no steps",)),
    Bad("too many steps", one, entry(0, np.zeros((1, 9, 3), np.float32)), ("9 steps", "up to 8")),
    Bad("not finite", one, entry(0, np.full((1, 4, 3), math.nan, np.float32)), ("input 'x' holds NaN or infinity",)),
    Bad("typed: field", one, typed("FP32", int_contents=[1] * 12), ("holds int_contents; expected fp32_contents",)),
    Bad(
        "typed: count",
        one,
        typed("FP32", fp32_contents=[1.0]),
        ("input 'x' holds 1 elements in fp32_contents; expected 12",),
    ),
    Bad("typed: FP16", one, typed("FP16", fp32_contents=[1.0] * 12), ("no typed contents; send it raw",)),
    Bad("typed: nothing", one, typed("FP32"), ("input 'x' holds 0 elements in fp32_contents; expected 12",)),
    Bad("axes", one, lambda m: m.inputs[0].shape.extend([1] * 100_000), ("input 'x' has shape [1, 4, 3, 1",)),
    Bad("too many inputs", one, lambda m: m.inputs.extend([m.inputs[0]] * 1024), ("1025 inputs", "up to 1024")),
    Bad("too many outputs", one, lambda m: m.outputs.extend([m.outputs[0]] * 1024), ("1025 outputs", "up to 1024")),
    # What belongs to a batch.
    Bad("lengths: count", batch, entry(1, np.array([1], np.int32)), ("1 lengths for 2 rows",)),
    Bad("lengths: range", batch, entry(1, np.array([5, 1], np.int32)), ("row 0 has length 5; expected 1 to 4",)),
    Bad("lengths: dtype", batch, entry(1, np.array([4.0, 1.0])), ("'sequence_lengths' is float64", "int64 or int32")),
    Bad("lengths: shape", batch, entry(1, np.array([[4, 1]], np.int32)), ("has shape [1, 2]; expected [N]",)),
    Bad("lengths: bytes", batch, lambda m: m.raw_input_contents.__setitem__(1, b"1"), ("holds 1 bytes; expected 8",)),
    Bad("states: one missing", batch, lambda m: (m.inputs.pop(), m.raw_input_contents.pop()), ("states ['h']", "'c'")),
    Bad("states: shape", batch, entry(2, h[:1]), ("state 'h' has shape [1, 1, 5]; expected [2, 1, 5]",)),
    # Parameters.
    Bad("timeout: type", one, given("timeout", "soon"), ("parameter 'timeout' is string_param; expected an integer",)),
    Bad("timeout: range", batch, given("timeout", -1), ("parameter 'timeout' is -1; expected 0 to",)),
    Bad("timeout: empty", one, lambda m: m.parameters["timeout"].Clear(), ("parameter 'timeout' is empty",)),
    Bad("priority: type", one, given("priority", 1.5), ("parameter 'priority' is double_param",)),
    Bad("priority: range", one, given("priority", -1), ("parameter 'priority' is -1",)),
    # Sequences.
    Bad(
        "id: type", one, given("sequence_id", 1.5), ("'sequence_id' is double_param; expected an integer or a string",)
    ),
    Bad("id: bool", one, given("sequence_id", True), ("'sequence_id' is bool_param",)),
    Bad("id: too long", one, given("sequence_id", "x" * 129), ("128 printable ASCII characters",)),
    Bad("id: not printable", one, given("sequence_id", "a\nb"), ("128 printable ASCII characters",)),
    Bad(
        "no id",
        one,
        lambda m: m.parameters.pop("sequence_id"),
        ("must specify a non-zero or non-empty correlation ID",),
    ),
    Bad("start: type", one, given("sequence_start", 1), ("'sequence_start' is int64_param; expected a bool",)),
    Bad("position: range", one, given("sequence_position", -1), ("'sequence_position' is -1; expected 0 to",)),
    Bad("position of a START", one, given("sequence_position", 4), ("START", "position 0")),
    Bad("epoch: range", one, given("sequence_epoch", -1), ("'sequence_epoch' is -1",)),
    Bad("rows", one, entry(0, x), ("2 rows for 1 sequences", "sequence_ids")),
    Bad(
        "state of a sequence",
        one,
        lambda m: (add("h0", h[:1])(m), add("c0", h[:1])(m)),
        ("input 'h' is a state", "send states with a batch"),
    ),
    Bad("state wanted of a sequence", one, lambda m: m.outputs.add(name="hT"), ("'hT' is a state",)),
    Bad(
        "other version",
        one,
        lambda m: setattr(m, "model_version", "2"),
        ("'lstm' has no version 2",),
        grpc.StatusCode.NOT_FOUND,
    ),
    # Several sequences.
    Bad("id and ids", many, given("sequence_id", 5), ("sequence_id and sequence_ids were given",)),
    Bad("ids: tensor and parameter", many, given("sequence_ids", "[5, 6]"), ("as an input and as a parameter",)),
    Bad("ids: twice", many, entry(1, np.array([5, 5])), ("sequence '5' stands twice",)),
    Bad("ids: none", many, entry(1, np.array([5, 0])), ("row 1 has no sequence id",)),
    Bad("ids: empty", many, entry(1, np.array([], np.int64)), ("holds no ids",)),
    Bad("ids: too many", many, entry(1, np.arange(1, 5)), ("'sequence_ids' has 4 rows; this server takes up to 3",)),
    Bad("ids: count", many, entry(1, np.array([5])), ("sequence_start holds 2 values for 1 sequence ids",)),
    Bad("ids: dtype", many, entry(1, np.array([5.0, 6.0])), ("'sequence_ids' is float64", "bytes")),
    Bad("ids: cut short", many, entry(1, np.array([5, 6]), "BYTES"), ("'sequence_ids'",)),
    Bad("positions: range", many, entry(2, np.array([0, -1])), ("sequence_positions holds a number beyond its range",)),
    Bad("position and positions", many, given("sequence_position", 0), ("sequence_position and sequence_positions",)),
    Bad("starts: dtype", many, entry(3, np.array([1, 1])), ("'sequence_start' is int64; expected bool",)),
    Bad("rows of ids", many, entry(0, x[:1]), ("2 of 2 rows failed, and so none was applied", "1 rows for 2")),
]


@pytest.fixture
async def served(lstm_repository: Path) -> AsyncIterator[tuple[Server, Stub]]:
    """A server that serves ``lstm``, with small limits."""
    async with running(lstm_repository, max_steps=MAX_STEPS, max_batch=MAX_BATCH) as server, calling(server) as stub:
        yield server, stub


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_bad_input(served: tuple[Server, Stub], case: Bad) -> None:
    """It is refused with a text that helps; the sequence goes on from where it was; the good request succeeds."""
    server, stub = served
    await stub.ModelInfer(one())
    message = case.good()
    case.change(message)
    status, text = await refusal(stub.ModelInfer(message))
    assert status is case.code, text
    assert all(part in text for part in case.says), text
    call = stub.ModelStreamInfer()
    await call.write(message)
    assert (await call.read()).error_message == text
    call.cancel()
    rest = np.ones((1, 2, INPUT), np.float32)
    later = await stub.ModelInfer(request(rest, sequence_id=5, sequence_position=4))
    np.testing.assert_allclose(output(later)[0], expected(np.concatenate([x[0], rest[0]]))[4:], atol=2e-6)
    assert len(server.operations.sessions) == server.repository.find("lstm").pool.taken == 1
    np.testing.assert_allclose(output(await stub.ModelInfer(case.good()))[0], expected(x[0]), atol=2e-6)


@pytest.mark.parametrize(
    "text", ["", "5", "[5, true]", "[5, 6.5]", "[" * 100_000, '{"a": 5}', "[null]", "[NaN]", "[1, 2, 3, 4]"]
)
async def test_lists_that_are_none(served: tuple[Server, Stub], text: str) -> None:
    """A parameter that should hold a JSON list and does not is told so."""
    _, stub = served
    status, said = await refusal(stub.ModelInfer(request(x, sequence_ids=text, sequence_start=True)))
    assert status is INVALID
    assert (
        "parameter 'sequence_ids' is string_param; expected a string with a JSON list of up to 3 strings or integers"
        in said
    )


async def test_a_reply_that_is_too_large(lstm_repository: Path) -> None:
    """It is refused before it is run."""
    async with running(lstm_repository, max_message_bytes=120) as server, calling(server) as stub:
        status, text = await refusal(stub.ModelInfer(request(np.zeros((3, 1, INPUT), np.float32), "y", "h")))
        assert status is INVALID
        assert "the reply would hold" in text
