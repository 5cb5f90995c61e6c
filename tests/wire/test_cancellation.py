"""Cancellation, deadlines and drains through the native door, where they meet what only it has, or several streams.

What holds through both doors is in test_promises.py.

A gate in front of the real engine holds a run for as long as a test wants; nothing here waits for time to pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.server import Server
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT, expected
from tests.wire.gate import Gate, until
from tests.wire.native import Caller, array, chunk, streaming, tensor

pytestmark = pytest.mark.usefixtures("memory")

Array = NDArray[Any]


class House:
    """A server with a gate, a stream to it, and its clock."""

    def __init__(
        self, server: Server, stub: stubs.ConveyorServiceStub, caller: Caller, gate: Gate, clock: Clock
    ) -> None:
        self.server = server
        self.stub = stub
        self.caller = caller
        self.gate = gate
        self.clock = clock

    def pending(self, session_id: str) -> int:
        """How many wait for chunks of a session, repetitions counted."""
        session = self.server.operations.sessions.find(b"", session_id)
        return sum(len(pending.waiters) for pending in session.pending.values())

    @property
    def slots(self) -> int:
        """State slots in use."""
        return self.server.repository.find("lstm").pool.taken

    async def queued(self, rows: int) -> None:
        """Wait until so many rows are in the queue."""
        await until(lambda: self.server.repository.find("lstm").queued == rows)


@pytest.fixture
async def house(lstm_repository: Path) -> AsyncIterator[House]:
    """A server whose engine waits to be let through."""
    async with built(lstm_repository) as house:
        yield house


@asynccontextmanager
async def built(repository: Path) -> AsyncIterator[House]:
    """Build the house."""
    clock = Clock()
    async with running(repository, clock) as server, calling(server) as stub, streaming(stub) as caller:
        runner = server.repository.find("lstm")
        gate = Gate(runner.execution.engine)
        runner.execution.engine = gate
        try:
            yield House(server, stub, caller, gate, clock)
        finally:
            gate.let(1000)


def assert_close(y: Array, reference: Array) -> None:
    """Outputs are the reference's."""
    np.testing.assert_allclose(y.astype(np.float64), reference.astype(np.float64), rtol=0, atol=2e-6)


x = np.random.default_rng(0).standard_normal((8, INPUT)).astype(np.float32)


@pytest.mark.parametrize("applied", [False, True])
async def test_a_chunk_sent_again_after_it_was_cancelled_gets_its_reply(house: House, applied: bool) -> None:
    """Whether the cancelled run could still be stopped or not, the repetition is applied once and answered."""
    session = await house.caller.open()
    async with streaming(house.stub) as other:
        await other.send(chunk(session, 0, x[:2]))
        await house.gate.entered()
        row = house.server.operations.sessions.find(b"", session).pending[0].block
    await until(lambda: house.pending(session) == 0)
    assert row.unwanted
    if applied:
        # As if the run had been sealed an instant before the cancellation.
        row.unwanted.clear()
    await house.caller.send(chunk(session, 0, x[:2]))
    await house.queued(1)
    house.gate.let(2)
    result = await house.caller.result()
    assert_close(array(result.outputs[0]), expected(x[:2]))
    assert house.gate.rows == ([1] if applied else [1, 1])
    assert await house.caller.position(session) == 2


async def test_a_cancelled_chunk_takes_those_behind_it_along(house: House) -> None:
    """Chunks sent ahead from a stream that lives are refused with the position when an earlier one came to nothing."""
    session = await house.caller.open()
    async with streaming(house.stub) as other:
        await other.send(chunk(session, 0, x[:1]))
        await house.gate.entered()
        await house.caller.send(chunk(session, 1, x[1:3]), chunk(session, 3, x[3:4]))
        await until(lambda: house.pending(session) == 3)
    await until(lambda: house.pending(session) == 2)
    house.gate.let(1)
    for _ in range(2):
        result = await house.caller.result()
        assert (result.error.reason, result.error.position) == ("position_conflict", 0)
    assert house.gate.rows == [1]
    assert await house.caller.position(session) == 0


async def test_a_repetition_keeps_a_chunk_alive(house: House) -> None:
    """A chunk that is sent again on a second stream while it runs is applied for that one when the first goes away."""
    session = await house.caller.open()
    async with streaming(house.stub) as other:
        await other.send(chunk(session, 0, x[:1]))
        await house.gate.entered()
        await house.caller.send(chunk(session, 0, x[:1]))
        await until(lambda: house.pending(session) == 2)
    await until(lambda: house.pending(session) == 1)
    house.gate.let(1)
    result = await house.caller.result()
    assert_close(array(result.outputs[0]), expected(x[:1]))
    assert house.gate.rows == [1]


async def test_a_batch_whose_deadline_passes_gives_everything_back(house: House) -> None:
    """The caller is told DEADLINE_EXCEEDED, and the slots come back when the run ends."""
    call = house.stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(x[None])]), timeout=0.1)
    await house.gate.entered()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    house.gate.let(1)
    await until(lambda: house.slots == 0)


async def test_close_fork_and_export_wait_for_what_was_accepted(house: House) -> None:
    """What is asked of a session while it steps is done after the step."""
    session = await house.caller.open()
    await house.caller.send(chunk(session, 0, x[:2]))
    await house.gate.entered()
    export = asyncio.ensure_future(house.stub.ExportSession(pb.ExportSessionRequest(session_id=session)))
    fork = asyncio.ensure_future(house.stub.ForkSession(pb.ForkSessionRequest(session_id=session)))
    await asyncio.sleep(0.05)
    assert not export.done()
    assert not fork.done()
    house.gate.let(1)
    assert (await export).state.position == (await fork).session.position == 2
    await house.caller.result()
    await house.caller.send(chunk(session, 2, x[2:3]))
    await house.gate.entered()
    close = asyncio.ensure_future(house.stub.CloseSession(pb.CloseSessionRequest(session_id=session)))
    await until(lambda: house.server.operations.sessions.find(b"", session).closing == 1)
    (refused,) = await house.caller.step(chunk(session, 3, x[3:4]))
    assert refused.error.reason == "session_unknown"
    house.gate.let(1)
    assert (await close).position == 3
    assert (await house.caller.result()).steps == 1


