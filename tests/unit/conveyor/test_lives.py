"""The lives of a session: each reset begins another, and no chunk or handle is taken for one of another life."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from conveyor import (
    AsyncClient,
    ConnectionLost,
    ConveyorError,
    EpochConflict,
    PositionConflict,
    SessionLost,
    TimedOut,
)
from tests.unit.conveyor.clients import held_step, impatient, rows
from tests.unit.conveyor.sum_server import Fault, sum_server


async def test_every_chunk_says_which_life_it_is_for() -> None:
    """However the session came to be: opened, forked, imported, attached, reset, found after a lost reply."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        for call in ("OpenSession", "ForkSession", "ImportSession", "ResetSession"):
            server.call_faults[call].extend([None, Fault("after")])
        sessions = []
        for _ in range(2):
            session = await client.session("sum")
            state = await session.export()
            sessions += [session, await session.fork(), await client.import_session(state)]
            once_more = await client.session("sum")
            await once_more.reset()
            sessions += [once_more, await client.attach((await client.session("sum")).session_id)]
        for session in sessions:
            await session.step(rows(1))
            assert server.chunks[-1].epoch == server.sessions[session.session_id].epoch
        assert len({chunk.epoch for chunk in server.chunks}) == len(sessions)
        assert not any(server.call_faults.values())


async def test_a_session_reset_by_another_handle() -> None:
    """Whoever stood in the life before is told so, without doubt, and ``attach`` goes on."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        await session.step(rows(2))
        other = await client.attach(session.session_id)
        await other.reset()
        await other.step(rows(2))
        # At the same position again, so that only the epoch tells the two lives apart.
        for _ in range(2):
            with pytest.raises(EpochConflict, match=r"stood at position 2, and someone else .* attach\(\) goes on"):
                await session.step(rows(1))
            with pytest.raises(EpochConflict):
                await session.reset()
            assert (session.in_doubt, session.position) == (False, 2)
        again = await client.attach(session.session_id)
        np.testing.assert_array_equal(await again.step(rows(1)), rows(2).sum(0) + rows(1))


async def test_a_step_in_doubt_when_another_handle_resets() -> None:
    """Neither its outputs nor None would be true: the position is another one."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=0) as client:
        session = await client.session("sum")
        server.chunk_faults.append(Fault("after"))
        with pytest.raises(ConnectionLost):
            await session.step(rows(2))
        await (await client.attach(session.session_id)).reset()
        with pytest.raises(EpochConflict):
            await session.settle()
        assert not session.in_doubt


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("end", ["cancelled", "late", "lost"])
async def test_a_reset_without_an_answer_is_found_out(end: str, applied: bool) -> None:
    """Cancelled, out of time or cut off, before it happened or after: the handle works on, from where the server is."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=0) as client:
        session = await client.session("sum")
        await session.step(rows(2))
        whens: dict[bool, Literal["kept", "held", "after", "before"]]
        whens = {True: "after", False: "before"} if end == "lost" else {True: "kept", False: "held"}
        server.call_faults["ResetSession"].append(Fault(whens[applied]))
        connection, settings = session._connection, session._connection.settings
        if end == "late":
            connection.settings = replace(settings, timeout_s=0.1)
        reset = asyncio.create_task(session.reset())
        if end != "lost":
            await server.held.get()
        if end == "cancelled":
            reset.cancel()
        with pytest.raises({"cancelled": asyncio.CancelledError, "late": TimedOut, "lost": ConnectionLost}[end]):
            await reset
        connection.settings = settings
        assert session.in_doubt
        assert await session.settle() is None
        assert (session.in_doubt, session.position) == (False, 0 if applied else 2)
        before = np.zeros(2) if applied else rows(2).sum(0)
        np.testing.assert_array_equal(await session.step(rows(1)), before + rows(1))


async def test_whatever_follows_a_reset_in_doubt_settles_it_first() -> None:
    """A step, a fork, an export, another reset."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=0) as client:
        session = await client.session("sum")
        for call, position in [("step", 1), ("fork", 0), ("export", 0), ("reset", 0)]:
            await session.step(rows(1))
            server.call_faults["ResetSession"].append(Fault("after"))
            with pytest.raises(ConnectionLost):
                await session.reset()
            await (session.step(rows(1)) if call == "step" else getattr(session, call)())
            assert (session.in_doubt, session.position) == (False, position)


async def test_a_reset_in_doubt_goes_on_from_where_the_server_is() -> None:
    """Also if somebody else has stepped the session since, or ended it."""
    async with sum_server() as server, impatient(server) as client:
        session = await client.session("sum")
        await session.step(rows(2))
        server.call_faults["ResetSession"].append(Fault("kept"))
        reset = asyncio.create_task(session.reset())
        await server.held.get()
        reset.cancel()
        other = await client.attach(session.session_id)
        await other.step(rows(3))
        assert await session.settle() is None
        assert session.position == 3
        server.call_faults["ResetSession"].append(Fault("held"))
        reset = asyncio.create_task(session.reset())
        await server.held.get()
        reset.cancel()
        await other.close()
        with pytest.raises(SessionLost):
            await session.step(rows(1))


async def test_a_reset_that_is_refused_leaves_no_doubt() -> None:
    """The server's word is enough."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        await (await client.attach(session.session_id)).step(rows(1))
        with pytest.raises(PositionConflict):
            await session.reset()
        assert (session.in_doubt, session.position) == (False, 0)
        server.sessions.clear()
        with pytest.raises(ConveyorError):
            await session.reset()
        assert not session.in_doubt


async def test_a_chunk_under_way_is_settled_before_a_reset() -> None:
    """So that the reset ends the life that the chunk was for, and its reply is not taken for one of the next."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        step = await held_step(server, session)
        reset = asyncio.create_task(session.reset())
        await asyncio.sleep(0)
        server.released.set()
        np.testing.assert_array_equal(await step, rows(1))
        await reset
        np.testing.assert_array_equal(await session.step([10, 20]), [10, 20])
