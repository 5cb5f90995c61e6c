"""Sequences through the Open Inference Protocol, unary: ids, START and END, positions, several rows in one request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from service.errors import InvalidRequest
from service.sequences import Stepped
from service.session import Reply
from service.wire.inference_call import Inference
from service.wire.inference_request import read
from service.wire.inference_stubs import inference_pb2 as pb
from tests import graphs
from tests.clock import Clock
from tests.conftest import running
from tests.graphs import INPUT, expected
from tests.wire.gate import gated, until
from tests.wire.inference import Stub, calling, output, parameters, refusal, request

pytestmark = pytest.mark.usefixtures("memory")

x = np.random.default_rng(0).standard_normal((3, 6, INPUT)).astype(np.float32)
y = np.array([expected(row) for row in x])

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def clock() -> Clock:
    """The server's."""
    return Clock()


@pytest.fixture
async def stub(lstm_repository: Path, clock: Clock) -> AsyncIterator[Stub]:
    """A server that serves ``lstm``."""
    async with running(lstm_repository, clock, max_batch=3, idle_timeout_s=60) as server, calling(server) as stub:
        yield stub


def close(reply: pb.ModelInferResponse, reference: np.ndarray[Any, Any]) -> None:
    """The output is the reference's."""
    np.testing.assert_allclose(output(reply), reference, atol=2e-6)


@pytest.mark.parametrize("identity", [5, -5, 2**63 + 1, "audio/7"])
async def test_a_sequence(stub: Stub, identity: int | str) -> None:
    """A sequence in three requests is the reference; replies say where it is; after END the id is free again."""
    first = await stub.ModelInfer(request(x[:1, :3], sequence_id=identity, sequence_start=True))
    second = await stub.ModelInfer(request(x[:1, 3:4], sequence_id=identity))
    third = await stub.ModelInfer(request(x[:1, 4:], sequence_id=identity, sequence_end=True))
    for reply, at, to in ((first, 0, 3), (second, 3, 4), (third, 4, 6)):
        close(reply, y[:1, at:to])
        assert parameters(reply)["sequence_position"] == to
        assert parameters(reply)["sequence_epoch"] == parameters(first)["sequence_epoch"] != 0
        assert parameters(reply)["triton_final_response"] is True
    status, text = await refusal(stub.ModelInfer(request(x[:1], sequence_id=identity)))
    assert status is INVALID
    assert text.startswith(
        f"inference request for sequence {identity} to model 'lstm' must specify the START flag on the first request "
        "of the sequence"
    )


async def test_what_became_of_a_sequence(stub: Stub, clock: Clock) -> None:
    """One never seen, one that was ended and one that has expired are told apart, behind the text that clients know."""
    told = (
        "inference request for sequence {} to model 'lstm' must specify the START flag on the first request of the "
        "sequence"
    )
    await stub.ModelInfer(request(x[:1], sequence_id=1, sequence_start=True, sequence_end=True))
    await stub.ModelInfer(request(x[:1], sequence_id=2, sequence_start=True))
    assert await refusal(stub.ModelInfer(request(x[:1], sequence_id=3))) == (INVALID, told.format(3))
    _, ended = await refusal(stub.ModelInfer(request(x[:1], sequence_id=1)))
    clock.now += 61
    _, expired = await refusal(stub.ModelInfer(request(x[:1], sequence_id=2)))
    assert ended.startswith(told.format(1) + "; ")
    assert "ended" in ended
    assert expired.startswith(told.format(2) + "; ")
    assert "expired" in expired


async def test_a_number_and_its_text_are_one_id(stub: Stub) -> None:
    """5 and "5" name one sequence."""
    await stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_start=True))
    close(await stub.ModelInfer(request(x[:1, 3:], sequence_id="5")), y[:1, 3:])


async def test_start_begins_anew(stub: Stub) -> None:
    """START on a live sequence puts it back to the beginning, unless it fails."""
    await stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_start=True))
    bad = request(x[:1, :3].astype(np.float64), sequence_id=5, sequence_start=True)
    assert (await refusal(stub.ModelInfer(bad)))[0] is INVALID
    close(await stub.ModelInfer(request(x[:1, 3:], sequence_id=5)), y[:1, 3:])
    close(await stub.ModelInfer(request(x[1:2], sequence_id=5, sequence_start=True)), y[1:2])


async def test_without_positions_every_request_steps(stub: Stub) -> None:
    """The same request again, under the same request id, is a further step."""
    await stub.ModelInfer(request(x[:1, :3], id="1", sequence_id=5, sequence_start=True))
    await stub.ModelInfer(request(x[:1, 3:4], id="1", sequence_id=5))
    again = await stub.ModelInfer(request(x[:1, 3:4], id="1", sequence_id=5))
    close(again, expected(np.concatenate([x[0, :4], x[0, 3:4]]))[None, 4:])
    assert parameters(again)["sequence_position"] == 5


