"""AsyncClient and AsyncSession against a small real server whose faults are scripted."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal

import grpc
import numpy as np
import pytest

from conveyor import (
    AsyncClient,
    AsyncSession,
    ConnectionLost,
    ConveyorError,
    Draining,
    EngineFailed,
    InvalidRequest,
    Loading,
    ModelUnknown,
    PositionConflict,
    ProtocolError,
    SessionExists,
    SessionLost,
    SessionState,
    SessionUnknown,
    StepsFailed,
    TimedOut,
)
from conveyor.v1 import conveyor_pb2 as pb
from tests.clock import Clock
from tests.unit.conveyor.clients import PAUSE_S, held_step, impatient, rows
from tests.unit.conveyor.sum_server import Fault, Held, SumServer, sum_server

LOST = [
    (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
    (grpc.StatusCode.CANCELLED, "upstream reset"),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
]

CALLS = ["OpenSession", "ForkSession", "ResetSession", "CloseSession", "ExportSession", "ImportSession"]


# --- what a step is ---


async def test_steps_and_chunks_go_on_from_each_other() -> None:
    """One step has no time axis, a chunk has; the server carries the state between them."""
    x = rows(6)
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        first = await session.step(x[0])
        chunk = await session.step(x[1:5])
        last = await session.step(x[5].tolist())
        assert (first.shape, chunk.shape, last.shape) == ((2,), (4, 2), (2,))
        np.testing.assert_array_equal(np.concatenate([first[None], chunk, last[None]]), np.cumsum(x, 0))
        assert session.position == 6
        assert (session.model.name, session.model.version) == ("sum", 1)


async def test_a_session_is_closed_at_the_end_of_its_block() -> None:
    """With ``async with`` the server forgets it; steps after that are refused here."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        async with client.session("sum") as session:
            assert session.session_id in server.sessions
        assert not server.sessions
        await session.close()
        with pytest.raises(InvalidRequest, match="has been closed"):
            await session.step(rows(1))


async def test_an_error_in_the_block_is_not_hidden_by_the_closing() -> None:
    """The session is closed all the same, if the server can be reached."""
    async with sum_server() as server, AsyncClient(server.target, reconnect_timeout_s=0) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.session("sum"):
                raise ZeroDivisionError
        assert not server.sessions
        session = await client.session("sum")
        await server.stop()
        with pytest.raises(ZeroDivisionError):
            async with session:
                raise ZeroDivisionError


async def test_a_session_that_was_not_awaited_says_so() -> None:
    """Who forgets the await is told what to write, and not of some object's missing attribute."""
    opening = AsyncClient("127.0.0.1:1").session("lstm")
    with pytest.raises(AttributeError, match=r"has no 'step': write session = await client\.session\(\.\.\.\)"):
        opening.step(np.zeros(3, np.float32))  # type: ignore[attr-defined]
    assert not hasattr(opening, "position")
    opening._coroutine.close()


async def test_steps_of_one_session_wait_their_turn() -> None:
    """Called at once, they are applied one after the other, in order."""
    x = rows(5)
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        y = await asyncio.gather(*(session.step(row) for row in x))
        np.testing.assert_array_equal(y, np.cumsum(x, 0))
        assert [chunk.position for chunk in server.chunks] == [0, 1, 2, 3, 4]


async def test_chunks_that_queue_meanwhile_leave_together() -> None:
    """Many sessions stepped at once share messages, and one stream."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = [await client.session("sum") for _ in range(20)]
        for _ in range(3):
            await asyncio.gather(*(session.step(rows(1)) for session in sessions))
        assert server.messages == [20, 20, 20]
        assert server.streams == 1


async def test_step_many_sends_one_message() -> None:
    """One chunk for each of many sessions; their lengths may differ."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = [await client.session("sum") for _ in range(5)]
        outputs = await client.step_many({session: rows(n + 1) for n, session in enumerate(sessions)})
        assert server.messages == [5]
        for n, session in enumerate(sessions):
            np.testing.assert_array_equal(outputs[session], np.cumsum(rows(n + 1), 0))
            assert session.position == n + 1
        assert await client.step_many({}) == {}


