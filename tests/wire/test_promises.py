"""The promises, each held through both doors: cuts, repetitions, reorderings, cancellations, keys, epochs, failures.

One test is all protocols: see doors.py. What only the native door has (forks, exports, imports) is in its own tests at
the end, and takes part in its random traffic.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from models.reference import run_model
from service.chunks import runner_of
from service.server import Server
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT, SPEC, expected, weights, write_lstm
from tests.wire import native
from tests.wire.doors import DOORS, Answer, Chunk, Door, through
from tests.wire.gate import Gate, gated, until

pytestmark = pytest.mark.usefixtures("memory")

BOUND = 2e-6
ABORTED = grpc.StatusCode.ABORTED.value[0]

x = np.random.default_rng(0).standard_normal((8, INPUT)).astype(np.float32)

every_door = pytest.mark.parametrize("name", DOORS)
example = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def equal(answer: Answer, reference: NDArray[np.float64]) -> None:
    """The answer is the reference's."""
    np.testing.assert_allclose(answer.y, reference, rtol=0, atol=BOUND)


def states(server: Server, door: Door, session: str) -> list[NDArray[Any]]:
    """A session's states, each without the batch axis, as they are inside the server."""
    inside = door.find(server, session)
    return runner_of(inside).pool.read(inside.track.slot)


@dataclass
class Shadow:
    """What a session should be: everything that was applied to it, and its newest chunk."""

    session: str
    applied: list[NDArray[np.float32]] = field(default_factory=list)
    last: tuple[Chunk, Answer] | None = None

    @property
    def x(self) -> NDArray[np.float32]:
        """All steps so far."""
        return np.concatenate(self.applied) if self.applied else np.zeros((0, INPUT), np.float32)

    @property
    def position(self) -> int:
        """How many steps there should be."""
        return len(self.x)

    def next(self, x: NDArray[np.float32]) -> Chunk:
        """The next chunk."""
        return Chunk(self.session, self.position, x)

    def take(self, chunk: Chunk, answer: Answer) -> None:
        """Note a chunk as applied; its outputs must be the reference's."""
        before = self.position
        self.applied.append(chunk.x)
        self.last = (chunk, answer)
        equal(answer, expected(self.x)[before:])


