"""Blocks of the same sessions again and again: what they have in common is kept once, and nobody can tell."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.cohort import SessionCohort
from service.server import Server
from service.session import Pending, Session
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT, expected
from tests.wire.gate import gated, until
from tests.wire.native import Caller, array, chunk, streaming
from tests.wire.test_blocks import assert_close, block, both, reasons, result, send, step

pytestmark = pytest.mark.usefixtures("memory")

Array = NDArray[Any]
IDS = ("a", "b", "c", "d", "e")

x = np.random.default_rng(0).standard_normal((5, 9, INPUT)).astype(np.float32)
"""Nine steps of five sessions."""


def cohorts(server: Server) -> list[SessionCohort]:
    """Those that there are."""
    return list(server.operations.chunks._cohorts.values())


async def together(caller: Caller, server: Server, ids: Sequence[str] = IDS) -> SessionCohort:
    """Open sessions and step them twice, by which they are a cohort: at position 2."""
    for identity in ids:
        await caller.open(session_id=identity)
    for at in range(2):
        one = await step(caller, block(ids, at, x[: len(ids), at : at + 1]))
        assert not one.errors
    (cohort,) = cohorts(server)
    return cohort


@asynccontextmanager
async def served(repository: Path, **settings: Any) -> AsyncIterator[tuple[Server, stubs.ConveyorServiceStub, Caller]]:
    """A server and a stream."""
    async with running(repository, **settings) as server, calling(server) as stub, streaming(stub) as caller:
        yield server, stub, caller


async def test_sessions_that_step_together_twice_are_a_cohort(lstm_repository: Path) -> None:
    """From the second block on; outputs are the reference's, and what is kept is counted once."""
    async with served(lstm_repository) as (server, _, caller):
        for identity in IDS:
            await caller.open(session_id=identity)
        y = []
        for at in range(9):
            one = await step(caller, block(IDS, at, x[:, at : at + 1], epochs=[0] * 5 if at % 2 else []))
            assert (one.tag, one.steps, list(one.errors)) == (7, 1, [])
            y.append(array(one.outputs[0]))
            assert len(cohorts(server)) == (at > 0)
        for n in range(5):
            assert_close(np.concatenate([part[n] for part in y]), expected(x[n]))
        assert server.operations.replies.held == y[0].nbytes
        assert not cohorts(server)[0].over


@pytest.mark.parametrize("others", ["fewer", "in another order", "several steps", "chunks"])
async def test_a_cohort_ends_when_its_sessions_step_otherwise(lstm_repository: Path, others: str) -> None:
    """Then each goes on from where it is, and they can come together again."""
    async with served(lstm_repository) as (server, _, caller):
        await together(caller, server)
        order = {"fewer": [3, 1], "in another order": [4, 3, 2, 1, 0]}.get(others, [0, 1, 2, 3, 4])
        steps = 2 if others == "several steps" else 1
        ids, part = [IDS[n] for n in order], x[order, 2 : 2 + steps]
        if others == "chunks":
            got = np.stack([array((await caller.step(chunk(IDS[n], 2, x[n, 2:3])))[0].outputs[0]) for n in range(5)])
        else:
            got = array((await step(caller, block(ids, 2, part))).outputs[0])
        assert not cohorts(server)
        for row, n in enumerate(order):
            assert_close(got[row], expected(x[n])[2 : 2 + steps])
        at = [2 + steps if n in order else 2 for n in range(5)]
        for more in range(2):
            inputs = np.stack([x[n, at[n] + more][None] for n in range(5)])
            y = array((await step(caller, block(IDS, [one + more for one in at], inputs))).outputs[0])
            for n in range(5):
                assert_close(y[n], expected(x[n])[at[n] + more : at[n] + more + 1])
        assert len(cohorts(server)) == 1