async def test_step_many_keeps_what_succeeded() -> None:
    """The error holds the outputs of the sessions whose chunk was applied."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        good, bad = await client.session("sum"), await client.session("sum")
        del server.sessions[bad.session_id]
        with pytest.raises(StepsFailed, match="1 of 2 chunks failed") as failed:
            await client.step_many({bad: rows(1), good: rows(1)})
        np.testing.assert_array_equal(failed.value.outputs[good], rows(1))
        assert isinstance(failed.value.errors[bad], SessionLost)
        assert (good.position, bad.position) == (1, 0)


async def test_step_many_refuses_a_chunk_that_does_not_fit_its_model() -> None:
    """Before anything is sent, so that the other sessions have not moved."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        good, bad = await client.session("sum"), await client.session("sum")
        with pytest.raises(InvalidRequest, match=r"has shape \[1, 3\]; expected \[T, 2\]"):
            await client.step_many({good: rows(1), bad: rows(1, width=3)})
        assert not server.chunks
        assert (good.position, good.in_doubt) == (0, False)


async def test_step_many_refuses_sessions_of_another_client() -> None:
    """Nothing is sent then."""
    async with sum_server() as server, AsyncClient(server.target) as one, AsyncClient(server.target) as other:
        mine, theirs = await one.session("sum"), await other.session("sum")
        with pytest.raises(InvalidRequest, match="its own client"):
            await one.step_many({mine: rows(1), theirs: rows(1)})
        assert not server.chunks


async def test_two_step_many_with_the_same_sessions_do_not_block_each_other() -> None:
    """Whatever order the sessions are named in, and whoever gets one of them first."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        a, b = await client.session("sum"), await client.session("sum")
        singles = [a.step(rows(1)), b.step(rows(1))]
        pairs = [client.step_many({b: rows(1), a: rows(1)}), client.step_many({a: rows(1), b: rows(1)})]
        await asyncio.wait_for(asyncio.gather(*singles, *pairs), 10)
        assert (a.position, b.position) == (3, 3)


async def test_a_message_does_not_grow_without_bound() -> None:
    """Chunks of more than a mebibyte together leave in several messages."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        sessions = [await client.session("sum") for _ in range(6)]
        await client.step_many({session: np.zeros((50_000, 2)) for session in sessions})
        assert server.messages == [2, 2, 2]


async def test_a_chunk_larger_than_a_message_is_refused_here() -> None:
    """Before it could break the stream that others use; the session is not in doubt."""
    async with sum_server() as server, AsyncClient(server.target, max_message_bytes=1000) as client:
        session = await client.session("sum")
        with pytest.raises(InvalidRequest, match="does not fit into a message of 1000"):
            await session.step(rows(1000))
        assert not session.in_doubt
        assert not server.chunks


async def test_the_servers_limit_on_messages_holds_here() -> None:
    """Messages stay below it, and a chunk beyond it is refused here; on the stream it would end everybody's steps."""
    async with sum_server(max_message_bytes=300_000) as server, AsyncClient(server.target) as client:
        assert (await client.model("sum")).max_message_bytes == 300_000
        sessions = [await client.session("sum") for _ in range(7)]
        chunks = {session: np.zeros((12_500, 2)) for session in sessions}
        chunks[sessions[0]] = np.zeros((37_500, 2))
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(chunks)
        assert failed.value.outputs.keys() == set(sessions[1:])
        with pytest.raises(InvalidRequest, match="does not fit into a message of 300000"):
            raise failed.value.errors[sessions[0]]
        assert server.messages == [2, 2, 2]
        assert (server.streams, sessions[0].in_doubt) == (1, False)