class Traffic:
    """Random calls on one server through one door, each checked against its shadow."""

    def __init__(self, server: Server, door: Door, draw: np.random.Generator) -> None:
        self.server = server
        self.door = door
        self.draw = draw
        self.shadows: list[Shadow] = []

    def steps(self, longest: int = 7) -> NDArray[np.float32]:
        """Some random steps."""
        return self.draw.standard_normal((int(self.draw.integers(1, longest + 1)), INPUT)).astype(np.float32)

    def any(self) -> Shadow:
        """One of the sessions."""
        return self.shadows[int(self.draw.integers(len(self.shadows)))]

    async def open(self) -> None:
        """A new session, and its first chunk."""
        shadow = Shadow(await self.door.open())
        self.shadows.append(shadow)
        await self.go_on(shadow)

    async def go_on(self, shadow: Shadow) -> None:
        """The next chunk of a session."""
        chunk = shadow.next(self.steps())
        (answer,) = await self.door.step(chunk)
        shadow.take(chunk, answer)

    async def step(self) -> None:
        """The next chunk of one session."""
        await self.go_on(self.any())

    async def together(self) -> None:
        """The next chunks of all sessions, one behind the other."""
        chunks = [shadow.next(self.steps()) for shadow in self.shadows]
        for shadow, chunk, answer in zip(self.shadows, chunks, await self.door.step(*chunks), strict=True):
            shadow.take(chunk, answer)

    async def burst(self) -> None:
        """Several chunks of one session, not waiting for replies: applied in order."""
        shadow = self.any()
        parts = [self.steps(3) for _ in range(3)]
        starts = shadow.position + np.cumsum([0, *(len(part) for part in parts)])
        chunks = [Chunk(shadow.session, int(start), part) for start, part in zip(starts, parts, strict=False)]
        for chunk, answer in zip(chunks, await self.door.step(*chunks), strict=True):
            shadow.take(chunk, answer)

    async def repeat(self) -> None:
        """The newest chunk again: the same reply to the byte, and the state stays."""
        shadow = self.any()
        if shadow.last is not None:
            chunk, before = shadow.last
            assert await self.door.step(chunk) == [before]
            assert self.door.find(self.server, shadow.session).position == shadow.position

    async def twice(self) -> None:
        """The next chunk twice: applied once, answered twice alike."""
        shadow = self.any()
        chunk = shadow.next(self.steps())
        first, second = await self.door.step(chunk, chunk)
        shadow.take(chunk, first)
        assert first == second

    async def out_of_place(self) -> None:
        """A chunk that begins where the session is not: refused, and told where it is."""
        shadow = self.any()
        chunk = Chunk(shadow.session, int(self.draw.integers(0, shadow.position + 5)), self.steps())
        last = shadow.last and (shadow.last[0].position, len(shadow.last[0].x))
        if chunk.position != shadow.position and (chunk.position, len(chunk.x)) != last:
            (answer,) = await self.door.step(chunk)
            assert (answer.error, answer.position) == ("ABORTED", shadow.position)

    async def reorder(self) -> None:
        """Two chunks in the wrong order: the early one is refused, the right one applied."""
        shadow, first, second = self.any(), self.steps(), self.steps()
        chunk = shadow.next(first)
        early, right = await self.door.step(Chunk(shadow.session, shadow.position + len(first), second), chunk)
        assert early.error == "ABORTED"
        shadow.take(chunk, right)

    async def cancel(self) -> None:
        """A chunk in a call of its own that is cancelled at once: applied whole and once, or not at all."""
        shadow = self.any()
        chunk = shadow.next(self.steps())
        cancel = await self.door.begin(chunk)
        for _ in range(int(self.draw.integers(0, 4))):
            await asyncio.sleep(0)
        cancel()
        # Sent again it is applied now, or answered as it was then: the same to whoever sends it.
        (answer,) = await self.door.step(chunk)
        shadow.take(chunk, answer)

    async def restart(self) -> None:
        """One session from the beginning; its first chunk may be sent twice, or be cancelled and sent again."""
        shadow = self.any()
        await self.door.restart(shadow.session)
        shadow.applied, shadow.last = [], None
        chunk = shadow.next(self.steps())
        if self.draw.integers(2):
            (await self.door.begin(chunk))()
        first, second = await self.door.step(chunk, chunk)
        shadow.take(chunk, first)
        assert first == second

    async def check(self) -> None:
        """Every session's state is the one that its steps give, run whole and alone."""
        for shadow in self.shadows:
            assert self.door.find(self.server, shadow.session).position == shadow.position
            _, finals = await self.door.infer(shadow.x[None])
            for streamed, final in zip(states(self.server, self.door, shadow.session), finals, strict=True):
                np.testing.assert_allclose(streamed, final[0], rtol=0, atol=BOUND)

    async def end(self) -> None:
        """Every session ends with a last chunk, and nothing is left of it."""
        for shadow in self.shadows:
            chunk = shadow.next(self.steps())
            shadow.take(chunk, await self.door.end(chunk))
        assert len(self.server.operations.sessions) == 0
        assert self.server.repository.find("lstm").pool.taken == 0


class NativeTraffic(Traffic):
    """With what only the native door has."""

    stub: stubs.ConveyorServiceStub

    async def fork(self) -> None:
        """A second session from the state of one."""
        shadow = self.any()
        request = pb.ForkSessionRequest(session_id=shadow.session, position=shadow.position)
        fork = (await self.stub.ForkSession(request)).session
        assert fork.position == shadow.position
        self.shadows.append(Shadow(fork.session_id, list(shadow.applied)))

    async def move(self) -> None:
        """A session exported and imported under another id, and the first one closed."""
        shadow = self.any()
        state = (await self.stub.ExportSession(pb.ExportSessionRequest(session_id=shadow.session))).state
        reply = await self.stub.ImportSession(pb.ImportSessionRequest(state=state))
        closed = await self.stub.CloseSession(pb.CloseSessionRequest(session_id=shadow.session))
        assert state.position == reply.session.position == closed.position == shadow.position
        shadow.session, shadow.last = reply.session.session_id, None


ACTIONS = ["step", "together", "burst", "repeat", "twice", "out_of_place", "reorder", "cancel", "restart"]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all examples."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def server(loop: asyncio.Runner, lstm_repository: Path) -> Iterator[Server]:
    """One server for all examples."""
    stack = AsyncExitStack()
    yield loop.run(stack.enter_async_context(running(lstm_repository)))
    loop.run(stack.aclose())


