"""The client's blocks against the real server: each of their chunks is applied once, or refused by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conveyor import AsyncClient, AsyncSession, InvalidRequest, PositionConflict, SessionLost, StepsFailed
from conveyor.tensors import Array
from conveyor.v1 import conveyor_pb2 as pb
from tests.conftest import running
from tests.graphs import INPUT, expected, replace_lstm, write_lstm
from tests.wire.gate import until
from tests.wire.test_cancellation import House, built
from tests.wire.test_client_connection import Waiting, cable
from tests.wire.test_switch import follow

BOUND = 2e-6
"""Largest difference of float32 outputs from the float64 reference."""

x = np.random.default_rng(10).standard_normal((6, 40, INPUT)).astype(np.float32)
reference = np.stack([expected(sequence) for sequence in x])


def check(y: Array, begin: int, end: int, rows: slice = slice(None)) -> None:
    """The outputs of the steps from one position to another are those of the reference."""
    np.testing.assert_allclose(y, reference[rows, begin:end], rtol=0, atol=BOUND)


@pytest.fixture
async def house(lstm_repository: Path) -> AsyncIterator[House]:
    """A server whose engine waits to be let through."""
    async with built(lstm_repository) as house:
        yield house


async def opened(client: AsyncClient) -> list[AsyncSession]:
    """A session for each of the inputs."""
    return [await client.session("lstm") for _ in x]


def sent(client: AsyncClient) -> list[pb.StreamRequest]:
    """The messages that it is going to send on its stream."""
    _, stream = client._opened()
    messages = []
    make = stream._next_request

    def made() -> pb.StreamRequest:
        messages.append(make())
        return messages[-1]

    stream._next_request = made  # type: ignore[method-assign]
    return messages


async def test_a_block_is_the_reference_however_it_is_cut(lstm_repository: Path) -> None:
    """Single steps and chunks in turn, as one array or by session; each message holds one block."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        sessions = await opened(client)
        messages = sent(client)
        check((await client.step_many(sessions, x[:, 0]))[:, np.newaxis], 0, 1)
        check(await client.step_many(sessions, x[:, 1:9]), 1, 9)
        by_session = await client.step_many(dict(zip(sessions, x[:, 9:], strict=True)))
        check(np.stack([by_session[session] for session in sessions]), 9, 40)
        assert [(len(message.chunks), len(message.blocks)) for message in messages] == [(0, 1)] * 3


async def test_what_is_refused_of_a_block(lstm_repository: Path) -> None:
    """A session that is gone, one that stands elsewhere, an input that holds NaN; the others are applied."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        sessions = await opened(client)
        await (await client.attach(sessions[1].session_id)).close()
        await (await client.attach(sessions[2].session_id)).step(x[2, :4])
        wrong = x[:, :3].copy()
        wrong[4, 1, 0] = np.nan
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(sessions, wrong)
        kinds = [type(error) for error in failed.value.errors.values()]
        assert kinds == [SessionLost, PositionConflict, InvalidRequest]
        assert [sessions.index(session) for session in failed.value.errors] == [1, 2, 4]
        for session, y in failed.value.outputs.items():
            row = sessions.index(session)
            check(y[np.newaxis], 0, 3, slice(row, row + 1))
        begins = [session.position for session in sessions[3:]]
        assert begins == [3, 0, 3]
        parts = [row[begin : begin + 2] for row, begin in zip(x[3:], begins, strict=True)]
        y = await client.step_many(sessions[3:], np.stack(parts))
        check(y[[0, 2]], 3, 5, slice(3, None, 2))
        check(y[[1]], 0, 2, slice(4, 5))
        assert not any(session.in_doubt for session in sessions)


async def test_sessions_of_two_models_under_one_number(tmp_path: Path) -> None:
    """A file was replaced between them, so that they share no block: each is stepped by its own model all the same."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with (
        running(tmp_path, model_control="poll") as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        old = [await client.session("lstm") for _ in range(3)]
        replace_lstm(tmp_path, "lstm", 1, seed=2)
        await follow(server)
        new = [await client.session("lstm") for _ in range(3)]
        wanted = np.stack([expected(sequence, seed=1 if n < 3 else 2) for n, sequence in enumerate(x)])
        y = await client.step_many(old + new, x[:, :5])
        np.testing.assert_allclose(y, wanted[:, :5], rtol=0, atol=BOUND)
        by_session = await client.step_many(dict(zip(old + new, x[:, 5:], strict=True)))
        np.testing.assert_allclose(list(by_session.values()), wanted[:, 5:], rtol=0, atol=BOUND)
        assert {session.position for session in old + new} == {40}