async def test_two_handles_of_a_session_do_not_take_each_others_replies() -> None:
    """While one has a chunk under way the other is refused, and neither waits for ever."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        one = await client.session("sum")
        other = await client.attach(one.session_id)
        step = await held_step(server, one)
        with pytest.raises(InvalidRequest, match="under way already, from another handle"):
            await other.step(rows(2))
        server.released.set()
        np.testing.assert_array_equal(await asyncio.wait_for(step, 10), rows(1))
        again = await client.attach(one.session_id)
        with pytest.raises(StepsFailed) as failed:
            await asyncio.wait_for(client.step_many({one: rows(1), again: rows(1)}), 10)
        assert (set(failed.value.outputs), set(failed.value.errors)) == ({one}, {again})
        assert list(server.applied.values()) == [1, 1]


# --- a broken connection ---


@pytest.mark.parametrize(("code", "text"), LOST)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_dropped_stream_neither_loses_nor_doubles_a_step(when: str, code: grpc.StatusCode, text: str) -> None:
    """Whether the chunk had been applied or not, and by whatever status the break shows."""
    x = rows(8)
    async with sum_server() as server, impatient(server) as client, client.session("sum") as session:
        for position, row in enumerate(x):
            server.chunk_faults.extend([Fault(when, code, text), Fault(when, code, text)])  # type: ignore[arg-type]
            np.testing.assert_array_equal(await session.step(row), np.cumsum(x, 0)[position])
        assert server.streams == 17
        assert list(server.applied.values()) == [1] * 8


async def test_many_sessions_survive_random_breaks() -> None:
    """Ten sessions at once, with breaks before and after the application, and doubled replies."""
    random = np.random.default_rng(0)
    x = rows(30)

    async def run(session: AsyncSession) -> None:
        y = [await session.step(part) for part in np.split(x, [1, 2, 5, 9, 10, 17, 20])]
        np.testing.assert_array_equal(np.concatenate(y), np.cumsum(x, 0))

    async with sum_server() as server, impatient(server) as client:
        sessions = [await client.session("sum") for _ in range(10)]
        choices = [None, None, None, Fault("before"), Fault("after"), Fault("twice")]
        server.chunk_faults.extend(choices[n] for n in random.integers(0, len(choices), 100))
        await asyncio.gather(*map(run, sessions))
        assert len(server.applied) == 80
        assert set(server.applied.values()) == {1}


async def test_a_server_that_comes_back_with_its_sessions_is_gone_on_with() -> None:
    """Between its end and its return, a step waits; afterwards nothing is lost."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        await session.step(rows(1))
        await server.stop()
        step = asyncio.create_task(session.step(rows(2)))
        await asyncio.sleep(0)
        assert session.in_doubt
        again = SumServer()
        again.sessions = server.sessions
        await again.start(server.port)
        np.testing.assert_array_equal(await step, np.cumsum(rows(2), 0) + rows(1))
        assert session.position == 3
        await again.stop()


async def test_a_session_that_the_server_forgot_is_lost() -> None:
    """A server that restarted without its sessions is told apart from a wrong id."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        await session.step(rows(2))
        server.sessions.clear()
        server.chunk_faults.append(Fault("before"))
        with pytest.raises(SessionLost, match="stood at position 2"):
            await session.step(rows(1))
        with pytest.raises(SessionLost):
            await session.export()
        await session.close()
        with pytest.raises(SessionUnknown):
            await client.attach("0" * 32)


async def test_an_idle_stream_that_breaks_is_opened_again_by_the_next_step() -> None:
    """Nobody waited, so nothing is resent."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        await session.step(rows(1))
        port, sessions = server.port, server.sessions
        await server.stop()
        again = SumServer()
        again.sessions = sessions
        await again.start(port)
        await client.models()
        assert again.streams == 0
        await session.step(rows(1))
        assert (again.streams, len(again.chunks)) == (1, 1)
        await again.stop()


async def test_a_draining_server_is_a_lost_connection_to_a_stream() -> None:
    """Another server, or the same one restarted, may have the sessions."""
    async with sum_server() as server, impatient(server) as client, client.session("sum") as session:
        server.chunk_faults.append(Fault("before", detail=Draining("the server is about to stop")))
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))
        assert server.streams == 2


async def test_progress_counts_against_giving_up() -> None:
    """A connection that keeps breaking is borne beyond the reconnect timeout as long as answers come through."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock, reconnect_timeout_s=1) as client:
        sessions = [await client.session("sum") for _ in range(2)]
        server.chunk_faults.extend([None, Fault("before")] * 79)

        async def run(session: AsyncSession) -> None:
            for _ in range(40):
                await session.step(rows(1))

        began = clock.now
        await asyncio.gather(*map(run, sessions))
        assert clock.now - began > 1.5
        assert [session.position for session in sessions] == [40, 40]


async def test_a_reply_to_an_earlier_chunk_is_not_taken_for_the_next() -> None:
    """A result is matched by its position too."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        await session.step(rows(1))
        server.chunk_faults.append(Fault("stale"))
        np.testing.assert_array_equal(await session.step(rows(1)), 2 * rows(1))
        assert session.position == 2


