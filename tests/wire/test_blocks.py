"""Blocks through the native door: one chunk of each of many sessions in a message, each as though it came alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT, expected
from tests.wire.gate import gated, until
from tests.wire.native import Caller, array, chunk, streaming, tensor

pytestmark = pytest.mark.usefixtures("memory")

Array = NDArray[Any]

x = np.random.default_rng(0).standard_normal((5, 9, INPUT)).astype(np.float32)
"""Nine steps of five sessions."""


def block(sessions: Sequence[str], at: int | Sequence[int], x: Array, tag: int = 7, **more: Any) -> pb.Block:
    """A block whose sessions are all at one position, or each at its own."""
    positions = [at] * len(sessions) if isinstance(at, int) else at
    return pb.Block(tag=tag, session_ids=sessions, positions=positions, inputs=[tensor(x)], **more)


async def send(caller: Caller, *blocks: pb.Block, chunks: Sequence[pb.Chunk] = ()) -> None:
    """Write one message."""
    await caller.call.write(pb.StreamRequest(blocks=blocks, chunks=chunks))


async def result(caller: Caller) -> pb.BlockResult:
    """Wait for the next message, which holds one block's result."""
    response = await caller.call.read()
    assert isinstance(response, pb.StreamResponse)
    (only,) = response.block_results
    return only


async def step(caller: Caller, one: pb.Block) -> pb.BlockResult:
    """Send a block and wait for its result."""
    await send(caller, one)
    return await result(caller)


def reasons(one: pb.BlockResult) -> dict[int, str]:
    """Why chunks of a block were refused, by index."""
    return {error.index: error.error.reason for error in one.errors}


def assert_close(y: Array, reference: Array) -> None:
    """Outputs are the reference's."""
    np.testing.assert_allclose(y.astype(np.float64), reference.astype(np.float64), rtol=0, atol=2e-6)


async def test_blocks_give_what_chunks_give(lstm_repository: Path) -> None:
    """Whichever way the steps of sessions are cut and sent, outputs are the reference's, and each gets its own."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        y = [array((await step(caller, block(sessions, 0, x[:, :4]))).outputs[0])]
        # The third by itself, the others in another order.
        (alone,) = await caller.step(chunk(sessions[2], 4, x[2, 4:6]))
        order = [4, 0, 3, 1]
        others = await step(caller, block([sessions[n] for n in order], 4, x[order, 4:6], tag=-3))
        assert (others.tag, others.steps) == (-3, 2)
        middle = np.empty((5, 2, *y[0].shape[2:]), np.float32)
        middle[2], middle[order] = array(alone.outputs[0]), array(others.outputs[0])
        y += [middle, array((await step(caller, block(sessions, 6, x[:, 6:]))).outputs[0])]
        for n in range(5):
            assert_close(np.concatenate([part[n] for part in y]), expected(x[n]))
        assert [await caller.position(session) for session in sessions] == [9] * 5


async def test_a_block_runs_in_one_tick(lstm_repository: Path) -> None:
    """Its rows side by side, with those of the message's other blocks and chunks."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        with gated(server) as gate:
            await send(
                caller,
                block(sessions[:2], 0, x[:2, :1]),
                block(sessions[2:4], 0, x[2:4, :1]),
                chunks=[chunk(sessions[4], 0, x[4, :1])],
            )
            await gate.entered()
            assert (gate.rows, server.repository.find("lstm").queued) == ([5], 0)
            gate.let()
            await until(lambda: server.operations.sessions.find(b"", sessions[4]).position == 1)