async def test_with_positions_a_request_is_applied_once(stub: Stub) -> None:
    """What is sent again gets its reply and nothing moves; what does not follow is told where the sequence is."""
    await stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_start=True, sequence_position=0))
    second = request(x[:1, 3:5], sequence_id=5, sequence_position=3)
    assert await stub.ModelInfer(second) == await stub.ModelInfer(second)
    status, text = await refusal(stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_position=0)))
    assert status is grpc.StatusCode.ABORTED
    assert "position 5" in text
    last = request(x[:1, 5:], sequence_id=5, sequence_position=5, sequence_end=True)
    replies = [await stub.ModelInfer(last) for _ in range(2)]
    assert replies[0] == replies[1]
    close(replies[0], y[:1, 5:])


async def test_an_epoch_makes_a_start_repeatable(stub: Stub) -> None:
    """A START with the epoch that the live sequence has is a resend; a request for another epoch is refused."""
    start = request(x[:1, :3], sequence_id=5, sequence_start=True, sequence_epoch=77)
    first = await stub.ModelInfer(start)
    assert parameters(first)["sequence_epoch"] == 77
    assert await stub.ModelInfer(start) == first
    close(await stub.ModelInfer(request(x[:1, 3:], sequence_id=5, sequence_epoch=77)), y[:1, 3:])
    status, _ = await refusal(stub.ModelInfer(request(x[:1], sequence_id=5, sequence_epoch=78)))
    assert status is grpc.StatusCode.ABORTED


async def test_ids_belong_to_key_and_door(stub: Stub) -> None:
    """Another key's sequence of the same id is another sequence."""
    await stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_start=True), metadata=(("conveyor-key", "a"),))
    status, _ = await refusal(stub.ModelInfer(request(x[:1, 3:], sequence_id=5)))
    assert status is INVALID
    mine = await stub.ModelInfer(request(x[:1, 3:], sequence_id=5), metadata=(("conveyor-key", "a"),))
    close(mine, y[:1, 3:])


def by_tensor(**given: Any) -> dict[str, Any]:
    """Ids and numbers as tensors."""
    arrays = {name: np.array(value, np.int64) for name, value in given.items()}
    return {"inputs": arrays, "parameters": {}}


def by_parameter(**given: Any) -> dict[str, Any]:
    """Ids and numbers as parameters with JSON lists."""
    return {"inputs": {}, "parameters": {name: json.dumps(value) for name, value in given.items()}}


@pytest.mark.parametrize("how", [by_tensor, by_parameter])
async def test_several_sequences_in_one_request(stub: Stub, how: Any) -> None:
    """Rows for several sequences are stepped in one request, ragged and each at its own position."""
    ids = how(sequence_ids=[7, 8, 9], sequence_positions=[0, 0, 0])
    first = await stub.ModelInfer(request({"x": x[:, :3], **ids["inputs"]}, sequence_start=True, **ids["parameters"]))
    close(first, y[:, :3])
    assert json.loads(parameters(first)["sequence_positions"]) == [3, 3, 3]
    assert len(set(json.loads(parameters(first)["sequence_epochs"]))) == 3
    ids = how(sequence_ids=[9, 7], sequence_positions=[3, 3], sequence_lengths=[3, 1])
    lengths = np.array([3, 1], np.int32)
    ids["parameters"].pop("sequence_lengths", None)
    second = request(
        {"x": x[[2, 0], 3:], "sequence_end": np.array([True, False]), **ids["inputs"], "sequence_lengths": lengths},
        **ids["parameters"],
    )
    reply = await stub.ModelInfer(second)
    np.testing.assert_allclose(output(reply)[0], y[2, 3:], atol=2e-6)
    np.testing.assert_allclose(output(reply)[1, :1], y[0, 3:4], atol=2e-6)
    assert not output(reply)[1, 1:].any()
    assert json.loads(parameters(reply)["sequence_positions"]) == [6, 4]
    assert await stub.ModelInfer(second) == reply
    status, text = await refusal(stub.ModelInfer(request(x[:1], sequence_id=9)))
    assert status is INVALID
    assert "ended" in text


async def test_ids_as_texts(stub: Stub) -> None:
    """Ids may be texts: a BYTES tensor, raw or typed, as clients write it."""
    message = request(x[:2], sequence_start=True)
    message.inputs.add(name="sequence_ids", datatype="BYTES", shape=[2, 1])
    message.raw_input_contents.append(b"\x01\x00\x00\x00a\x02\x00\x00\x00bc")
    close(await stub.ModelInfer(message), y[:2])
    typed = pb.ModelInferRequest(model_name="lstm")
    typed.inputs.add(name="x", datatype="FP32", shape=[2, 1, INPUT]).contents.fp32_contents.extend(range(2 * INPUT))
    typed.inputs.add(name="sequence_ids", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"bc", b"a"])
    assert json.loads(parameters(await stub.ModelInfer(typed))["sequence_positions"]) == [7, 7]