async def test_giving_up_says_where_the_session_stands() -> None:
    """After the reconnect timeout a step ends; whether it counted is found out when the server can be reached."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        await session.step(rows(1))
        server.chunk_faults.extend([Fault("after")] * 100)
        began = clock.now
        with pytest.raises(ConnectionLost, match=f"{session.session_id}.* stands at position 1, and whether the chunk"):
            await session.step(rows(2))
        assert (session.in_doubt, session.position) == (True, 1)
        assert clock.now - began == pytest.approx(20)
        server.chunk_faults.clear()
        np.testing.assert_array_equal(await session.settle(), np.cumsum(rows(2), 0) + rows(1))
        assert (session.in_doubt, session.position) == (False, 3)
        assert server.applied[session.session_id, 1] == 1


async def test_a_stream_that_the_server_refuses_is_not_tried_again() -> None:
    """A status that no reconnecting cures ends the step at once, with its code."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        server.chunk_faults.append(Fault("before", grpc.StatusCode.UNAUTHENTICATED, "no entry"))
        with pytest.raises(ConveyorError, match="no entry") as refused:
            await session.step(rows(1))
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert server.streams == 1
        assert await session.settle() is None
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))


# --- doubt ---


async def test_a_cancelled_step_that_counted_is_found_out() -> None:
    """``settle`` gives its outputs, and the position has moved."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        task = await held_step(server, session)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.in_doubt
        server.released.set()
        np.testing.assert_array_equal(await session.settle(), rows(1))
        assert (session.in_doubt, session.position) == (False, 1)
        assert await session.settle() is None


async def test_the_step_after_a_cancelled_one_settles_it_first() -> None:
    """New inputs never get the reply to the old ones."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        task = await held_step(server, session)
        task.cancel()
        server.released.set()
        y = await session.step([10.0, 20.0])
        np.testing.assert_array_equal(y, rows(1)[0] + [10, 20])
        assert session.position == 2


async def test_a_cancelled_step_that_did_not_count_is_not_applied_later() -> None:
    """When the connection breaks before it was applied, what is sent again only asks."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        server.chunk_faults.append(Fault("before"))
        task = asyncio.create_task(session.step(rows(1)))
        await asyncio.sleep(0)
        task.cancel()
        assert await session.settle() is None
        assert (session.position, len(server.applied)) == (0, 0)
        np.testing.assert_array_equal(await session.step([10.0, 20.0]), [10, 20])


async def test_no_answer_in_time_leaves_the_session_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is told the deadline; past it, and a little longer for its word, the step ends here."""
    monkeypatch.setattr("conveyor.async_session._GRACE_S", 0.01)
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        server.chunk_faults.append(Fault("held"))
        with pytest.raises(TimedOut, match="stands at position 0"):
            await session.step(rows(1), timeout_s=0.05)
        assert 1 < server.chunks[0].timeout_us <= 50_000
        assert session.in_doubt
        with pytest.raises(TimedOut):
            await session.settle(timeout_s=0.01)
        assert session.in_doubt
        server.released.set()
        np.testing.assert_array_equal(await session.settle(), rows(1))


async def test_every_call_settles_a_step_in_doubt_first() -> None:
    """Fork, reset and export are about a position, so they have to know it."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        server.released.set()
        for call, position in [("export", 1), ("fork", 2), ("reset", 0)]:
            task = await held_step(server, session)
            task.cancel()
            await getattr(session, call)()
            assert (session.position, session.in_doubt) == (position, False)


async def test_closing_does_not_wait_for_a_step_in_doubt() -> None:
    """Whether it counted does not matter any more."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        task = await held_step(server, session)
        task.cancel()
        await asyncio.wait_for(session.close(), 10)
        assert not server.sessions


