"""The client against the real server where connections break, servers drain or load, and handles share a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from conveyor import AsyncClient, EpochConflict, InvalidRequest, PositionConflict, SessionLost, StepsFailed
from conveyor.v1 import conveyor_pb2 as pb
from tests.conftest import running
from tests.graphs import INPUT, expected
from tests.wire.gate import until
from tests.wire.test_cancellation import House, built

BOUND = 2e-6
"""Largest difference of float32 outputs from the float64 reference."""

x = np.random.default_rng(8).standard_normal((12, INPUT)).astype(np.float32)


class Cable:
    """Passes bytes between clients and a server until it is cut; the next connection is a new one.

    Attributes:
        target: where it listens.
    """

    def __init__(self, server_port: int) -> None:
        self.target = ""
        self._server_port = server_port
        self._near: list[asyncio.StreamWriter] = []
        self._far: list[asyncio.StreamWriter] = []

    def cut(self) -> None:
        """Break every connection where the clients are; the server does not notice yet."""
        _abort(self._near)

    def notice(self) -> None:
        """Let the server notice every break there was."""
        _abort(self._far[: len(self._far) - len(self._near)])

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._near.append(writer)
        self._far.append(far_writer)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(4096):
                    sink.write(data)

        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))


def _abort(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.transport.abort()
    writers.clear()


@asynccontextmanager
async def cable(server_port: int) -> AsyncIterator[Cable]:
    """A cable to a server."""
    cable = Cable(server_port)
    listener = await asyncio.start_server(cable.connected, "127.0.0.1", 0)
    cable.target = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield cable
    finally:
        cable.cut()
        cable.notice()
        listener.close()


class Waiting(AsyncClient):
    """A client that tries again once it is let, not after a while.

    Attributes:
        let: whether it may.
    """

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.let = asyncio.Event()
        self._settings = replace(self._settings, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        await self.let.wait()
        await asyncio.sleep(0)


@pytest.fixture
async def house(lstm_repository: Path) -> AsyncIterator[House]:
    """A server whose engine waits to be let through."""
    async with built(lstm_repository) as house:
        yield house


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_chunk_whose_connection_breaks_while_it_runs(house: House, at_once: bool) -> None:
    """Three times over, whether the server notices the break before the next copy comes or after: applied once."""
    async with cable(house.server.port) as between, Waiting(between.target) as client:
        session = await client.session("lstm")
        step = asyncio.create_task(session.step(x[:2]))
        await house.gate.entered()
        for _ in range(3):
            client.let.clear()
            between.cut()
            if at_once:
                between.notice()
                await until(lambda: house.pending(session.session_id) == 0)
                client.let.set()
            else:
                client.let.set()
                await until(lambda: house.pending(session.session_id) == 2)
                between.notice()
            await until(lambda: house.pending(session.session_id) == 1)
        house.gate.let(10)
        np.testing.assert_allclose(await step, expected(x)[:2], rtol=0, atol=BOUND)
        np.testing.assert_allclose(await session.step(x[2:]), expected(x)[2:], rtol=0, atol=BOUND)
        assert session.position == 12


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_chunk_whose_connection_breaks_while_it_is_queued(house: House, at_once: bool) -> None:
    """It is queued again, or stays queued for the copy."""
    async with (
        cable(house.server.port) as between,
        Waiting(between.target) as client,
        AsyncClient(f"127.0.0.1:{house.server.port}") as direct,
    ):
        busy, session = await direct.session("lstm"), await client.session("lstm")
        steps = [asyncio.create_task(busy.step(x[:1]))]
        await house.gate.entered()
        steps.append(asyncio.create_task(session.step(x[:1])))
        await house.queued(1)
        between.cut()
        if at_once:
            between.notice()
            await house.queued(0)
            client.let.set()
        else:
            client.let.set()
            await until(lambda: house.pending(session.session_id) == 2)
            between.notice()
        await until(lambda: house.pending(session.session_id) == 1)
        house.gate.let(10)
        for y in await asyncio.gather(*steps):
            np.testing.assert_allclose(y, expected(x)[:1], rtol=0, atol=BOUND)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_close_whose_connection_breaks(house: House, at_once: bool) -> None:
    """Sent again while a chunk still runs, it waits for the end of the session instead of taking it for gone."""
    async with cable(house.server.port) as between, Waiting(between.target) as client:
        session = await client.session("lstm")
        held = house.server.operations.sessions.find(b"", session.session_id)
        step = asyncio.create_task(session.step(x[:2]))
        await house.gate.entered()
        step.cancel()
        close = asyncio.create_task(session.close())
        await until(lambda: held.closing == 1)
        between.cut()
        if at_once:
            between.notice()
            await until(lambda: held.closing == 0)
            client.let.set()
        else:
            client.let.set()
            await until(lambda: held.closing == 2)
            between.notice()
        await until(lambda: held.closing == 1)
        assert not close.done()
        house.gate.let(10)
        await close
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await house.stub.GetSession(pb.GetSessionRequest(session_id=session.session_id))
        assert gone.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("room", "away", "back"), [("draining", True, False), ("ready", False, True)])
async def test_a_server_that_is_not_in_service_for_a_moment(
    lstm_repository: Path, room: str, away: bool, back: bool
) -> None:
    """Steps, batches and new sessions wait until it is, on connections that live on."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        session = await client.session("lstm")
        await session.step(x[:4])
        setattr(server.operations.intake, room, away)
        work = asyncio.gather(session.step(x[4:]), client.infer("lstm", x[None]), client.session("lstm"))
        _, stream = client._opened()
        await until(lambda: bool(stream._refused))
        setattr(server.operations.intake, room, back)
        y, whole, _ = await work
        np.testing.assert_array_equal(whole[0, 4:], y)
        assert len(server.operations.sessions) == 2


