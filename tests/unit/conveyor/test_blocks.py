"""Blocks: how the chunks of ``step_many`` travel, and that each of them stays a chunk of its own."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import pytest

from conveyor import (
    AsyncClient,
    AsyncSession,
    ConnectionLost,
    Draining,
    EngineFailed,
    EpochConflict,
    Full,
    InvalidRequest,
    Loading,
    ProtocolError,
    SessionLost,
    StepsFailed,
    TimedOut,
)
from conveyor.tensors import Array, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb
from tests.unit.conveyor.clients import impatient, rows
from tests.unit.conveyor.sum_server import WIDTH, Fault, SumServer, sum_server
from tests.unit.conveyor.test_unavailable import refusal


async def opened(client: AsyncClient, count: int) -> list[AsyncSession]:
    """So many sessions."""
    return [await client.session("sum") for _ in range(count)]


def inputs(count: int, steps: int = 1) -> Array:
    """Another whole number everywhere: [count, steps, WIDTH]."""
    return np.arange(count * steps * WIDTH, dtype=np.float32).reshape(count, steps, WIDTH)


async def test_chunks_of_one_length_travel_as_a_block() -> None:
    """In the order given, one block for each length; a chunk that is alone with its length goes as a chunk."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 6)
        x = [rows(length) + n for n, length in enumerate([1, 2, 1, 2, 3, 1])]
        y = await client.step_many(dict(zip(sessions, x, strict=True)))
        assert list(y) == sessions
        for session, chunk in zip(sessions, x, strict=True):
            np.testing.assert_array_equal(y[session], np.cumsum(chunk, 0))
            assert session.position == len(chunk)
        assert (server.messages, server.blocks) == ([6], [3, 2])
        order = [sessions[n].session_id for n in (4, 0, 2, 5, 1, 3)]
        assert [chunk.session_id for chunk in server.chunks] == order


async def test_each_chunk_of_a_block_says_where_it_belongs() -> None:
    """Sessions at different positions, and one that somebody else has reset."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 4)
        for n, session in enumerate(sessions):
            await session.step(np.ones((n + 1, WIDTH)))
        other = await client.attach(sessions[1].session_id)
        await other.reset()
        await other.step(np.ones((2, WIDTH)))
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(sessions, inputs(4))
        assert [type(error) for error in failed.value.errors.values()] == [EpochConflict]
        for n in (0, 2, 3):
            np.testing.assert_array_equal(failed.value.outputs[sessions[n]], inputs(4)[n] + n + 1)
        assert [session.position for session in sessions] == [2, 2, 4, 5]
        assert server.blocks == [4]


async def test_sessions_of_two_versions_do_not_share_a_block() -> None:
    """A block is one model's."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 2)
        server.version = 2
        sessions += await opened(client, 3)
        assert [session.model.version for session in sessions] == [1, 1, 2, 2, 2]
        y = await client.step_many(dict(zip(sessions, inputs(5), strict=True)))
        np.testing.assert_array_equal(list(y.values()), inputs(5))
        assert (server.messages, server.blocks) == ([5], [2, 3])


@pytest.mark.parametrize("shape", [(5, 3, WIDTH), (5, WIDTH)])
async def test_chunks_may_lie_side_by_side(shape: tuple[int, ...]) -> None:
    """One array for all sessions gives one array; without a time axis in, without one out."""
    x = np.arange(np.prod(shape)).reshape(shape)
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 5)
        y = await client.step_many(sessions, x)
        np.testing.assert_array_equal(y, np.cumsum(x, 1) if x.ndim == 3 else x)
        again = await client.step_many(sessions, {"x": x.tolist()})
        by_session = await client.step_many(dict(zip(sessions, x, strict=True)))
        np.testing.assert_array_equal(again - y, (y if x.ndim == 2 else y[:, -1:]) + 0 * y)
        np.testing.assert_array_equal(np.stack(list(by_session.values())) - again, again - y)
        assert server.blocks == [5, 5, 5]
        y[0] = 0  # it is the caller's own
        one = await client.step_many(sessions[:1], x[:1])
        assert one.shape == (1, *shape[1:])