async def traffic(traffic: Traffic, sessions: int, actions: list[str]) -> None:
    """Open sessions, do all that, and hold what is left against its shadow."""
    for _ in range(sessions):
        await traffic.open()
    for action in actions:
        await getattr(traffic, action)()
    await traffic.check()
    await traffic.end()


@every_door
@given(
    seed=st.integers(0, 2**32 - 1),
    sessions=st.integers(1, 4),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=25),
)
@settings(example, max_examples=40)
def test_random_traffic(
    loop: asyncio.Runner, server: Server, name: str, seed: int, sessions: int, actions: list[str]
) -> None:
    """Cut, repeated, reordered, cancelled or begun anew, a session is what its own steps make it."""

    async def run() -> None:
        async with through(name, server) as door:
            await traffic(Traffic(server, door, np.random.default_rng(seed)), sessions, actions)

    loop.run(run())


@given(
    seed=st.integers(0, 2**32 - 1),
    sessions=st.integers(1, 4),
    actions=st.lists(st.sampled_from([*ACTIONS, "fork", "fork", "move", "move"]), min_size=1, max_size=25),
)
@settings(example, max_examples=40)
def test_random_traffic_with_forks_and_moves(
    loop: asyncio.Runner, server: Server, seed: int, sessions: int, actions: list[str]
) -> None:
    """So it is where sessions are copied, and carried from one id to another."""

    async def run() -> None:
        async with through("native", server) as door, calling(server) as stub:
            with_forks = NativeTraffic(server, door, np.random.default_rng(seed))
            with_forks.stub = stub
            await traffic(with_forks, sessions, actions)

    loop.run(run())


@every_door
@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1))
@settings(example, max_examples=20)
def test_chunk_invariance(loop: asyncio.Runner, server: Server, name: str, cuts: list[int], seed: int) -> None:
    """Any way of cutting a stream gives the outputs and, to the bit, the states of any other."""

    async def run() -> None:
        x = np.random.default_rng(seed).standard_normal((sum(cuts), INPUT)).astype(np.float32)
        async with through(name, server) as door:
            ways = []
            for lengths in ([len(x)], cuts, [1] * len(x)):
                shadow = Shadow(await door.open())
                for length in lengths:
                    chunk = shadow.next(x[shadow.position : shadow.position + length])
                    (answer,) = await door.step(chunk)
                    shadow.take(chunk, answer)
                ways.append([state.tobytes() for state in states(server, door, shadow.session)])
                await door.end(shadow.next(x[:1]))
            assert ways[0] == ways[1] == ways[2]

    loop.run(run())


@every_door
async def test_parity_of_a_batch(lstm_repository: Path, name: str) -> None:
    """Outputs and final states of a ragged batch are the reference's."""
    lengths = [7, 1, 12, 4]
    x = np.random.default_rng(0).standard_normal((len(lengths), max(lengths), INPUT)).astype(np.float32)
    exact = {key: array.astype(np.float64) for key, array in weights().items()}
    reference, (final,) = run_model(SPEC, exact, x.astype(np.float64), np.array(lengths))
    async with running(lstm_repository) as server, through(name, server) as door:
        outputs, finals = await door.infer(x, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(outputs[row, :length], reference[row, :length], rtol=0, atol=BOUND)
    for given_, expected_ in zip(finals, final, strict=True):
        np.testing.assert_allclose(given_.reshape(expected_.shape), expected_, rtol=0, atol=BOUND)


@every_door
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=9), seed=st.integers(0, 2**32 - 1))
@settings(example, max_examples=20)
def test_isolation_in_a_batch(loop: asyncio.Runner, server: Server, name: str, lengths: list[int], seed: int) -> None:
    """A row of a ragged batch is what it is alone, and zeros after its length, whatever stands in its padding."""

    async def run() -> None:
        x = np.random.default_rng(seed).standard_normal((len(lengths), max(lengths), INPUT)).astype(np.float32)
        async with through(name, server) as door:
            outputs, finals = await door.infer(x, lengths)
            for row, length in enumerate(lengths):
                alone, by_itself = await door.infer(x[row : row + 1, :length])
                np.testing.assert_allclose(outputs[row, :length], alone[0], rtol=0, atol=1e-6)
                np.testing.assert_allclose(alone[0], expected(x[row, :length]), rtol=0, atol=BOUND)
                assert not outputs[row, length:].any()
                for together, single in zip(finals, by_itself, strict=True):
                    assert (together[row] == single[0]).all()

    loop.run(run())