async def test_a_row_that_fails_costs_the_others_nothing(stub: Stub) -> None:
    """The error names the first row that failed, and the others are where the request took them."""
    await stub.ModelInfer(request(x[:1, :3], sequence_id=7, sequence_start=True))
    status, text = await refusal(
        stub.ModelInfer(request({"x": x[:2, 3:], "sequence_ids": np.array([7, 8], np.uint64).astype(np.int64)}))
    )
    assert status is INVALID
    assert text.startswith("1 of 2 rows failed, and the others were applied; row 1 (sequence 8): inference request for")
    later = await stub.ModelInfer(request(x[:1, :1], sequence_id=7))
    assert parameters(later)["sequence_position"] == 7


async def test_a_caller_that_goes_away(lstm_repository: Path) -> None:
    """A request that is cancelled while it runs, and one behind it, leave the sequence as it was."""
    async with running(lstm_repository) as server, calling(server) as stub:
        await stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_start=True))
        with gated(server) as gate:
            (session,) = server.operations.sessions
            running_one = stub.ModelInfer(request(x[:1, 3:], sequence_id=5))
            await gate.entered()
            waiting_one = stub.ModelInfer(request(x[:1, 3:], sequence_id=5))
            await until(lambda: server.sequences.waiting == 1)
            (pending,) = session.pending.values()
            waiting_one.cancel()
            running_one.cancel()
            await until(lambda: server.sequences.waiting == 0 and bool(pending.block.unwanted))
            third = asyncio.ensure_future(stub.ModelInfer(request(x[:1, 3:], sequence_id=5, sequence_position=3)))
            gate.let(2)
            close(await third, y[:1, 3:])


async def test_a_timeout_in_the_line(lstm_repository: Path) -> None:
    """A request of a sequence that has not been applied in time is late, and the one behind it goes on from before."""
    clock = Clock()
    async with running(lstm_repository, clock) as server, calling(server) as stub:
        await stub.ModelInfer(request(x[:1, :3], sequence_id=5, sequence_start=True))
        with gated(server) as gate:
            late = asyncio.ensure_future(stub.ModelInfer(request(x[:1, 3:], sequence_id=5, timeout=500_000)))
            await gate.entered()
            behind = asyncio.ensure_future(stub.ModelInfer(request(x[:1, 3:], sequence_id=5)))
            clock.now += 0.5
            gate.let(2)
            assert (await refusal(late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            close(await behind, y[:1, 3:])


async def test_priorities(lstm_repository: Path) -> None:
    """Of what waits, lower numbers run first; 0 is the usual one, and what is beyond the last counts as the last."""
    async with running(lstm_repository, max_tick_rows=1) as server, calling(server) as stub:
        done: list[int] = []
        with gated(server) as gate:
            first = asyncio.ensure_future(stub.ModelInfer(request(x[:1])))
            await gate.entered()

            async def call(priority: int) -> None:
                await stub.ModelInfer(request(x[:1], priority=priority))
                done.append(priority)

            async with asyncio.TaskGroup() as group:
                for queued, priority in enumerate((2**64 - 1, 0, 1)):
                    group.create_task(call(priority))
                    await gate.until_queued(server, queued + 1)
                gate.let(1)
                for _ in range(3):
                    await gate.entered()
                    before = len(done)
                    gate.let(1)
                    await until(lambda before=before: len(done) > before)  # type: ignore[misc]
        await first
        assert done == [1, 0, 2**64 - 1]


async def test_kept_replies_that_are_too_much_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered apart may not fit into one reply: that is seen before anything is put together."""
    steps = 25
    inputs = np.zeros((2, steps, INPUT), np.float32)
    # Room for one reply and for the two inputs, not for two replies.
    monkeypatch.setattr(graphs, "OUTPUT", 50)
    graphs.write_lstm(tmp_path)
    async with running(tmp_path, max_message_bytes=steps * 50 * 4 * 3 // 2) as server, calling(server) as stub:
        for identity in (1, 2):
            whole = request(
                inputs[:1], sequence_id=identity, sequence_start=True, sequence_end=True, sequence_position=0
            )
            await stub.ModelInfer(whole)
        both = {"x": inputs, "sequence_ids": np.array([1, 2]), "sequence_positions": np.array([0, 0])}
        status, text = await refusal(stub.ModelInfer(request(both, sequence_end=True)))
        assert status is INVALID
        assert "the reply would hold 10000 bytes; this server sends up to 7500" in text


async def test_rows_that_were_applied_and_cannot_be_told(lstm_repository: Path) -> None:
    """An error that is met only when the reply is made says that the rows were applied, and up to where."""
    async with running(lstm_repository) as server:
        message = request({"x": x[:2], "sequence_ids": np.array([1, 2])})
        manifest = server.repository.find("lstm").manifest
        inference = Inference(server._servicers[1], server.sequences, b"", None, message, lambda result: None)
        asked = read(message, inference.ids, 4)
        rows = [Stepped(Reply(0, 1, [np.zeros((1, width))], 8 * width), 1, manifest, 1, 9) for width in (2, 3)]
        told = inference._together(asked, rows)
        assert isinstance(told, InvalidRequest)
        assert "differ in the size of their features" in str(told)
        assert str(told).endswith("; the rows were applied, up to positions [1, 1]")