async def test_chunks_that_do_not_lie_side_by_side_are_refused() -> None:
    """Before anything is sent."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        a, b = await opened(client, 2)
        server.version = 2
        newer = await client.session("sum")
        for sessions, x, message in [
            ([a, b], inputs(3), "expected 2 rows, one for each session"),
            ([a, b], inputs(2)[..., :1], r"each row of input 'x' has shape \[1, 1\]; expected \[T, 2\]"),
            ([a, a], inputs(2), "stands there twice"),
            ([a, newer], inputs(2), "sessions of 2 models"),
            ([a, b], None, "at least one session and x"),
            ([], inputs(0), "at least one session and x"),
        ]:
            with pytest.raises(InvalidRequest, match=message):
                await client.step_many(sessions, x)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="expected no x"):
            await client.step_many({a: rows(1)}, rows(1))  # type: ignore[call-overload]
        assert not server.chunks


async def test_blocks_are_split_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block has more chunks than it may, nor more bytes."""
    monkeypatch.setattr("conveyor.chunks._BLOCK_SESSIONS", 4)
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 10)
        x = inputs(10)
        np.testing.assert_array_equal(await client.step_many(sessions, x), x)
        assert (server.messages, server.blocks) == ([10], [4, 4, 2])
        await client.step_many(sessions[:5], np.zeros((5, 50_000, WIDTH)))
        assert (server.messages[1:], server.blocks[3:]) == ([2, 2, 1], [2, 2])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("index", [0, 2, 4])
async def test_a_stream_that_breaks_within_a_block_neither_loses_nor_doubles_a_step(
    index: int, when: Literal["before", "after"]
) -> None:
    """Whichever of its chunks had been applied, the block is sent again, and each of them counts once."""
    x = inputs(5, 3)
    async with sum_server() as server, impatient(server) as client:
        sessions = await opened(client, 5)
        server.chunk_faults.extend([*[None] * index, Fault(when)])
        np.testing.assert_array_equal(await client.step_many(sessions, x), np.cumsum(x, 1))
        assert (server.streams, server.blocks) == (2, [5, 5])
        assert list(server.applied.values()) == [1] * 5


async def test_blocks_survive_random_breaks() -> None:
    """With breaks before and after the application of any chunk, refusals and doubled results."""
    random = np.random.default_rng(0)
    x = random.integers(0, 10, (8, 40, WIDTH)).astype(np.float32)
    async with sum_server() as server, impatient(server) as client:
        sessions = await opened(client, 8)
        choices = [*[None] * 40, Fault("before"), Fault("after"), Fault("twice")]
        server.chunk_faults.extend(choices[n] for n in random.integers(0, len(choices), 400))
        server.refusals.extend(refusal(Loading) if n < 0.05 else None for n in random.random(400))
        y = []
        for n, part in enumerate(np.split(x, [1, 2, 5, 9, 10, 17, 20, 21, 35], 1)):
            if n % 2:
                y.append(await client.step_many(sessions, part))
            else:
                outputs = await client.step_many(dict(zip(sessions, part, strict=True)))
                y.append(np.stack([outputs[session] for session in sessions]))
        np.testing.assert_array_equal(np.concatenate(y, 1), np.cumsum(x, 1))
        assert len(server.applied) == 80
        assert set(server.applied.values()) == {1}
        assert server.streams > 1
        # Nothing is kept of the blocks that were under way when a connection broke.
        _, stream = client._opened()
        assert not stream._blocks


async def test_only_what_was_refused_is_sent_again() -> None:
    """Of a block some of whose chunks the server cannot take now, or which it cannot take as a whole."""
    async with sum_server() as server, impatient(server) as client:
        sessions = await opened(client, 6)
        server.refusals.extend([None, refusal(Loading), None, refusal(Loading), refusal(Loading), None])
        server.block_refusals.extend([refusal(Draining), None, refusal(Loading)])
        x = inputs(6)
        np.testing.assert_array_equal(await client.step_many(sessions, x), x)
        assert server.blocks == [6, 6, 3, 3]
        assert [chunk.session_id for chunk in server.chunks[6:]] == [sessions[n].session_id for n in (1, 3, 4)]
        assert list(server.applied.values()) == [1] * 6


async def test_errors_are_told_by_index() -> None:
    """The other chunks of the block are applied."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 4)
        server.refusals.extend([None, pb.ErrorDetail(code=13, reason="engine_failed", message="a run failed")])
        del server.sessions[sessions[3].session_id]
        with pytest.raises(StepsFailed, match="2 of 4 chunks failed, the first one with: a run failed") as failed:
            await client.step_many(sessions, inputs(4))
        assert list(failed.value.outputs) == [sessions[0], sessions[2]]
        np.testing.assert_array_equal(failed.value.outputs[sessions[2]], inputs(4)[2])
        assert [type(error) for error in failed.value.errors.values()] == [EngineFailed, SessionLost]
        assert [(session.position, session.in_doubt) for session in sessions] == [(1, 0), (0, 0), (1, 0), (0, 0)]


async def test_a_block_that_cannot_go_as_one_goes_as_chunks() -> None:
    """What is wrong with the block is no word on its chunks: each is sent again, and told by itself."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 4)
        del server.sessions[sessions[1].session_id]
        server.block_refusals.append(pb.ErrorDetail(code=3, reason="invalid_request", message="too many"))
        with pytest.raises(StepsFailed, match="1 of 4 chunks failed") as failed:
            await client.step_many(sessions, inputs(4))
        assert isinstance(failed.value.errors[sessions[1]], SessionLost)
        assert (server.messages, server.blocks) == ([4, 4], [4])
        assert list(server.applied.values()) == [1] * 3