@every_door
async def test_states_pass_from_batch_to_batch(lstm_repository: Path, name: str) -> None:
    """Final states that were asked for, given back as initial ones, go on where the first batch ended."""
    x = np.random.default_rng(0).standard_normal((3, 9, INPUT)).astype(np.float32)
    async with running(lstm_repository) as server, through(name, server) as door:
        _, finals = await door.infer(x[:, :4])
        outputs, _ = await door.infer(x[:, 4:], states=finals)
    for row in range(3):
        np.testing.assert_allclose(outputs[row], expected(x[row])[4:], rtol=0, atol=BOUND)


@every_door
async def test_an_id_is_each_keys_own(lstm_repository: Path, name: str) -> None:
    """One id is a session under each key; no key steps, restarts or ends another's, nor does a caller with none."""
    async with (
        running(lstm_repository) as server,
        through(name, server, "mine") as mine,
        through(name, server, "yours") as yours,
        through(name, server) as nobody,
    ):
        await mine.open("one")
        await mine.step(Chunk("one", 0, x[:3]))
        for other in (yours, nobody):
            (refused,) = await other.step(Chunk("one", 3, x[3:]))
            assert refused.error in ("NOT_FOUND", "INVALID_ARGUMENT")
            await other.open("one")
            equal(await other.end(Chunk("one", 0, -x)), expected(-x))
        (answer,) = await mine.step(Chunk("one", 3, x[3:]))
        equal(answer, expected(x)[3:])


@pytest.mark.parametrize("other", [name for name in DOORS if name != "native"])
async def test_one_doors_sessions_are_not_the_others(lstm_repository: Path, other: str) -> None:
    """The same id under the same key is a session through the native door, and a sequence beside it."""
    async with (
        running(lstm_repository) as server,
        through("native", server, "key") as first,
        through(other, server, "key") as door,
    ):
        await first.open("5")
        await first.step(Chunk("5", 0, x[:2]))
        (refused,) = await door.step(Chunk("5", 2, x[2:]))
        assert "must specify the START flag" in refused.text
        await door.open("5")
        (answer,) = await door.step(Chunk("5", 0, -x[:4]))
        equal(answer, expected(-x[:4]))
        (answer,) = await first.step(Chunk("5", 2, x[2:]))
        equal(answer, expected(x)[2:])


@every_door
async def test_a_chunk_held_up_since_another_life_is_refused(lstm_repository: Path, name: str) -> None:
    """It is not taken for one of the session after it began anew, though its position fits."""
    async with running(lstm_repository) as server, through(name, server) as door:
        session = await door.open()
        await door.step(Chunk(session, 0, x[:2]))
        held_up = Chunk(session, 2, x[2:4], epoch=door.find(server, session).epoch)
        await door.restart(session)
        await door.step(Chunk(session, 0, -x[:2]))
        (refused,) = await door.step(held_up)
        assert refused.error == "ABORTED"
        (answer,) = await door.step(Chunk(session, 2, -x[2:]))
        equal(answer, expected(-x)[2:])


# --- commit after success ---


@dataclass
class Held:
    """A door to a server whose engine waits to be let through, and the server's clock."""

    server: Server
    door: Door
    gate: Gate
    clock: Clock

    async def queued(self, rows: int) -> None:
        """Wait until so many rows wait behind the gate."""
        await self.gate.until_queued(self.server, rows)

    async def gone(self, session: str, row: int = 0) -> None:
        """Wait until nobody wants what is under way for a session."""

        def true() -> bool:
            inside = self.door.find(self.server, session)
            rows = [pending.block for pending in (*inside.pending.values(), *inside.orphans)]
            return all(row.unwanted for row in rows)

        await until(true)


@asynccontextmanager
async def holding(repository: Path, name: str) -> AsyncIterator[Held]:
    """Serve, with two steps applied to the session ``a`` and to the session ``b``."""
    clock = Clock()
    async with running(repository, clock) as server, through(name, server) as door:
        for session in ("a", "b"):
            await door.open(session)
            await door.step(Chunk(session, 0, x[:2]))
        with gated(server) as gate:
            yield Held(server, door, gate, clock)


async def goes_on(held: Held, session: str = "a") -> None:
    """The session is where it was: other steps than those that came to nothing follow its first two."""
    held.gate.let(100)
    (answer,) = await held.door.step(Chunk(session, 2, x[4:]))
    equal(answer, expected(np.concatenate([x[:2], x[4:]]))[2:])