async def test_a_refused_chunk_leaves_no_doubt() -> None:
    """The server's word that it was not applied is enough; the same chunk can be sent again."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        server.refusals.append(pb.ErrorDetail(code=13, reason="engine_failed", message="a run failed"))
        with pytest.raises(EngineFailed, match="a run failed"):
            await session.step(rows(1))
        assert (session.in_doubt, session.position) == (False, 0)
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))


async def test_a_session_moved_by_someone_else_is_a_conflict() -> None:
    """The error names the position that the server is at."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        one = await client.session("sum")
        other = await client.attach(one.session_id)
        await other.step(rows(3))
        with pytest.raises(PositionConflict) as conflict:
            await one.step(rows(1))
        assert conflict.value.position == 3
        with pytest.raises(PositionConflict):
            await one.fork()


async def test_a_reply_to_another_chunk_is_noticed() -> None:
    """Two that use one session cannot take each other's replies for their own unseen, if the lengths differ."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        reply = pb.ChunkResult(session_id=session.session_id, steps=4)
        server.sessions[session.session_id] = Held(position=4, last=reply)
        server._step = lambda chunk: reply  # type: ignore[method-assign]
        with pytest.raises(ProtocolError, match="a chunk of 1 steps was sent, and the reply is to one of 4"):
            await session.step(rows(1))


# --- opening, forking, carrying away ---


async def test_fork_goes_its_own_way() -> None:
    """Same state and position; what follows in one is not seen by the other."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        await session.step(rows(2))
        async with await session.fork() as fork:
            assert fork.position == 2
            a, b = await session.step([1.0, 1.0]), await fork.step([5.0, 5.0])
            np.testing.assert_array_equal(b - a, [4, 4])
            assert fork.session_id != session.session_id


async def test_a_fork_is_awaited_or_entered() -> None:
    """As a session is: entered, it is closed at the end; forgotten, it says what to write."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        async with session.fork("mine") as fork:
            await fork.step(rows(1))
            assert set(server.sessions) == {session.session_id, "mine"}
        assert set(server.sessions) == {session.session_id}
        forgotten = session.fork()
        with pytest.raises(AttributeError, match=r"not open yet, and has no 'position'.*await"):
            getattr(forgotten, "position")  # noqa: B009
        await forgotten


async def test_reset_starts_over() -> None:
    """Position 0 and the initial state."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        await session.step(rows(2))
        await session.reset()
        assert session.position == 0
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))


async def test_a_state_can_be_carried_to_another_server(tmp_path: Path) -> None:
    """Exported, through a file, and imported elsewhere, the session goes on."""
    async with sum_server() as here, AsyncClient(here.target) as client, client.session("sum") as session:
        await session.step(rows(3))
        (await session.export()).save(tmp_path / "state.npz")
    async with sum_server() as there, AsyncClient(there.target) as client:
        session = await client.import_session(SessionState.load(tmp_path / "state.npz"))
        assert session.position == 3
        np.testing.assert_array_equal(await session.step([1.0, 1.0]), rows(3).sum(0) + 1)


async def test_attach_goes_on_where_the_server_is() -> None:
    """The id is enough, with another client too."""
    async with sum_server() as server:
        async with AsyncClient(server.target) as client:
            session = await client.session("sum", session_id="mine")
            await session.step(rows(2))
        async with AsyncClient(server.target) as client:
            session = await client.attach("mine")
            assert session.position == 2
            np.testing.assert_array_equal(await session.step([1.0, 1.0]), rows(2).sum(0) + 1)


async def test_attach_at_a_position_gets_the_lost_reply_again() -> None:
    """Whoever died between a chunk and its reply sends the chunk again, and it is not applied twice."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        first = await client.session("sum")
        y = await first.step(rows(2))
        second = await client.attach(first.session_id, position=0)
        np.testing.assert_array_equal(await second.step(rows(2)), y)
        assert second.position == 2
        assert server.applied[first.session_id, 0] == 1


async def test_leaving_an_attached_session_does_not_close_it() -> None:
    """It is whoever opened it who decides when it ends; ``close`` ends it all the same."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum")
        async with client.attach(session.session_id) as attached:
            await attached.step(rows(1))
        with pytest.raises(ZeroDivisionError):
            async with client.attach(session.session_id):
                raise ZeroDivisionError
        assert (await client.attach(session.session_id)).position == 1
        await (await client.attach(session.session_id)).close()
        assert not server.sessions
        with pytest.raises(SessionLost, match="it restarted, or another handle closed the session"):
            await session.step(rows(1))