@pytest.mark.parametrize("limit", [4, 6])
async def test_a_server_that_takes_fewer_chunks_at_once(lstm_repository: Path, limit: int) -> None:
    """What it does not take as one block it gets as chunks."""
    async with (
        running(lstm_repository, max_stream_chunks=limit) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        sessions = await opened(client)
        messages = sent(client)
        check(await client.step_many(sessions, x[:, :2]), 0, 2)
        chunks = [len(message.chunks) for message in messages]
        assert chunks == ([0, 6] if limit == 4 else [0])


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_block_whose_connection_breaks_while_it_runs(house: House, at_once: bool) -> None:
    """Three times over, whether the server notices the break before the next copy comes or after: applied once."""
    async with cable(house.server.port) as between, Waiting(between.target) as client:
        sessions = await opened(client)
        step = asyncio.create_task(client.step_many(sessions, x[:, :2]))
        await house.gate.entered()

        def pending(count: int) -> bool:
            return all(house.pending(session.session_id) == count for session in sessions)

        for _ in range(3):
            client.let.clear()
            between.cut()
            if at_once:
                between.notice()
                await until(lambda: pending(0))
                client.let.set()
            else:
                client.let.set()
                await until(lambda: pending(2))
                between.notice()
            await until(lambda: pending(1))
        house.gate.let(20)
        check(await step, 0, 2)
        check(await client.step_many(sessions, x[:, 2:]), 2, 40)
        assert {session.position for session in sessions} == {40}


async def test_a_chunk_of_a_block_follows_what_came_before_it(house: House) -> None:
    """One session's earlier chunk still runs, of another client: the block is answered when all of it is done."""
    target = f"127.0.0.1:{house.server.port}"
    async with AsyncClient(target) as one, AsyncClient(target) as other:
        sessions = await opened(one)
        first = asyncio.create_task(sessions[0].step(x[0, :3]))
        await house.gate.entered()
        handles = [await other.attach(session.session_id, 3 if n == 0 else 0) for n, session in enumerate(sessions)]
        block = asyncio.create_task(other.step_many(handles, np.stack([x[0, 3:5], *x[1:, :2]])))
        await until(lambda: house.pending(sessions[5].session_id) == 1)
        assert not first.done()
        house.gate.let(20)
        check((await first)[np.newaxis], 0, 3, slice(1))
        y = await block
        check(y[:1], 3, 5, slice(1))
        check(y[1:], 0, 2, slice(1, None))
        assert [handle.position for handle in handles] == [5, 2, 2, 2, 2, 2]


async def test_a_block_for_a_server_that_drains_for_a_moment(lstm_repository: Path) -> None:
    """It is sent again until it is taken."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        sessions = await opened(client)
        await client.step_many(sessions, x[:, :4])
        server.operations.intake.draining = True
        step = asyncio.create_task(client.step_many(sessions, x[:, 4:]))
        _, stream = client._opened()
        await until(lambda: len(stream._refused) == len(x))
        server.operations.intake.draining = False
        check(await step, 4, 40)


@settings(max_examples=15, deadline=None)
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["array", "mapping", "uneven", "cancelled"]), st.integers(1, 4), st.integers(0, 150)),
        min_size=1,
        max_size=8,
    )
)
def test_the_positions_are_always_true(actions: list[tuple[str, int, int]], lstm_repository: Path) -> None:
    """However blocks are cut and cancelled: after ``settle``, each session goes on where it says.

    The input at each position is fixed, so the outputs at a position are too, whichever steps counted.
    """

    async def run() -> None:
        async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            sessions = await opened(client)
            for action, steps, turns in actions:
                for session in sessions:
                    await session.settle()
                begins = [session.position for session in sessions]
                ends = [begin + steps + (n % 2 if action == "uneven" else 0) for n, begin in enumerate(begins)]
                parts = [row[begin:end] for row, begin, end in zip(x, begins, ends, strict=True)]
                expected_parts = [row[begin:end] for row, begin, end in zip(reference, begins, ends, strict=True)]
                outputs: list[Array | None]
                if action in ("array", "cancelled"):
                    task = asyncio.create_task(client.step_many(sessions, np.stack(parts)))
                    for _ in range(turns if action == "cancelled" else 0):
                        await asyncio.sleep(0)
                    if action == "cancelled":
                        task.cancel()
                    await asyncio.wait([task])
                    outputs = [await session.settle() for session in sessions]
                    if not task.cancelled():
                        outputs = list(task.result())
                else:
                    chunks = dict(zip(sessions, parts, strict=True))
                    outputs = list((await client.step_many(chunks)).values())
                for session, y, wanted, begin, end in zip(sessions, outputs, expected_parts, begins, ends, strict=True):
                    if y is not None:
                        np.testing.assert_allclose(y, wanted, rtol=0, atol=BOUND)
                    assert session.position == (begin if y is None else end)

    asyncio.run(run())