async def test_a_close_that_is_cancelled_leaves_the_session_open(house: House) -> None:
    """Whoever gives up closing while a chunk runs still has the session."""
    session = await house.caller.open()
    await house.caller.send(chunk(session, 0, x[:1]))
    await house.gate.entered()
    close = house.stub.CloseSession(pb.CloseSessionRequest(session_id=session))
    await until(lambda: house.server.operations.sessions.find(b"", session).closing == 1)
    close.cancel()
    await until(lambda: house.server.operations.sessions.find(b"", session).closing == 0)
    house.gate.let(2)
    await house.caller.result()
    (result,) = await house.caller.step(chunk(session, 1, x[1:2]))
    assert not result.HasField("error")


async def test_sessions_that_step_while_the_engine_is_busy_share_the_next_tick(house: House) -> None:
    """What queued during one run is one run."""
    sessions = [await house.caller.open() for _ in range(9)]
    await house.caller.send(chunk(sessions[0], 0, x[:1]))
    await house.gate.entered()
    await house.caller.send(*(chunk(session, 0, x[:1]) for session in sessions[1:]))
    await house.queued(8)
    house.gate.let(2)
    for _ in sessions:
        assert not (await house.caller.result()).HasField("error")
    assert house.gate.rows == [1, 8]


async def test_drain_finishes_what_was_accepted(house: House) -> None:
    """While draining, the chunk that runs is answered, new work is refused, states can be exported, streams end."""
    session = await house.caller.open()
    await house.caller.send(chunk(session, 0, x[:2]))
    await house.gate.entered()
    drain = asyncio.create_task(house.server.drain())
    await until(lambda: house.server.operations.intake.draining)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.caller.open()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    (late,) = await house.caller.step(chunk(session, 2, x[2:3]))
    assert late.error.reason == "draining"
    assert not drain.done()
    house.gate.let(1)
    result = await house.caller.result()
    assert_close(array(result.outputs[0]), expected(x[:2]))
    await drain
    state = (await house.stub.ExportSession(pb.ExportSessionRequest(session_id=session))).state
    assert state.position == 2
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await house.caller.call.read()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_of_one_tick_only_who_is_answered_moves(house: House) -> None:
    """Two sessions share a run and one goes away meanwhile: the other's state moves, its own does not."""
    busy, stays, goes = [await house.caller.open() for _ in range(3)]
    await house.caller.send(chunk(busy, 0, x[:1]))
    await house.gate.entered()
    async with streaming(house.stub) as other:
        await other.send(chunk(goes, 0, x[:2]))
        await house.caller.send(chunk(stays, 0, x[:2]))
        await house.queued(2)
        house.gate.let(1)
        await house.gate.entered()
    await until(lambda: house.pending(goes) == 0)
    house.gate.let(3)
    for _ in range(2):
        assert not (await house.caller.result()).HasField("error")
    for session, position, reference in ((stays, 2, expected(x[:5])[2:]), (goes, 0, expected(x[2:5]))):
        (result,) = await house.caller.step(chunk(session, position, x[2:5]))
        assert_close(array(result.outputs[0]), reference)
    assert house.gate.rows[:2] == [1, 2]


async def test_who_closes_twice_waits_for_the_same_end(house: House) -> None:
    """The second close is answered like the first; if the first gives up, the second still ends the session."""
    for give_up in (False, True):
        session = await house.caller.open()
        await house.caller.send(chunk(session, 0, x[:2]))
        await house.gate.entered()
        request = pb.CloseSessionRequest(session_id=session)
        first, second = house.stub.CloseSession(request), house.stub.CloseSession(request)
        closing = house.server.operations.sessions.find(b"", session)
        await until(lambda closing=closing: closing.closing == 2)  # type: ignore[misc]
        if give_up:
            first.cancel()
            await until(lambda closing=closing: closing.closing == 1)  # type: ignore[misc]
        house.gate.let(1)
        assert (await second).position == 2
        assert give_up or (await first).position == 2
        await house.caller.result()
        assert house.slots == 0


async def test_who_waits_for_rest_is_not_overtaken_for_ever(house: House) -> None:
    """Chunks that come while an export waits are told to come again, or a stream without pause would hold it up."""
    session = await house.caller.open()
    await house.caller.send(chunk(session, 0, x[:2]))
    await house.gate.entered()
    export = asyncio.ensure_future(house.stub.ExportSession(pb.ExportSessionRequest(session_id=session)))
    await until(lambda: house.server.operations.sessions.find(b"", session).guests == 1)
    (refused,) = await house.caller.step(chunk(session, 2, x[2:3]))
    assert refused.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    house.gate.let(2)
    assert (await export).state.position == 2
    await house.caller.result()
    (result,) = await house.caller.step(chunk(session, 2, x[2:3]))
    assert not result.HasField("error")


async def test_a_run_that_never_ends_does_not_hold_the_server(lstm_repository: Path) -> None:
    """A server that is stopped while a model runs says that it could not end the run, and is stopped all the same."""
    async with built(lstm_repository) as house:
        session = await house.caller.open()
        await house.caller.send(chunk(session, 0, x[:1]))
        await house.gate.entered()
        assert not await house.server.stop(0)