@every_door
async def test_a_chunk_cancelled_while_it_runs_is_not_applied(lstm_repository: Path, name: str) -> None:
    """The run goes on, its result is thrown away, and the session is where it was."""
    async with holding(lstm_repository, name) as held:
        cancel = await held.door.begin(Chunk("a", 2, x[2:3]))
        await held.gate.entered()
        cancel()
        await held.gone("a")
        await goes_on(held)


@every_door
async def test_a_chunk_cancelled_while_it_waits_never_runs(lstm_repository: Path, name: str) -> None:
    """It costs no run, and the one that runs meanwhile is not disturbed."""
    async with holding(lstm_repository, name) as held:
        busy = asyncio.create_task(held.door.step(Chunk("b", 2, x[2:4])))
        await held.gate.entered()
        cancel = await held.door.begin(Chunk("a", 2, x[2:3]))
        await held.queued(1)
        cancel()
        await held.queued(0)
        held.gate.let(1)
        equal((await busy)[0], expected(x[:4])[2:])
        assert held.gate.rows == [1]
        await goes_on(held)


@every_door
async def test_a_first_chunk_cancelled_while_it_runs_begins_nothing_anew(lstm_repository: Path, name: str) -> None:
    """Where the first chunk of a new life comes to nothing, sent again it begins that life, and not before."""
    async with holding(lstm_repository, name) as held:
        await held.door.restart("a")
        cancel = await held.door.begin(Chunk("a", 0, x[2:3]))
        await held.gate.entered()
        cancel()
        await held.gone("a")
        held.gate.let(100)
        (answer,) = await held.door.step(Chunk("a", 0, x[4:]))
        equal(answer, expected(x[4:]))
        assert held.server.repository.find("lstm").pool.taken == 2


@every_door
async def test_a_late_chunk_never_runs(lstm_repository: Path, name: str) -> None:
    """Its deadline passes behind another run: it is told so, costs no run, and its session is where it was."""
    async with holding(lstm_repository, name) as held, through(name, held.server) as other:
        busy = asyncio.create_task(held.door.step(Chunk("b", 2, x[2:4])))
        await held.gate.entered()
        late = asyncio.create_task(other.step(Chunk("a", 2, x[2:3], timeout_us=1_000_000)))
        await held.queued(1)
        held.clock.now += 1.5
        held.gate.let(1)
        assert (await late)[0].error == "DEADLINE_EXCEEDED"
        assert not (await busy)[0].error
        assert held.gate.rows == [1]
        await goes_on(held)


@every_door
async def test_a_chunk_that_is_late_when_its_run_ends_is_not_applied(lstm_repository: Path, name: str) -> None:
    """An answer that says "too late" and a state that has not moved go together."""
    async with holding(lstm_repository, name) as held:
        late = asyncio.create_task(held.door.step(Chunk("a", 2, x[2:3], timeout_us=1_000_000)))
        await held.gate.entered()
        held.clock.now += 1.5
        held.gate.let(1)
        assert (await late)[0].error == "DEADLINE_EXCEEDED"
        await goes_on(held)


@every_door
async def test_a_run_that_fails_applies_nothing(lstm_repository: Path, name: str) -> None:
    """The caller is told INTERNAL without internals, the state has not moved, and the next run succeeds."""
    async with holding(lstm_repository, name) as held:
        held.gate.fail = RuntimeError("secret: address 0xdeadbeef")
        held.gate.let(1)
        (failed,) = await held.door.step(Chunk("a", 2, x[2:3]))
        assert failed.error == "INTERNAL"
        assert "secret" not in failed.text
        held.gate.fail = None
        await goes_on(held)


@every_door
@pytest.mark.parametrize("phase", ["queued", "running"])
async def test_a_cancelled_batch_gives_everything_back(lstm_repository: Path, name: str, phase: str) -> None:
    """A batch that is cancelled while it waits or runs frees its slots, and the next one is right."""
    async with holding(lstm_repository, name) as held:
        pool = held.server.repository.find("lstm").pool
        if phase == "queued":
            busy = asyncio.create_task(held.door.step(Chunk("b", 2, x[2:4])))
            await held.gate.entered()
        cancel = await held.door.begin_infer(np.stack([x, x, x]))
        await (held.queued(3) if phase == "queued" else held.gate.entered())
        assert pool.taken == 5
        cancel()
        await held.queued(0)
        held.gate.let(100)
        await until(lambda: pool.taken == 2)
        outputs, _ = await held.door.infer(x[None])
        np.testing.assert_allclose(outputs[0], expected(x), rtol=0, atol=BOUND)
        assert sum(held.gate.rows) == (2 if phase == "queued" else 4)
        if phase == "queued":
            await busy


