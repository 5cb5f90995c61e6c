"""A server that drains or loads is waited for, as one that cannot be reached is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conveyor import AsyncClient, AsyncSession, ConnectionLost, ConveyorError, Draining, Loading, Unavailable
from conveyor.v1 import conveyor_pb2 as pb
from tests.clock import Clock
from tests.unit.conveyor.clients import PAUSE_S, impatient, rows
from tests.unit.conveyor.sum_server import Fault, SumServer, sum_server

KINDS = [Draining, Loading, Unavailable]


def refusal(kind: type[ConveyorError]) -> pb.ErrorDetail:
    """What the server says of a chunk in-band."""
    return pb.ErrorDetail(code=kind.code.value[0], reason=kind.reason, message="not now")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_chunk_that_cannot_be_taken_now_is_sent_again(kind: type[ConveyorError]) -> None:
    """On the same stream, after pauses that grow; it is applied once."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock) as client, client.session("sum") as session:
        server.refusals.extend([refusal(kind)] * 6)
        began = clock.now
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))
        assert (server.streams, len(server.chunks)) == (1, 7)
        # Bounds of 0.05, 0.1, 0.2, 0.4, 0.8 and 1 s, the lower half of each not used.
        assert 2.55 / 2 <= clock.now - began <= 2.55
        assert list(server.applied.values()) == [1]


async def test_chunks_that_cannot_be_taken_now_leave_together_again() -> None:
    """A pause is everybody's; whoever is not refused is answered meanwhile."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        _, stream = client._opened()

        async def sleep(seconds: float) -> None:
            async with asyncio.timeout(30):
                while len(stream._refused) < 5:  # noqa: ASYNC110  nobody else is to know of it
                    await asyncio.sleep(0)

        stream._settings = replace(stream._settings, sleep=sleep)
        sessions = [await client.session("sum") for _ in range(6)]
        server.refusals.extend([None, *[refusal(Loading)] * 5])
        outputs = await client.step_many({session: rows(1) for session in sessions})
        assert all(np.array_equal(y, rows(1)) for y in outputs.values())
        assert server.messages == [6, 5]


async def test_a_connection_lost_during_the_pause() -> None:
    """The chunk goes out with the others on the next one, once."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        a, b = await client.session("sum"), await client.session("sum")
        server.refusals.append(refusal(Draining))
        server.chunk_faults.extend([None, Fault("after")])
        outputs = await client.step_many({a: rows(1), b: rows(1)})
        assert all(np.array_equal(y, rows(1)) for y in outputs.values())
        assert server.messages == [2, 2]
        assert list(server.applied.values()) == [1, 1]


@pytest.mark.parametrize(("timeout_s", "waits_s"), [(1000, 20), (7, 7)])
async def test_waiting_has_an_end(timeout_s: float, waits_s: float) -> None:
    """The reconnect timeout, or the step's own; all copies were refused, so nothing is in doubt."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        server.refusals.extend([refusal(Draining)] * 1000)
        began = clock.now
        with pytest.raises(Draining, match="not now"):
            await session.step(rows(1), timeout_s=timeout_s)
        # The last attempt comes when the reconnect timeout is over; at the step's own end there is no point in one.
        assert waits_s - (PAUSE_S if timeout_s == waits_s else 1e-6) <= clock.now - began <= waits_s + 1e-6
        assert (session.in_doubt, session.position) == (False, 0)
        server.refusals.clear()
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))


async def test_a_refusal_says_nothing_of_a_copy_that_was_lost() -> None:
    """Applied, its reply lost, and the server not ready after: the step stays in doubt until a server knows."""
    async with sum_server() as server, impatient(server) as client:
        session = await client.session("sum")
        server.chunk_faults.append(Fault("after"))
        server.refusals.extend([None, *[refusal(Loading)] * 1000])
        with pytest.raises(Loading, match="stands at position 0, and whether the chunk"):
            await session.step(rows(2))
        assert session.in_doubt
        with pytest.raises(Loading):
            await session.settle()
        assert session.in_doubt
        server.refusals.clear()
        np.testing.assert_array_equal(await session.settle(), np.cumsum(rows(2), 0))
        assert (session.in_doubt, session.position) == (False, 2)
        assert list(server.applied.values()) == [1]


async def test_closing_the_client_ends_the_pause() -> None:
    """A step that waits for its next attempt ends, and no task is left."""
    pausing = asyncio.Event()

    async def sleep(seconds: float) -> None:
        pausing.set()
        await asyncio.Event().wait()

    async with sum_server() as server:
        client = AsyncClient(server.target)
        _, stream = client._opened()
        stream._settings = replace(stream._settings, sleep=sleep)
        session = await client.session("sum")
        server.refusals.append(refusal(Loading))
        step = asyncio.create_task(session.step(rows(1)))
        await pausing.wait()
        await client.close()
        with pytest.raises(ConnectionLost, match="closed"):
            await step
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("conveyor")]


async def _use(server: SumServer, client: AsyncClient, session: AsyncSession, call: str) -> Any:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "ListModels": client.models,
        "GetModel": lambda: client.model("sum"),
        "Infer": lambda: client.infer("sum", rows(1)[None]),
        "OpenSession": lambda: client.session("sum", session_id="chosen"),
        "GetSession": lambda: client.attach(session.session_id),
        "ForkSession": lambda: session.fork("chosen"),
        "ExportSession": session.export,
        "ResetSession": session.reset,
        "CloseSession": session.close,
    }
    if call == "ImportSession":
        state = await session.export()
        return await client.import_session(state, "chosen")
    return await calls[call]()


CALLS = [
    "ListModels", "GetModel", "Infer", "OpenSession", "GetSession", "ForkSession", "ExportSession", "ResetSession",
    "CloseSession", "ImportSession",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_cannot_be_taken_now_is_made_again(call: str, kind: type[ConveyorError]) -> None:
    """Every one; and it gives up with the server's word."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        server.call_faults[call].extend([Fault("before", detail=kind("not now"))] * 3)
        await _use(server, client, session, call)
        assert not server.call_faults[call]
    async with sum_server() as server, impatient(server, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        server.call_faults[call].extend([Fault("before", detail=kind("not now"))] * 1000)
        with pytest.raises(kind, match="not now"):
            await _use(server, client, session, call)