async def test_a_chunk_that_may_not_go_with_the_others_goes_alone() -> None:
    """What is said of it within a block is no word on the chunk; what it is told alone is."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 4)
        other = pb.ErrorDetail(code=3, reason="invalid_request", message="not with these")
        nan = pb.ErrorDetail(code=3, reason="invalid_request", message="holds NaN")
        server.refusals.extend([None, other, other, None, nan, None])
        with pytest.raises(StepsFailed, match="1 of 4 chunks failed, the first one with: holds NaN") as failed:
            await client.step_many(sessions, inputs(4))
        assert list(failed.value.outputs) == [sessions[0], sessions[2], sessions[3]]
        assert server.blocks == [4]
        assert [chunk.session_id for chunk in server.chunks[4:]] == [sessions[n].session_id for n in (1, 2)]
        assert list(server.applied.values()) == [1] * 3


async def test_a_block_that_is_refused_as_a_whole() -> None:
    """Each chunk of it is, and no session is in doubt."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 3)
        server.block_refusals.append(pb.ErrorDetail(code=8, reason="full", message="no"))
        with pytest.raises(StepsFailed, match="3 of 3 chunks failed") as failed:
            await client.step_many(sessions, inputs(3))
        assert all(isinstance(error, Full) for error in failed.value.errors.values())
        assert not any(session.in_doubt for session in sessions)
        np.testing.assert_array_equal(await client.step_many(sessions, inputs(3)), inputs(3))
        assert server.messages == [3, 3]


async def test_a_cancelled_block_that_counted_is_found_out() -> None:
    """Session by session, or all by the next step."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 4)
        server.chunk_faults.append(Fault("held"))
        task = asyncio.create_task(client.step_many(sessions, inputs(4)))
        await server.held.get()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(session.in_doubt for session in sessions)
        server.released.set()
        np.testing.assert_array_equal(await sessions[1].settle(), inputs(4)[1])
        np.testing.assert_array_equal(await client.step_many(sessions, inputs(4)), 2 * inputs(4))
        assert [session.position for session in sessions] == [2] * 4
        assert server.blocks == [4, 4]


async def test_a_cancelled_block_that_did_not_count_is_not_applied_later() -> None:
    """When the connection breaks within it, what is sent again only asks."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 3)
        server.chunk_faults.extend([None, Fault("held"), None, None, Fault("before")])
        task = asyncio.create_task(client.step_many(sessions, inputs(3)))
        await server.held.get()
        task.cancel()
        settled = asyncio.gather(*(session.settle() for session in sessions))
        await asyncio.sleep(0)
        await server.stop()
        again = SumServer()
        again.sessions = server.sessions
        await again.start(server.port)
        first, *others = await settled
        np.testing.assert_array_equal(first, inputs(3)[0])
        assert others == [None, None]
        assert again.blocks == [3]
        assert {chunk.timeout_us for chunk in again.chunks} == {1}
        assert [session.position for session in sessions] == [1, 0, 0]
        await again.stop()


async def test_no_answer_in_time_leaves_all_of_a_block_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer waits for its slowest session; what the others gave is found out like its own."""
    monkeypatch.setattr("conveyor.async_session._GRACE_S", 0.01)
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 3)
        server.chunk_faults.extend([None, Fault("held")])
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(sessions, inputs(3), timeout_s=0.05)
        assert all(isinstance(error, TimedOut) for error in failed.value.errors.values())
        assert {1 < chunk.timeout_us <= 50_000 for chunk in server.chunks} == {True}
        server.released.set()
        for session, x in zip(sessions, inputs(3), strict=True):
            np.testing.assert_array_equal(await session.settle(), x)
        assert not any(session.in_doubt for session in sessions)


async def test_sessions_in_doubt_are_settled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """And within the call's own time: all ask at once, and wait for a server that says nothing no longer than it."""
    monkeypatch.setattr("conveyor.async_session._GRACE_S", 0.01)
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 4)
        server.chunk_faults.append(Fault("held"))
        with pytest.raises(StepsFailed):
            await client.step_many(sessions, inputs(4), timeout_s=0.05)
        assert all(session.in_doubt for session in sessions)
        async with asyncio.timeout(5):
            with pytest.raises(StepsFailed, match="4 of 4 chunks failed") as failed:
                await client.step_many(sessions, inputs(4), timeout_s=0.05)
        assert all(isinstance(error, TimedOut) for error in failed.value.errors.values())
        server.released.set()
        np.testing.assert_array_equal(await client.step_many(sessions, inputs(4)), 2 * inputs(4))


