"""Batches through the Open Inference Protocol: raw and typed, outputs chosen, lengths, states in and out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.errors import InvalidRequest
from service.manifest import TensorSpec
from service.wire.codec import join
from tests.clock import Clock
from tests.conftest import running
from tests.graphs import HIDDEN, INPUT, expected
from tests.wire.gate import gated
from tests.wire.inference import Stub, calling, output, parameters, refusal, request

x = np.random.default_rng(0).standard_normal((2, 5, INPUT)).astype(np.float32)


@pytest.fixture
async def stub(lstm_repository: Path) -> AsyncIterator[Stub]:
    """A server that serves ``lstm``."""
    async with running(lstm_repository, max_batch=3, max_steps=8) as server, calling(server) as stub:
        yield stub


async def test_a_batch(stub: Stub) -> None:
    """A batch is the reference; the reply names model, version and id, and says that it is the last."""
    reply = await stub.ModelInfer(request(x, id="mine"))
    assert (reply.model_name, reply.model_version, reply.id) == ("lstm", "1", "mine")
    assert parameters(reply) == {"triton_final_response": True}
    assert [one.name for one in reply.outputs] == ["y"]
    np.testing.assert_allclose(output(reply), [expected(row) for row in x], atol=2e-6)


async def test_typed_contents(stub: Stub) -> None:
    """Elements in fp32_contents are what they are in raw_input_contents."""
    message = request(x)
    raw = await stub.ModelInfer(message)
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    assert (await stub.ModelInfer(message)).raw_output_contents == raw.raw_output_contents


async def test_lengths_and_states(stub: Stub) -> None:
    """A ragged batch cut in two, its states carried over by the client, is the reference; outputs stand as asked."""
    first = await stub.ModelInfer(
        request({"x": x, "sequence_lengths": np.array([5, 2], np.int32)}, "cT", "y", "h"),
    )
    assert [one.name for one in first.outputs] == ["cT", "y", "h"]
    assert output(first, "h").shape == (2, 1, HIDDEN)
    assert not output(first)[1, 2:].any()
    rest = np.random.default_rng(1).standard_normal((2, 3, INPUT)).astype(np.float32)
    second = await stub.ModelInfer(request({"x": rest, "h0": output(first, "h"), "c": output(first, "cT")}, "y"))
    for row, length in enumerate((5, 2)):
        whole = expected(np.concatenate([x[row, :length], rest[row]]))
        np.testing.assert_allclose(output(first)[row, :length], whole[:length], atol=2e-6)
        np.testing.assert_allclose(output(second)[row], whole[length:], atol=2e-6)


async def test_the_graphs_own_name_for_the_lengths(stub: Stub) -> None:
    """Lengths may come as the graph's input for them, [N, 1] too, as clients of a plain ONNX server send them."""
    reply = await stub.ModelInfer(request({"x": x, "lengths": np.array([[1], [5]], np.int64)}))
    np.testing.assert_allclose(output(reply)[0, :1], expected(x[0, :1]), atol=2e-6)
    assert not output(reply)[0, 1:].any()


async def test_parameters_that_mean_nothing_here(stub: Stub) -> None:
    """What is unknown is ignored, and so are 0 and the empty text for a sequence id: none is meant."""
    for none in (0, ""):
        message = request(
            x, sequence_id=none, sequence_start=False, mine="whatever", binary_data_output=True, priority=9, timeout=0
        )
        message.inputs[0].parameters["binary_data_size"].int64_param = 4
        message.outputs.add(name="y").parameters["binary_data"].bool_param = True
        np.testing.assert_allclose(output(await stub.ModelInfer(message)), [expected(row) for row in x], atol=2e-6)


async def test_a_timeout(lstm_repository: Path) -> None:
    """A batch that has not been applied when its timeout is over ends with DEADLINE_EXCEEDED, and leaves nothing."""
    clock = Clock()
    async with running(lstm_repository, clock) as server, calling(server) as stub:
        with gated(server) as gate:
            late = stub.ModelInfer(request(x, timeout=1_000_000))
            await gate.entered()
            soon = stub.ModelInfer(request(x, timeout=0))
            await gate.until_queued(server, 2)
            clock.now += 1.0
            # However many runs it takes: by this clock the first took a second, and the next may be cut shorter.
            gate.let(100)
            status, text = await refusal(late)
            assert status is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "the deadline passed" in text
            np.testing.assert_allclose(output(await soon), [expected(row) for row in x], atol=2e-6)
        assert server.repository.find("lstm").pool.taken == 0


def test_rows_that_cannot_stand_in_one_tensor() -> None:
    """Where a model leaves a size open, rows may differ in it: that is told in words."""
    spec = TensorSpec(name="y", dtype="float32", shape=(None, None, None), batch_axis=1, time_axis=0)
    rows = [np.ones((steps, 2), np.float32) for steps in (1, 3)]
    assert join(rows, spec, 4).shape == (2, 4, 2)
    with pytest.raises(InvalidRequest, match="output 'y' differ in the size of their features; send them apart"):
        join([*rows, np.ones((1, 3), np.float32)], spec, 4)