async def test_what_is_asked_of_one_session_is_its_own(lstm_repository: Path) -> None:
    """Its position, its copy, its reset, its end: each as though it had always stepped alone; the others go on."""
    async with served(lstm_repository) as (server, stub, caller):
        await together(caller, server)
        assert await caller.position("a") == 2
        assert not cohorts(server)
        for at in (2, 3):
            await step(caller, block(IDS, at, x[:, at : at + 1]))
        assert len(cohorts(server)) == 1
        await stub.ForkSession(pb.ForkSessionRequest(session_id="b", new_session_id="fork"))
        (forked,) = await caller.step(chunk("fork", 4, x[1, 4:5]))
        assert_close(array(forked.outputs[0]), expected(x[1])[4:5])
        for at in (4, 5):
            await step(caller, block(IDS, at, x[:, at : at + 1]))
        assert len(cohorts(server)) == 1
        state = (await stub.ExportSession(pb.ExportSessionRequest(session_id="c"))).state
        assert state.position == 6
        await stub.ResetSession(pb.ResetSessionRequest(session_id="d"))
        await stub.CloseSession(pb.CloseSessionRequest(session_id="e"))
        one = await step(caller, block(IDS, [6, 6, 6, 0, 6], x[:, 6:7]))
        assert reasons(one) == {4: "session_unknown"}
        y = array(one.outputs[0])
        for n in range(3):
            assert_close(y[n], expected(x[n])[6:7])
        assert_close(y[3], expected(x[3, 6:7]))


async def test_a_cohorts_block_sent_again_is_applied_once(lstm_repository: Path) -> None:
    """After its end, and while it runs: as a block, and each of its chunks alone."""
    async with served(lstm_repository) as (server, _, caller):
        await together(caller, server)
        first = await step(caller, block(IDS, 2, x[:, 2:3]))
        again = await step(caller, block(IDS, 2, x[:, 2:3]))
        assert (again.outputs, list(again.errors)) == (first.outputs, [])
        (alone,) = await caller.step(chunk("d", 2, x[3, 2:3]))
        assert alone.outputs[0].data == array(first.outputs[0])[3].tobytes()
        for at in (3, 4):
            await step(caller, block(IDS, at, x[:, at : at + 1]))
        assert len(cohorts(server)) == 1
        with gated(server) as gate:
            await send(caller, block(IDS, 5, x[:, 5:6], tag=1))
            await gate.entered()
            await send(caller, block(IDS, 5, x[:, 5:6], tag=2))
            await until(lambda: not cohorts(server))
            gate.let()
            one, two = await both(caller)
        assert one.outputs == two.outputs
        for n in range(5):
            assert_close(array(one.outputs[0])[n], expected(x[n])[5:6])
        assert await caller.position("a") == 6


async def test_the_next_block_may_come_before_the_answer(lstm_repository: Path) -> None:
    """Also behind a cohort's block that waits or runs; both are applied, in order."""
    async with served(lstm_repository) as (server, _, caller):
        await together(caller, server)
        with gated(server) as gate:
            await send(caller, block(IDS, 2, x[:, 2:3], tag=1))
            await gate.entered()
            await send(caller, block(IDS, 3, x[:, 3:4], tag=2))
            await until(lambda: not cohorts(server))
            gate.let(2)
            one, two = await both(caller)
        for n in range(5):
            whole = np.concatenate([array(one.outputs[0])[n], array(two.outputs[0])[n]])
            assert_close(whole, expected(x[n])[2:4])


@pytest.mark.parametrize("wrong", ["position", "epoch", "epochs", "value", "shape", "timeout"])
async def test_a_cohorts_chunks_fail_alone(lstm_repository: Path, wrong: str) -> None:
    """What is wrong with one is told of that one; what is wrong with the block, of the block. The others step."""
    async with served(lstm_repository) as (server, _, caller):
        await together(caller, server)
        more: dict[str, Any] = {}
        inputs, at = x[:, 2:3].copy(), [2] * 5
        if wrong == "position":
            at[1] = 7
        elif wrong == "epoch":
            more = {"epochs": [0, 9, 0, 0, 0]}
        elif wrong == "epochs":
            more = {"epochs": [0]}
        elif wrong == "value":
            inputs[1] = np.inf
        elif wrong == "shape":
            inputs = inputs[:, :, :2]
        else:
            more = {"timeout_us": -1}
        one = await step(caller, block(IDS, at, inputs, **more))
        if wrong in ("position", "epoch", "value"):
            assert list(reasons(one)) == [1]
            assert_close(array(one.outputs[0])[2], expected(x[2])[2:3])
        else:
            assert one.error.reason == "invalid_request"
        moved = 2 if one.error.reason else 3
        assert [await caller.position(identity) for identity in IDS] == [moved, 2, moved, moved, moved]