async def test_what_the_stream_gave_up_is_asked_for_together() -> None:
    """In one block, before the next chunks go."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=0) as client:
        sessions = await opened(client, 3)
        server.chunk_faults.extend([None, Fault("after")])
        with pytest.raises(StepsFailed):
            await client.step_many(sessions, inputs(3))
        assert all(session.in_doubt for session in sessions)
        y = await client.step_many(sessions, inputs(3))
        np.testing.assert_array_equal(y, np.array([[2], [2], [1]])[..., np.newaxis] * inputs(3))
        assert server.blocks == [3, 3, 3]


async def test_two_calls_with_two_handles_of_one_session() -> None:
    """In whatever order each has them, neither holds what the other waits for."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        (a,) = await opened(client, 1)
        again = await client.attach(a.session_id)
        # Both wait for a step that is under way with either handle, and go on in the order of their own.
        async with a._lock, again._lock:
            calls = [asyncio.create_task(client.step_many(handles, inputs(2))) for handles in ([a, again], [again, a])]
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            ended = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, StepsFailed) for each in ended)


async def test_giving_up_leaves_all_of_a_block_in_doubt() -> None:
    """Each is told where it stands; each can be settled, and was applied once."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=0) as client:
        sessions = await opened(client, 3)
        server.chunk_faults.extend([None, Fault("after")])
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(sessions, inputs(3))
        for session, error in failed.value.errors.items():
            assert isinstance(error, ConnectionLost)
            assert f"{session.session_id!r} stands at position 0, and whether" in str(error)
        settled = [await session.settle() for session in sessions]
        np.testing.assert_array_equal(settled[:2], inputs(3)[:2])
        assert settled[2] is None
        assert set(server.applied.values()) == {1}


@pytest.mark.parametrize("y", [np.zeros((1, 1, WIDTH)), np.zeros((2, 2, WIDTH))])
async def test_a_result_of_another_size_is_noticed(y: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks the wire contract; what the server says of the steps counts all the same."""
    outputs = [encode_tensor("y", y.astype(np.float32))]
    monkeypatch.setattr(
        "tests.unit.conveyor.sum_server._lay",
        lambda block, results: pb.BlockResult(tag=block.tag, steps=1, outputs=outputs),
    )
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 2)
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(sessions, inputs(2))
        assert all(isinstance(error, ProtocolError) for error in failed.value.errors.values())
        assert [session.position for session in sessions] == [1, 1]


async def test_a_chunk_that_is_answered_beside_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result counts, and the second does no harm to whoever comes next."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = await opened(client, 3)
        arrive = server._arrive

        async def arrive_and_tell(chunk: pb.Chunk, context: Any) -> tuple[pb.ChunkResult, int]:
            result, copies = await arrive(chunk, context)
            await context.write(pb.StreamResponse(results=[result]))
            return result, copies

        monkeypatch.setattr(server, "_arrive", arrive_and_tell)
        for n in range(1, 4):
            np.testing.assert_array_equal(await client.step_many(sessions, inputs(3)), n * inputs(3))
        assert server.streams == 1


async def test_two_handles_of_a_session_in_one_block() -> None:
    """The second is refused, and the others are stepped."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        a, b = await opened(client, 2)
        again = await client.attach(a.session_id)
        with pytest.raises(StepsFailed, match="under way already, from another handle") as failed:
            await client.step_many([a, again, b], inputs(3))
        assert (list(failed.value.outputs), list(failed.value.errors)) == ([a, b], [again])
        np.testing.assert_array_equal(failed.value.outputs[b], inputs(3)[2])
        assert server.blocks == [2]


async def test_closing_the_client_ends_a_block() -> None:
    """With an error for each session; they stay open on the server."""
    async with sum_server() as server:
        client = AsyncClient(server.target)
        sessions = await opened(client, 3)
        server.chunk_faults.append(Fault("held"))
        task = asyncio.create_task(client.step_many(sessions, inputs(3)))
        await server.held.get()
        await client.close()
        with pytest.raises(StepsFailed, match="3 of 3 chunks failed"):
            await task
        assert len(server.sessions) == 3