async def test_a_block_sent_again_is_applied_once(lstm_repository: Path) -> None:
    """It gets the same results, as a block or as chunks, and while it still runs too; the states do not move."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        with gated(server) as gate:
            await send(caller, block(sessions, 0, x[:, :2]))
            await gate.entered()
            await send(caller, block(sessions, 0, x[:, :2], tag=8))
            await until(lambda: len(server.operations.sessions.find(b"", sessions[4]).pending[0].waiters) == 2)
            gate.let()
            first, second = await both(caller)
        assert first.outputs == second.outputs
        assert (await step(caller, block(sessions, 0, x[:, :2]))).outputs == first.outputs
        (again,) = await caller.step(chunk(sessions[3], 0, x[3, :2]))
        assert again.outputs[0].data == array(first.outputs[0])[3].tobytes()
        last = await step(caller, block(sessions, 2, x[:, 2:]))
        for n in range(5):
            whole = np.concatenate([array(first.outputs[0])[n], array(last.outputs[0])[n]])
            assert_close(whole, expected(x[n]))


async def both(caller: Caller) -> list[pb.BlockResult]:
    """The results of two blocks, in one message or two."""
    results: list[pb.BlockResult] = []
    while len(results) < 2:
        response = await caller.call.read()
        assert isinstance(response, pb.StreamResponse)
        results += response.block_results
    return sorted(results, key=lambda one: one.tag)


async def test_blocks_of_the_same_sessions_follow_each_other(lstm_repository: Path) -> None:
    """Also where they overlap in part: each session's steps are applied in the order in which they were sent."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        await send(caller, block(sessions, 0, x[:, :3], tag=1), block(sessions[1:4], 3, x[1:4, 3:5], tag=2))
        first, second = await both(caller)
        for n in range(1, 4):
            whole = np.concatenate([array(first.outputs[0])[n], array(second.outputs[0])[n - 1]])
            assert_close(whole, expected(x[n])[:5])


async def test_chunks_of_a_block_fail_alone(lstm_repository: Path) -> None:
    """An unknown session, one that is elsewhere, one in another epoch, NaN: told by index; the rest is applied."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        await caller.step(chunk(sessions[1], 0, x[1, :2]))
        inputs = x[:, :1].copy()
        inputs[3, 0, 1] = np.nan
        sessions[0] = "nobody"
        one = await step(caller, block(sessions, 0, inputs, epochs=[0, 0, 5, 0, 0]))
        assert reasons(one) == {0: "session_unknown", 1: "position_conflict", 2: "epoch_conflict", 3: "invalid_request"}
        assert {error.index: error.error.position for error in one.errors}[1] == 2
        assert one.steps == 1
        y = array(one.outputs[0])
        assert not y[:4].any()
        assert_close(y[4], expected(x[4])[:1])
        assert [await caller.position(session) for session in sessions[1:]] == [2, 0, 0, 1]


async def test_a_block_of_which_no_session_is_there(lstm_repository: Path) -> None:
    """Each is told so."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        one = await step(caller, block(["a", "b"], 0, x[:2, :1]))
        assert (reasons(one), one.steps, list(one.outputs)) == ({0: "session_unknown", 1: "session_unknown"}, 0, [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"positions": [0]}, "1 positions and 0 epochs for 2 sessions"),
        ({"epochs": [0]}, "2 positions and 1 epochs for 2 sessions"),
        ({"positions": [0, -1]}, "a position is -1"),
        ({"timeout_us": -1}, "timeout_us -1"),
        ({"session_ids": ["SAME", "SAME"]}, "twice"),
        ({"session_ids": []}, "0 sessions; expected 1 to"),
        ({"inputs": [tensor(x[:3, :1])]}, r"expected \[2, T, ...\]"),
        ({"inputs": [tensor(x[:2, :0])]}, "no steps"),
        ({"inputs": [tensor(x[0, :2])]}, r"has shape \[2, 3\]; expected \[N, T, 3\]"),
        ({"inputs": []}, "were given; expected each of"),
    ],
)
async def test_a_block_that_makes_no_sense(lstm_repository: Path, change: dict[str, Any], told: str) -> None:
    """It is refused as a whole, nothing is applied, and the stream lives on."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(2)]
        good = block(sessions, 0, x[:2, :1])
        bad = pb.Block()
        bad.CopyFrom(good)
        for name, value in change.items():
            if name == "timeout_us":
                bad.timeout_us = value
                continue
            bad.ClearField(name)
            getattr(bad, name).extend([sessions[0] if one == "SAME" else one for one in value])
        one = await step(caller, bad)
        assert (one.tag, one.error.reason, list(one.errors)) == (7, "invalid_request", [])
        with pytest.raises(AssertionError, match=told):
            raise AssertionError(one.error.message)
        assert (await step(caller, good)).steps == 1


async def test_sessions_of_other_models_do_not_stand_in_one_block(lstm_repository: Path, tmp_path: Path) -> None:
    """Those that are on another version than the first are told; the others are applied."""
    for version in ("1", "2"):
        folder = tmp_path / "lstm" / version
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes((lstm_repository / "lstm" / "1" / "model.onnx").read_bytes())
    async with running(tmp_path, latest_versions=2) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [
            (await stub.OpenSession(pb.OpenSessionRequest(model="lstm", version=version))).session.session_id
            for version in (1, 2, 1)
        ]
        one = await step(caller, block(sessions, 0, x[:3, :1]))
        assert reasons(one) == {1: "invalid_request"}
        assert "version 2, and others of the block on 'lstm', version 1" in one.errors[0].error.message
        assert [await caller.position(session) for session in sessions] == [1, 0, 1]


async def test_a_late_block(lstm_repository: Path) -> None:
    """Its deadline is each chunk's: all of them are told, and no state has moved."""
    clock = Clock()
    async with running(lstm_repository, clock) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(3)]
        with gated(server) as gate:
            await send(caller, block(sessions, 0, x[:3, :1], timeout_us=1000))
            await gate.entered()
            clock.now += 1
            gate.let()
            one = await result(caller)
        assert set(reasons(one).values()) == {"late"}
        assert [await caller.position(session) for session in sessions] == [0, 0, 0]