async def test_a_cohort_whose_run_fails(lstm_repository: Path) -> None:
    """The row that is to blame is told; the others are applied, and none has moved twice."""
    async with served(lstm_repository) as (server, _, caller):
        await together(caller, server)

        def choke(fed: Array) -> None:
            if (fed == 1234.5).any():
                raise RuntimeError("choked")

        with gated(server) as gate:
            gate.before = choke
            gate.let(100)
            inputs = x[:, 2:3].copy()
            inputs[2] = 1234.5
            one = await step(caller, block(IDS, 2, inputs))
        assert reasons(one) == {2: "engine_failed"}
        assert [await caller.position(identity) for identity in IDS] == [3, 3, 2, 3, 3]
        y = array((await step(caller, block(IDS, [3, 3, 2, 3, 3], x[:, 3:4]))).outputs[0])
        assert_close(y[2], expected(np.concatenate([x[2, :2], x[2, 3:4]]))[2:])
        assert_close(y[4], expected(x[4])[3:4])


@pytest.mark.parametrize("when", ["waits", "runs"])
async def test_a_late_cohort(lstm_repository: Path, when: str) -> None:
    """All of it is told, and no state has moved; it steps on."""
    clock = Clock()
    async with (
        running(lstm_repository, clock) as server,
        calling(server) as stub,
        streaming(stub) as caller,
        streaming(stub) as busy,
    ):
        cohort = await together(caller, server)
        other = await busy.open()
        with gated(server) as gate:
            if when == "waits":
                await busy.send(chunk(other, 0, x[0, :1]))
                await gate.entered()
            await send(caller, block(IDS, 2, x[:, 2:3], timeout_us=1000))
            await (gate.entered() if when == "runs" else until(lambda: cohort.block is not None))
            clock.now += 1
            gate.let(2)
            one = await result(caller)
        assert set(reasons(one).values()) == {"late"}
        assert cohort.over
        y = array((await step(caller, block(IDS, 2, x[:, 2:3]))).outputs[0])
        for n in range(5):
            assert_close(y[n], expected(x[n])[2:3])


@pytest.mark.parametrize("when", ["waits", "runs"])
async def test_a_cohort_whose_caller_goes_away(lstm_repository: Path, when: str) -> None:
    """Nothing of its block is applied, what it took is given back, and it steps on."""
    async with served(lstm_repository) as (server, stub, caller):
        cohort = await together(caller, server)
        held = server.operations.replies.held
        other = await caller.open()
        with gated(server) as gate:
            async with streaming(stub) as leaving:
                if when == "waits":
                    await caller.send(chunk(other, 0, x[0, :1]))
                    await gate.entered()
                await send(leaving, block(IDS, 2, x[:, 2:3]))
                await (gate.entered() if when == "runs" else until(lambda: cohort.block is not None))
            await until(lambda: not cohorts(server))
            gate.let(2)
            if when == "waits":
                await caller.result()
                held = server.operations.replies.held
        table = server.operations.sessions
        await until(lambda: all(table.find(b"", identity).at_rest for identity in IDS))
        assert [await caller.position(identity) for identity in IDS] == [2] * 5
        assert server.operations.replies.held == held
        y = array((await step(caller, block(IDS, 2, x[:, 2:3]))).outputs[0])
        assert_close(y[4], expected(x[4])[2:3])