async def test_initial_states_are_sent() -> None:
    """In the model's dtype; of another shape they are refused here."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum", initial_states={"s": [100, 200]})
        np.testing.assert_array_equal(await session.step([1, 2]), [101, 202])
        with pytest.raises(InvalidRequest, match=r"state 's' has shape \[1, 2\]; expected \[2\]"):
            await client.session("sum", initial_states={"s": [[100, 200]]})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", CALLS)
async def test_a_call_whose_reply_was_lost_is_made_again(call: str, when: str) -> None:
    """Its effect is there once, whether the first attempt had it or not."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        for name in CALLS:
            server.call_faults[name].extend([Fault(when)] * 2 if name == call else [])  # type: ignore[arg-type]
        async with client.session("sum") as session:
            await session.step(rows(2))
            state = await session.export()
            assert state.position == 2
            fork = await session.fork()
            imported = await client.import_session(state)
            assert set(server.sessions) == {session.session_id, fork.session_id, imported.session_id}
            np.testing.assert_array_equal(await fork.step(rows(1)), rows(2).sum(0) + rows(1))
            await session.reset()
            assert session.position == server.sessions[session.session_id].position == 0
        assert set(server.sessions) == {fork.session_id, imported.session_id}
        assert not server.call_faults[call]


async def test_an_id_that_is_taken_is_an_error_the_first_time() -> None:
    """Only on a repeated attempt does it mean that the earlier one succeeded."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        session = await client.session("sum", session_id="mine")
        for taken in (client.session("sum", session_id="mine"), session.fork("mine")):
            with pytest.raises(SessionExists) as exists:
                await taken
            assert "earlier attempt" not in str(exists.value)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["OpenSession", "ForkSession", "ImportSession"])
async def test_a_chosen_id_is_never_taken_over(call: str, when: Literal["before", "after"]) -> None:
    """Found open after a lost attempt it may be anybody's session, so it is not given out as a new one."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        source = await client.session("sum")
        state = await source.export()
        if when == "before":
            async with AsyncClient(server.target) as other:
                await (await other.session("sum", session_id="cam-1")).step(rows(7))
        server.call_faults[call].append(Fault(when))
        with pytest.raises(SessionExists, match=r"an earlier attempt .* may have opened it"):
            if call == "OpenSession":
                await client.session("sum", session_id="cam-1")
            elif call == "ForkSession":
                await source.fork("cam-1")
            else:
                await client.import_session(state, "cam-1")
        assert (await client.attach("cam-1")).position == (7 if when == "before" else 0)


async def test_ids_cannot_be_guessed() -> None:
    """Random, and never the same."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        ids = {(await client.session("sum")).session_id for _ in range(10)}
        assert len(ids) == 10
        assert all(len(session_id) == 32 for session_id in ids)


# --- batches and models ---


async def test_infer_takes_batches_and_ragged_lists() -> None:
    """[N, T, I] with lengths gives [N, T, O]; a list of [T_i, I] gives a list of [T_i, O]."""
    a, b = rows(2), rows(3) * 10
    async with sum_server() as server, AsyncClient(server.target) as client:
        whole = await client.infer("sum", np.stack([b, b]), lengths=np.array([2, 3]))
        np.testing.assert_array_equal(whole[1], np.cumsum(b, 0))
        assert not whole[0, 2:].any()
        assert not server.ragged
        ragged = await client.infer("sum", [a, b])
        assert server.ragged
        for y, x in zip(ragged, [a, b], strict=True):
            np.testing.assert_array_equal(y, np.cumsum(x, 0))
        with pytest.raises(InvalidRequest, match="lengths of its own"):
            await client.infer("sum", [a, b], lengths=[2, 3])


async def test_infer_takes_and_gives_states() -> None:
    """Asked for the final states, it returns a result with both."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        first = await client.infer("sum", rows(2)[None], return_states=True)
        second = await client.infer("sum", rows(2)[None], states=first.states)
        np.testing.assert_array_equal(first.states["s"], first.outputs[:, -1])
        np.testing.assert_array_equal(second[:, 0], first.states["s"] + rows(1))
        assert first.version == 1


