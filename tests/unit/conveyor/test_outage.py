"""A server that cannot be had: how long it is tried, how often gRPC looks, and what the log says meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from conveyor import AsyncClient, AsyncSession, ConnectionLost, Draining, Loading
from conveyor.errors import ConveyorError
from tests.clock import Clock
from tests.unit.conveyor.clients import impatient, rows
from tests.unit.conveyor.sum_server import Fault, SumServer, sum_server
from tests.unit.conveyor.test_unavailable import refusal

BREAKS = 1000
"""More often than anybody tries."""


def breaks(server: SumServer, how: str) -> None:
    """From now on nothing comes through: calls, streams, or chunks on a stream that lives on."""
    if how == "call":
        server.call_faults["ListModels"].extend([Fault("before")] * BREAKS)
    elif how == "stream":
        server.chunk_faults.extend([Fault("before")] * BREAKS)
    else:
        server.refusals.extend([refusal(Loading)] * BREAKS)


def mend(server: SumServer) -> None:
    """All comes through."""
    server.call_faults.clear()
    server.chunk_faults.clear()
    server.refusals.clear()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the client logged: what is said of the server, without its address and the reason."""
    assert {record.levelno for record in caplog.records if record.name == "conveyor"} <= {logging.WARNING}
    messages = [record.getMessage() for record in caplog.records if record.name == "conveyor"]
    return [message.split(" ", 1)[1].partition(":")[0] for message in messages]


def work(client: AsyncClient, session: AsyncSession, how: str) -> Awaitable[Any]:
    """What breaks in that way."""
    return client.models() if how == "call" else session.step(rows(1), timeout_s=1000)


@pytest.mark.parametrize("how", ["call", "stream", "chunk"])
async def test_the_last_attempt_comes_when_the_time_is_over(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is back at the very end of the reconnect timeout is found."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        connection, stream = client._opened()
        end = clock.now + 20

        async def sleep(seconds: float) -> None:
            clock.now += seconds
            if clock.now >= end - 1e-6:
                mend(server)
            await asyncio.sleep(0)

        connection.settings = stream._settings = replace(connection.settings, sleep=sleep)
        breaks(server, how)
        await work(client, session, how)
        assert clock.now == pytest.approx(end)
    assert told(caplog) == [
        "is not in service, and is tried again for up to 20 s",
        "is in service again, after 20.0 s",
    ]


@pytest.mark.parametrize(("how", "kind"), [("call", ConnectionLost), ("stream", ConnectionLost), ("chunk", Loading)])
async def test_who_gives_up_and_comes_again(
    how: str, kind: type[ConveyorError], caplog: pytest.LogCaptureFixture
) -> None:
    """Each begin is told, and the end once the server is back; whoever was never kept waiting is told nothing."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        breaks(server, how)
        for _ in range(2):
            with pytest.raises(kind):
                await work(client, session, how)
        mend(server)
        await work(client, session, how)
        await work(client, session, how)
    # Nobody waited any more when the server came back.
    assert told(caplog) == ["is not in service, and is tried again for up to 20 s"] * 2


async def test_it_is_told_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    """Steps of many sessions and calls that wait at once are one line at the beginning, and one at the end."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=20) as client:
        sessions = [await client.session("sum") for _ in range(9)]
        server.refusals.extend([refusal(Draining)] * 9)
        server.chunk_faults.extend([None] * 9 + [Fault("before")] * 3)
        outputs = await asyncio.gather(*(session.step(rows(1)) for session in sessions))
        assert all(np.array_equal(y, rows(1)) for y in outputs)
    begin, end = told(caplog)
    assert begin.startswith("is not in service")
    assert end.startswith("is in service again")


async def test_an_error_that_the_server_tells_ends_the_wait(caplog: pytest.LogCaptureFixture) -> None:
    """It is back, whatever it says."""
    async with sum_server() as server, impatient(server) as client:
        server.call_faults["GetModel"].extend([Fault("before")] * 3)
        with pytest.raises(ConveyorError, match="nobody"):
            await client.model("nobody")
    assert told(caplog)[1].startswith("is in service again")


async def test_no_sooner_than_asked() -> None:
    """The clock on the wall: nobody gives up before the reconnect timeout is over."""
    async with AsyncClient("127.0.0.1:1", reconnect_timeout_s=0.4) as client:
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"could not be reached for 0\.[4-9] s|for [1-9]"):
            await client.models()
        assert time.monotonic() - began >= 0.4


async def test_grpc_looks_often() -> None:
    """Its own pauses between connections stay short, so that a server that is back is soon found."""
    connections: asyncio.Queue[float] = asyncio.Queue()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.put_nowait(time.monotonic())
        writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    target = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with AsyncClient(target) as client:
        waiting = asyncio.create_task(client.models())
        times = [await connections.get() for _ in range(9)]
        waiting.cancel()
    listener.close()
    # Of pauses that double, or grow by gRPC's 1.6 without such a bound, the later ones are far longer than the earlier.
    assert sorted(b - a for a, b in pairwise(times))[-3] < 0.6