async def test_a_cohort_for_which_there_is_no_room(lstm_repository: Path) -> None:
    """Each of its chunks is told so, and it stays as it is: the same block is taken later."""
    async with served(lstm_repository, max_queued_rows=5) as (server, _, caller):
        cohort = await together(caller, server)
        one, two = await caller.open(), await caller.open()
        with gated(server) as gate:
            await caller.send(chunk(one, 0, x[0, :1]))
            await gate.entered()
            await caller.send(chunk(two, 0, x[0, :1]))
            await gate.until_queued(server, 1)
            told = await step(caller, block(IDS, 2, x[:, 2:3]))
            assert reasons(told) == dict.fromkeys(range(5), "full")
            gate.let(2)
            await caller.result()
            await caller.result()
        assert cohorts(server) == [cohort]
        y = array((await step(caller, block(IDS, 2, x[:, 2:3]))).outputs[0])
        assert_close(y[3], expected(x[3])[2:3])
        assert cohorts(server) == [cohort]


async def test_steps_together_put_expiry_off(lstm_repository: Path) -> None:
    """Of each of them, and opening others does not part them; once idle for too long all have expired."""
    clock = Clock()
    async with (
        running(lstm_repository, clock, idle_timeout_s=10) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        cohort = await together(caller, server)
        for at in range(2, 5):
            clock.now += 3
            await step(caller, block(IDS, at, x[:, at : at + 1]))
            await caller.open()
        assert cohorts(server) == [cohort]
        # Longer than the timeout after they came together, and not after they were stepped.
        clock.now += 9
        assert server.operations.expire() == 2
        assert await caller.position("c") == 5
        for at in (5, 6):
            await step(caller, block(IDS, at, x[:, at : at + 1]))
        assert len(cohorts(server)) == 1
        clock.now += 10
        one = await step(caller, block(IDS, 7, x[:, 7:8]))
        assert reasons(one) == dict.fromkeys(range(5), "session_expired")
        assert server.operations.expire() == 1
        assert (len(server.operations.sessions), server.operations.replies.held) == (0, 0)
        assert not cohorts(server)


async def test_who_parted_late_holds_nobody_up(lstm_repository: Path) -> None:
    """Sessions that came to rest before others expire before them, however these ended being a cohort."""
    clock = Clock()
    async with (
        running(lstm_repository, clock, idle_timeout_s=10) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        await together(caller, server)
        clock.now += 1
        await caller.open(session_id="idle")
        clock.now += 8
        await step(caller, block(IDS, 2, x[:, 2:3]))
        await caller.position("a")
        assert not cohorts(server)
        clock.now += 2
        assert server.operations.expire() == 1
        assert sorted(one.identity for one in server.operations.sessions) == sorted(IDS)
        clock.now += 20
        assert server.operations.expire() == 5


async def test_whose_sessions_they_are_is_asked_of_a_cohort_too(lstm_repository: Path) -> None:
    """Another caller who knows the ids finds nobody there."""
    async with served(lstm_repository) as (server, stub, caller):
        await together(caller, server)
        call: Any = stub.Stream(metadata=(("conveyor-key", "another"),))
        thief = Caller(stub, call)
        assert set(reasons(await step(thief, block(IDS, 2, x[:, 2:3]))).values()) == {"session_unknown"}
        call.cancel()
        assert len(cohorts(server)) == 1


async def test_a_server_that_stops_tells_a_cohort(lstm_repository: Path) -> None:
    """What waits when the time to drain is over is refused, each chunk once."""
    async with served(lstm_repository) as (server, _, caller):
        cohort = await together(caller, server)
        other = await caller.open()
        with gated(server) as gate:
            await caller.send(chunk(other, 0, x[0, :1]))
            await gate.entered()
            await send(caller, block(IDS, 2, x[:, 2:3]))
            await until(lambda: cohort.block is not None)
            stopping = asyncio.create_task(server.repository.find("lstm").stop(30))
            await asyncio.sleep(0)
            gate.let(2)
            await stopping
            told: list[str] = []
            while len(told) < 6:
                message: Any = await caller.call.read()
                assert message is not grpc.aio.EOF
                told += [one.error.reason for one in message.results]
                told += [error.error.reason for one in message.block_results for error in one.errors]
        assert told.count("draining") == 5


@pytest.mark.usefixtures("collector_off")
async def test_a_cohort_is_gone_when_its_sessions_are(lstm_repository: Path) -> None:
    """Neither it nor they wait for the collector."""
    async with served(lstm_repository) as (server, stub, caller):
        cohort = await together(caller, server)
        gone = weakref.ref(cohort)
        del cohort
        for identity in IDS:
            await stub.CloseSession(pb.CloseSessionRequest(session_id=identity))
        await until(lambda: gone() is None)
        runner = server.repository.find("lstm")
        sessions = [one for one in gc.get_objects() if isinstance(one, Session) and one.home is runner]
        assert not sessions
        assert not [one for one in gc.get_objects() if isinstance(one, Pending) and one.session.home is runner]
        assert server.operations.replies.held == 0


@dataclass
class Life:
    """What a session has been through.

    Attributes:
        steps: its inputs that count, in their order.
        outputs: what came of each.
        last: the chunk that was applied last, where it began and what it was: it may come again.
    """

    steps: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)
    last: tuple[int, Array] | None = None

    def check(self) -> None:
        """All of it is as the reference has it."""
        if self.steps:
            assert_close(np.array(self.outputs), expected(np.array(self.steps)))


@pytest.mark.parametrize("seed", range(3))
async def test_random_traffic(lstm_repository: Path, seed: int) -> None:
    """Blocks of the same and of other sessions, chunks, repeats, copies, resets, ends: all as the reference has it."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    formed = 0
    async with served(lstm_repository) as (server, stub, caller):
        lives = {identity: Life() for identity in IDS}
        for identity in IDS:
            await caller.open(session_id=identity)

        def took(one: str, at: int, inputs: Array, outputs: Array) -> None:
            life = lives[one]
            if at < len(life.steps):
                assert outputs.tobytes() == np.array(life.outputs[at:]).tobytes()
                return
            life.steps += list(inputs)
            life.outputs += list(outputs)
            life.last = (at, inputs)

        async def send_block(ids: Sequence[str], steps: int) -> None:
            inputs = numbers.standard_normal((len(ids), steps, INPUT)).astype(np.float32)
            at = [len(lives[one].steps) for one in ids]
            for n, one in enumerate(ids):
                last = lives[one].last
                if last is not None and len(last[1]) == steps and rng.random() < 0.02:
                    at[n], inputs[n] = last
            got = await step(caller, block(ids, at, inputs))
            assert not got.errors, got
            for n, one in enumerate(ids):
                took(one, at[n], inputs[n], array(got.outputs[0])[n])

        for _ in range(100):
            kind, one = rng.random(), rng.choice(IDS)
            if kind < 0.7:
                for _ in range(rng.randrange(1, 5)):
                    await send_block(IDS, 1)
                formed += len(cohorts(server))
            elif kind < 0.8:
                await send_block(rng.sample(IDS, rng.randrange(1, 5)), rng.randrange(1, 4))
            elif kind < 0.86:
                inputs, at = numbers.standard_normal((2, INPUT)).astype(np.float32), len(lives[one].steps)
                (answer,) = await caller.step(chunk(one, at, inputs))
                took(one, at, inputs, array(answer.outputs[0]))
            elif kind < 0.9:
                told = await step(caller, block(IDS, [len(lives[each].steps) + 99 for each in IDS], x[:, :1]))
                assert set(reasons(told).values()) == {"position_conflict"}
            elif kind < 0.93:
                await stub.ResetSession(pb.ResetSessionRequest(session_id=one))
                lives[one].check()
                lives[one] = Life()
            elif kind < 0.96:
                other = rng.choice([each for each in IDS if each != one])
                await stub.CloseSession(pb.CloseSessionRequest(session_id=other))
                await stub.ForkSession(pb.ForkSessionRequest(session_id=one, new_session_id=other))
                lives[other].check()
                lives[other] = Life(list(lives[one].steps), list(lives[one].outputs))
            else:
                assert await caller.position(one) == len(lives[one].steps)
        assert formed > 20
        held = server.operations.replies.held
        sessions = list(server.operations.sessions)
        assert held == sum(one.last.size for one in sessions if one.last is not None)
        assert server.repository.find("lstm").pool.taken == len(IDS)
        for session in sessions:
            life = lives[session.identity]
            life.check()
            assert session.position == len(life.steps)