async def test_models_are_described() -> None:
    """All, or one by name; an unknown one has an error of its own."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        (model,) = await client.models()
        assert model == await client.model("sum")
        assert (model.inputs[0].name, model.inputs[0].shape) == ("x", (None, None, 2))
        assert model.inputs[0].dtype == np.float32
        for call in (client.model("other"), client.infer("other", rows(1)), client.session("other")):
            with pytest.raises(ModelUnknown):
                await call


async def test_a_batch_is_sent_again_while_the_connection_is_lost() -> None:
    """Infer keeps nothing on the server, so twice does no harm; what the server says itself is not questioned."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        server.call_faults["Infer"].extend([Fault("before"), Fault("after")])
        np.testing.assert_array_equal(await client.infer("sum", rows(1)[None]), rows(1)[None])
        server.call_faults["Infer"].append(Fault("before", grpc.StatusCode.INVALID_ARGUMENT, "no"))
        with pytest.raises(InvalidRequest):
            await client.infer("sum", rows(1)[None])
        assert not server.call_faults["Infer"]


@pytest.mark.parametrize("version", [0, 1])
async def test_a_signature_that_no_longer_fits_is_asked_for_again(version: int) -> None:
    """A batch that fits the model as it is now fails here once, by what was known of it, and not for good."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        await client.infer("sum", {"x": rows(1)[None]}, version=version)
        server.input = "z"
        with pytest.raises(InvalidRequest, match=r"expected \['x'\]"):
            await client.infer("sum", {"z": rows(1)[None]}, version=version)
        np.testing.assert_array_equal(await client.infer("sum", {"z": rows(1)[None]}, version=version), rows(1)[None])


async def test_a_batch_has_its_deadline() -> None:
    """All attempts together."""
    async with sum_server() as server, AsyncClient(server.target) as client:
        server.call_faults["Infer"].append(Fault("held"))
        with pytest.raises(TimedOut):
            await client.infer("sum", rows(1)[None], timeout_s=0.05)


@pytest.mark.parametrize(
    ("first", "second"), [("GetModel", "Infer"), ("OpenSession", "GetModel"), ("GetSession", "GetModel")]
)
async def test_a_timeout_is_for_all_that_a_call_does(first: str, second: str) -> None:
    """What the first request takes of it, the second does not get."""
    clock = Clock()
    async with sum_server() as server, impatient(server, clock) as client:
        client._settings = replace(client._settings, timeout_s=60 if second == "Infer" else 5)
        server.sessions["s"] = Held()
        # Eight pauses take between 2.2 and 4.6 s.
        server.call_faults[first].extend([Fault("before", detail=Loading("not now"))] * 8)
        server.call_faults[second].extend([Fault("before", detail=Loading("not now"))] * 1000)
        began = clock.now
        with pytest.raises(Loading):
            if second == "Infer":
                await client.infer("sum", rows(1)[None], timeout_s=5)
            elif first == "OpenSession":
                await client.session("sum")
            else:
                await client.attach("s")
        assert not server.call_faults[first]
        assert 5 - PAUSE_S <= clock.now - began <= 5


@pytest.mark.parametrize("timeout_s", [-1, 0, float("nan"), float("inf"), 1e10])
async def test_a_timeout_that_makes_no_sense_is_refused(timeout_s: float) -> None:
    """Before anything is sent, so that no session comes to be in doubt."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        for call in (
            session.step(rows(1), timeout_s=timeout_s),
            client.step_many({session: rows(1)}, timeout_s=timeout_s),
            client.infer("sum", rows(1)[None], timeout_s=timeout_s),
            session.settle(timeout_s=timeout_s),
            session.close(timeout_s=timeout_s),
        ):
            with pytest.raises(
                InvalidRequest, match=f"timeout_s is {timeout_s}; expected more than 0 and up to 1e\\+09"
            ):
                await call
        assert not server.chunks
        assert (session.in_doubt, session.position) == (False, 0)