async def test_two_handles_that_step_from_one_position(lstm_repository: Path) -> None:
    """What docs/client.md says of them: as many steps are taken for a repetition, another number for a conflict."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        session = await client.session("lstm")
        await session.step(x[:4])
        other = await client.attach(session.session_id)
        y = await other.step(x[4:6])
        np.testing.assert_array_equal(await session.step(-x[8:10]), y)
        assert (session.position, other.position) == (6, 6)
        await other.step(x[6:8])
        with pytest.raises(PositionConflict) as conflict:
            await session.step(x[6])
        assert conflict.value.position == 8


async def test_whoever_takes_over_goes_on_where_nobody_follows(lstm_repository: Path) -> None:
    """A fork, and the session itself closed: the former handle's next step fails, and the fork goes on undisturbed."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        session = await client.session("lstm")
        await session.step(x[:4])
        attached = await client.attach(session.session_id)
        mine = await attached.fork()
        await attached.close()
        with pytest.raises(SessionLost, match="another handle closed"):
            await session.step(x[4])
        np.testing.assert_allclose(await mine.step(x[4:]), expected(x)[4:], rtol=0, atol=BOUND)


async def test_a_session_reset_by_another_handle(lstm_repository: Path) -> None:
    """It says so instead of going on in a life that is not its own."""
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        session = await client.session("lstm")
        await session.step(x[:4])
        other = await client.attach(session.session_id)
        await other.reset()
        await other.step(x[:4])
        with pytest.raises(EpochConflict, match="someone else"):
            await session.step(x[4:])
        assert not session.in_doubt
        again = await client.attach(session.session_id)
        np.testing.assert_allclose(await again.step(x[4:]), expected(x)[4:], rtol=0, atol=BOUND)


async def test_a_reset_cancelled_at_any_moment(lstm_repository: Path) -> None:
    """Whether it happened or not, the handle goes on where the session is."""
    outcomes = set()
    async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        session = await client.session("lstm")
        for turns in range(60):
            await session.reset()
            await session.step(x[:4])
            reset = asyncio.create_task(session.reset())
            for _ in range(turns):
                await asyncio.sleep(0)
            reset.cancel()
            await asyncio.wait([reset])
            await session.settle()
            begin = session.position
            outcomes.add(begin)
            y = await session.step(x[begin : begin + 4])
            np.testing.assert_allclose(y, expected(x)[begin : begin + 4], rtol=0, atol=BOUND)
    assert outcomes == {0, 4}


async def test_the_servers_limit_on_messages(lstm_repository: Path) -> None:
    """One chunk beyond it is refused in the client; the others go in messages that the server takes."""
    async with (
        running(lstm_repository, max_message_bytes=20_000) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        long = np.random.default_rng(9).standard_normal((1700, INPUT)).astype(np.float32)
        sessions = [await client.session("lstm") for _ in range(9)]
        chunks = {session: long[: 100 * n] for n, session in enumerate(sessions, 9)}
        with pytest.raises(StepsFailed, match="1 of 9 chunks failed") as failed:
            await client.step_many(chunks)
        assert isinstance(failed.value.errors[sessions[-1]], InvalidRequest)
        for session, y in failed.value.outputs.items():
            np.testing.assert_allclose(y, expected(chunks[session]), rtol=0, atol=1e-5)