# --- drain ---


@every_door
async def test_a_session_outlives_a_restart(lstm_repository: Path, tmp_path: Path, name: str) -> None:
    """In the next process it goes on, its last chunk can be sent again, and one whose model has changed is lost."""
    kept = tmp_path / "sessions"
    async with running(lstm_repository, sessions_file=kept) as server, through(name, server) as door:
        await door.open("one")
        (before,) = await door.step(Chunk("one", 0, x[:3]))
        epoch = door.find(server, "one").epoch
        await server.drain()
    async with running(lstm_repository, sessions_file=kept) as server, through(name, server) as door:
        assert await door.step(Chunk("one", 0, x[:3], epoch=epoch)) == [before]
        (answer,) = await door.step(Chunk("one", 3, x[3:], epoch=epoch))
        equal(answer, expected(x)[3:])
        await server.drain()
    write_lstm(tmp_path / "other", seed=1)
    async with running(tmp_path / "other", sessions_file=kept) as server, through(name, server) as door:
        (lost,) = await door.step(Chunk("one", 8, x))
        assert "is lost: the server was started anew without its state" in lost.text


# --- what only the native door has ---


async def test_sessions_belong_to_their_key(lstm_repository: Path) -> None:
    """One id is two sessions under two keys; neither key sees, steps, copies or ends the other's."""
    x = np.ones((1, INPUT), np.float32)
    async with running(lstm_repository) as server, calling(server) as stub:
        mine, yours = (("conveyor-key", "mine"),), (("conveyor-key", "yours"),)
        await stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"), metadata=mine)
        unknown = [
            stub.GetSession(pb.GetSessionRequest(session_id="one"), metadata=yours),
            stub.GetSession(pb.GetSessionRequest(session_id="one")),
            stub.ForkSession(pb.ForkSessionRequest(session_id="one"), metadata=yours),
            stub.ResetSession(pb.ResetSessionRequest(session_id="one"), metadata=yours),
            stub.ExportSession(pb.ExportSessionRequest(session_id="one"), metadata=yours),
            stub.CloseSession(pb.CloseSessionRequest(session_id="one"), metadata=yours),
        ]
        for call in unknown:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.NOT_FOUND
        call = stub.Stream(metadata=yours)
        await call.write(pb.StreamRequest(chunks=[native.chunk("one", 0, x)]))
        assert (await call.read()).results[0].error.reason == "session_unknown"
        call.cancel()
        await stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"), metadata=yours)
        reply = await stub.GetSession(pb.GetSessionRequest(session_id="one"), metadata=mine)
        assert reply.session.position == 0


async def test_a_copy_from_before_a_reset_is_refused(lstm_repository: Path) -> None:
    """A chunk held up on its way is not taken for one of the session after the reset, though its position fits."""
    x = np.ones((2, INPUT), np.float32)
    async with running(lstm_repository) as server, calling(server) as stub, native.streaming(stub) as caller:
        opened = (await stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"))).session
        first = native.chunk("one", 0, x)
        first.epoch = opened.epoch
        (result,) = await caller.step(first)
        assert result.steps == 2
        request = pb.ResetSessionRequest(session_id="one", epoch=opened.epoch)
        reset = (await stub.ResetSession(request)).session
        assert reset.position == 0
        assert reset.epoch not in (0, opened.epoch)
        (held_up,) = await caller.step(first)
        assert (held_up.error.reason, held_up.error.code) == ("epoch_conflict", ABORTED)
        with pytest.raises(grpc.aio.AioRpcError) as again:
            await stub.ResetSession(request)
        assert again.value.code() is grpc.StatusCode.ABORTED
        second = native.chunk("one", 0, -x)
        second.epoch = reset.epoch
        (result,) = await caller.step(second)
        np.testing.assert_allclose(native.array(result.outputs[0]), expected(-x), rtol=0, atol=BOUND)
        forked = (await stub.ForkSession(pb.ForkSessionRequest(session_id="one"))).session
        assert forked.epoch not in (0, reset.epoch)