async def test_the_longest_timeout_works() -> None:
    """On the stream and off it."""
    async with sum_server() as server, AsyncClient(server.target, timeout_s=1e9) as client:
        session = await client.session("sum")
        np.testing.assert_array_equal(await session.step(rows(1)), rows(1))
        await session.close(timeout_s=1e9)


@pytest.mark.parametrize(("ours", "servers", "limit"), [(1000, 0, 1000), (2000, 1000, 1000), (1000, 2000, 1000)])
async def test_a_request_larger_than_a_message_is_refused_here(ours: int, servers: int, limit: int) -> None:
    """By whichever limit is smaller, before it is sent; and not as if the server were full."""
    async with sum_server(servers) as server, AsyncClient(server.target, max_message_bytes=ours) as client:
        with pytest.raises(InvalidRequest, match=rf"a request of 8\d\d\d bytes does not fit into a message of {limit}"):
            await client.infer("sum", rows(1000)[None])
        assert "Infer" not in server.calls


async def test_what_comes_back_cannot_be_written() -> None:
    """Outputs and states look at the message's bytes, as the docstrings say."""
    async with sum_server() as server, AsyncClient(server.target) as client, client.session("sum") as session:
        result = await client.infer("sum", rows(1)[None], return_states=True)
        (ragged,) = await client.infer("sum", [rows(1)])
        for array in (result.outputs, result.states["s"], ragged, await session.step(rows(1))):
            assert not array.flags.writeable


async def test_the_key_travels_with_every_call() -> None:
    """Unary calls and the stream."""
    async with sum_server() as server, AsyncClient(server.target, key="a secret") as client:
        session = await client.session("sum")
        assert server.metadata["conveyor-key"] == "a secret"
        server.metadata = {}
        await session.step(rows(1))
        assert server.metadata["conveyor-key"] == "a secret"


@pytest.mark.parametrize("key", ["", "schlüssel", "two\nlines"])
async def test_a_key_that_cannot_travel_is_refused(key: str) -> None:
    """What gRPC carries as metadata is printable ASCII."""
    with pytest.raises(InvalidRequest, match="printable ASCII"):
        AsyncClient("127.0.0.1:1", key=key)


async def test_nobody_there_is_told_after_the_reconnect_timeout() -> None:
    """With where it was tried, for how long, and the status that gRPC gave."""
    async with AsyncClient("127.0.0.1:1", reconnect_timeout_s=0.1) as client:
        with pytest.raises(
            ConnectionLost, match=r"127\.0\.0\.1:1 could not be reached for \d+\.\d s: UNAVAILABLE: .*refused"
        ):
            await client.models()


async def test_a_step_says_for_how_long_the_server_was_tried() -> None:
    """Where it stands, where the server was looked for, for how many seconds, and why in vain."""
    async with sum_server() as server, impatient(server, reconnect_timeout_s=20) as client:
        session = await client.session("sum")
        server.chunk_faults.extend([Fault("before", text="Socket closed")] * 100)
        told = rf"not known: {server.target} could not be reached for (19|20)\.\d s: UNAVAILABLE: Socket closed"
        with pytest.raises(ConnectionLost, match=told):
            await session.step(rows(1))


async def test_closing_the_client_ends_what_waits() -> None:
    """A step and a call under way end with an error, and later ones are refused; the sessions stay."""
    async with sum_server() as server:
        client = AsyncClient(server.target)
        session = await client.session("sum")
        step = await held_step(server, session)
        server.call_faults["ListModels"].append(Fault("held"))
        call = asyncio.create_task(client.models())
        await server.held.get()
        await client.close()
        await client.close()
        for task in (step, call):
            with pytest.raises(ConnectionLost, match="closed"):
                await task
        for late in (client.models(), session.export(), session.step(rows(1))):
            with pytest.raises(InvalidRequest, match="closed"):
                await late
        assert session.session_id in server.sessions


def test_a_client_can_be_made_before_the_event_loop() -> None:
    """The channel belongs to the loop in which it is first used."""
    clients = itertools.repeat(AsyncClient("127.0.0.1:1", reconnect_timeout_s=0), 1)

    async def use() -> None:
        for client in clients:
            with pytest.raises(ConnectionLost):
                await client.models()
            await client.close()

    asyncio.run(use())