async def test_a_block_whose_caller_goes_away(lstm_repository: Path) -> None:
    """While it runs: nothing of it is applied. A chunk of it for which somebody else waits goes on."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(3)]
        table = server.operations.sessions
        with gated(server) as gate:
            async with streaming(stub) as other:
                await send(other, block(sessions, 0, x[:3, :2]))
                await gate.entered()
                await caller.send(chunk(sessions[1], 0, x[1, :2]))
                await until(lambda: len(table.find(b"", sessions[1]).pending[0].waiters) == 2)
            await until(lambda: not table.find(b"", sessions[0]).pending)
            gate.let(2)
            assert (await caller.result()).steps == 2
            await until(lambda: table.find(b"", sessions[2]).at_rest)
        assert [await caller.position(session) for session in sessions] == [0, 2, 0]
        assert server.operations.replies.held == table.find(b"", sessions[1]).last.size  # type: ignore[union-attr]


async def test_a_block_counts_as_its_chunks(lstm_repository: Path) -> None:
    """A stream takes no more of them in than it may: it is not read until some are answered."""
    async with (
        running(lstm_repository, max_stream_chunks=4) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        sessions = [await caller.open() for _ in range(5)]
        too_wide = await step(caller, block(sessions, 0, x[:, :1]))
        assert "the block has 5 sessions; expected 1 to 4" in too_wide.error.message
        with gated(server) as gate:
            await send(caller, block(sessions[:4], 0, x[:4, :1], tag=1))
            await gate.entered()
            await send(caller, block(sessions[4:], 0, x[4:, :1], tag=2))
            gate.let(2)
            first, second = await both(caller)
        assert (first.tag, second.tag, first.steps, second.steps) == (1, 2, 1, 1)


async def test_one_row_on_which_the_model_fails(lstm_repository: Path) -> None:
    """Only that one fails: the block is run again in halves."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        runner = server.repository.find("lstm")

        def choke(fed: Array) -> None:
            if (fed == 1234.5).any():
                raise RuntimeError("choked")

        with gated(server) as gate:
            gate.before = choke
            gate.let(100)
            inputs = x[:, :1].copy()
            inputs[2] = 1234.5
            one = await step(caller, block(sessions, 0, inputs))
        assert reasons(one) == {2: "engine_failed"}
        assert runner.pool.taken == 5
        for n in (0, 1, 3, 4):
            assert_close(array(one.outputs[0])[n], expected(x[n])[:1])


async def test_a_stream_that_is_half_closed_answers_its_blocks(lstm_repository: Path) -> None:
    """Then it ends."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        sessions = [await caller.open() for _ in range(5)]
        await send(caller, block(sessions, 0, x))
        await caller.call.done_writing()
        assert (await result(caller)).steps == 9
        assert await caller.call.read() is grpc.aio.EOF
