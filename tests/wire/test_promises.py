"""The promises, held against random traffic: cuts, repetitions, reorderings, cancellations, forks, resets, exports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from tests.conftest import calling, running
from tests.graphs import INPUT, expected
from tests.wire.native import Caller, array, chunk, streaming, tensor

BOUND = 2e-6
ABORTED = grpc.StatusCode.ABORTED.value[0]


@dataclass
class Shadow:
    """What a session should be: everything that was applied to it, and its newest chunk."""

    session_id: str
    applied: list[NDArray[np.float32]] = field(default_factory=list)
    last: tuple[int, NDArray[np.float32], pb.ChunkResult] | None = None

    @property
    def x(self) -> NDArray[np.float32]:
        """All steps so far."""
        return np.concatenate(self.applied) if self.applied else np.zeros((0, INPUT), np.float32)

    @property
    def position(self) -> int:
        """How many steps there should be."""
        return len(self.x)

    def take(self, x: NDArray[np.float32], result: pb.ChunkResult) -> None:
        """Note a chunk as applied; its outputs must be the reference's."""
        assert not result.HasField("error"), result.error.message
        before = self.position
        assert (result.session_id, result.position, result.steps) == (self.session_id, before, len(x))
        self.applied.append(x)
        self.last = (before, x, result)
        np.testing.assert_allclose(array(result.outputs[0]), expected(self.x)[before:], rtol=0, atol=BOUND)


class Traffic:
    """Random calls on one server, each checked against its shadow."""

    def __init__(self, caller: Caller, draw: np.random.Generator) -> None:
        self.caller = caller
        self.draw = draw
        self.shadows: list[Shadow] = []

    def steps(self, longest: int = 7) -> NDArray[np.float32]:
        """Some random steps."""
        return self.draw.standard_normal((int(self.draw.integers(1, longest + 1)), INPUT)).astype(np.float32)

    def any(self) -> Shadow:
        """One of the sessions."""
        return self.shadows[int(self.draw.integers(len(self.shadows)))]

    async def open(self) -> None:
        """A new session."""
        self.shadows.append(Shadow(await self.caller.open()))

    async def step(self) -> None:
        """The next chunk of one session."""
        shadow, x = self.any(), self.steps()
        (result,) = await self.caller.step(chunk(shadow.session_id, shadow.position, x))
        shadow.take(x, result)

    async def together(self) -> None:
        """The next chunks of all sessions, in one message."""
        chunks = {shadow.session_id: self.steps() for shadow in self.shadows}
        results = await self.caller.step(
            *(chunk(shadow.session_id, shadow.position, chunks[shadow.session_id]) for shadow in self.shadows)
        )
        by_id = {result.session_id: result for result in results}
        for shadow in self.shadows:
            shadow.take(chunks[shadow.session_id], by_id[shadow.session_id])

    async def burst(self) -> None:
        """Several chunks of one session in one message, not waiting for replies: applied in order."""
        shadow = self.any()
        parts = [self.steps(3) for _ in range(3)]
        starts = shadow.position + np.cumsum([0, *(len(part) for part in parts)])
        results = await self.caller.step(
            *(chunk(shadow.session_id, int(start), part) for start, part in zip(starts, parts, strict=False))
        )
        for part, result in zip(parts, results, strict=True):
            shadow.take(part, result)

    async def repeat(self) -> None:
        """The newest chunk again: the same reply to the byte, and the state stays."""
        shadow = self.any()
        if shadow.last is not None:
            position, x, before = shadow.last
            (again,) = await self.caller.step(chunk(shadow.session_id, position, x))
            assert again == before
            assert await self.caller.position(shadow.session_id) == shadow.position

    async def twice(self) -> None:
        """The next chunk twice in one message: applied once, answered twice alike."""
        shadow, x = self.any(), self.steps()
        message = chunk(shadow.session_id, shadow.position, x)
        first, second = await self.caller.step(message, message)
        shadow.take(x, first)
        assert first == second

    async def out_of_place(self) -> None:
        """A chunk that begins where the session is not: refused, and told where it is."""
        shadow, x = self.any(), self.steps()
        position = int(self.draw.integers(0, shadow.position + 5))
        if position == shadow.position or (
            shadow.last is not None and (position, len(x)) == (shadow.last[0], len(shadow.last[1]))
        ):
            return
        (result,) = await self.caller.step(chunk(shadow.session_id, position, x))
        assert result.error.code == ABORTED
        assert (result.error.reason, result.error.position) == ("position_conflict", shadow.position)

    async def reorder(self) -> None:
        """Two chunks in the wrong order: the early one is refused, the right one applied."""
        shadow, first, second = self.any(), self.steps(), self.steps()
        at = shadow.position
        early, right = await self.caller.step(
            chunk(shadow.session_id, at + len(first), second), chunk(shadow.session_id, at, first)
        )
        assert early.error.reason == "position_conflict"
        shadow.take(first, right)

    async def cancel(self) -> None:
        """A chunk on a second stream that is cancelled at once: applied whole and once, or not at all."""
        shadow, x = self.any(), self.steps()
        message = chunk(shadow.session_id, shadow.position, x)
        call = self.caller.stub.Stream()
        await call.write(pb.StreamRequest(chunks=[message]))
        for _ in range(int(self.draw.integers(0, 4))):
            await asyncio.sleep(0)
        call.cancel()
        # Sent again it is applied now, or answered as it was then: the same to whoever sends it.
        (result,) = await self.caller.step(message)
        shadow.take(x, result)

    async def fork(self) -> None:
        """A second session from the state of one."""
        shadow = self.any()
        request = pb.ForkSessionRequest(session_id=shadow.session_id, position=shadow.position)
        fork = (await self.caller.stub.ForkSession(request)).session
        assert fork.position == shadow.position
        self.shadows.append(Shadow(fork.session_id, list(shadow.applied)))

    async def reset(self) -> None:
        """One session from the beginning."""
        shadow = self.any()
        await self.caller.stub.ResetSession(pb.ResetSessionRequest(session_id=shadow.session_id))
        shadow.applied, shadow.last = [], None

    async def move(self) -> None:
        """A session exported and imported under another id, and the first one closed."""
        shadow = self.any()
        state = (await self.caller.stub.ExportSession(pb.ExportSessionRequest(session_id=shadow.session_id))).state
        reply = await self.caller.stub.ImportSession(pb.ImportSessionRequest(state=state))
        closed = await self.caller.stub.CloseSession(pb.CloseSessionRequest(session_id=shadow.session_id))
        assert state.position == reply.session.position == closed.position == shadow.position
        shadow.session_id, shadow.last = reply.session.session_id, None

    async def check(self) -> None:
        """Every session's state is the one that its steps give, run whole and alone."""
        for shadow in self.shadows:
            state = (await self.caller.stub.ExportSession(pb.ExportSessionRequest(session_id=shadow.session_id))).state
            assert state.position == shadow.position
            if shadow.position:
                request = pb.InferRequest(model="lstm", inputs=[tensor(shadow.x[None])], return_states=True)
                whole = await self.caller.stub.Infer(request)
                for streamed, final in zip(state.states, whole.final_states, strict=True):
                    np.testing.assert_allclose(array(streamed), array(final)[0], rtol=0, atol=BOUND)


ACTIONS = ["step", "together", "burst", "repeat", "twice", "out_of_place", "reorder", "cancel", "fork", "reset", "move"]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all examples."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def stub(loop: asyncio.Runner, lstm_repository: Path) -> Iterator[stubs.ConveyorServiceStub]:
    """One server for all examples."""
    stack = AsyncExitStack()

    async def start() -> stubs.ConveyorServiceStub:
        server = await stack.enter_async_context(running(lstm_repository))
        return await stack.enter_async_context(calling(server))

    yield loop.run(start())
    loop.run(stack.aclose())


@given(
    seed=st.integers(0, 2**32 - 1),
    sessions=st.integers(1, 4),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=25),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_traffic(
    loop: asyncio.Runner, stub: stubs.ConveyorServiceStub, seed: int, sessions: int, actions: list[str]
) -> None:
    """Cut, repeated, reordered, cancelled, forked or moved, a session is what its own steps make it."""

    async def example() -> None:
        async with streaming(stub) as caller:
            traffic = Traffic(caller, np.random.default_rng(seed))
            for _ in range(sessions):
                await traffic.open()
            for action in actions:
                await getattr(traffic, action)()
            await traffic.check()
            for shadow in traffic.shadows:
                await stub.CloseSession(pb.CloseSessionRequest(session_id=shadow.session_id))

    loop.run(example())


@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunk_invariance(loop: asyncio.Runner, stub: stubs.ConveyorServiceStub, cuts: list[int], seed: int) -> None:
    """Any way of cutting a stream gives the outputs and, to the bit, the states of any other."""

    async def example() -> None:
        x = np.random.default_rng(seed).standard_normal((sum(cuts), INPUT)).astype(np.float32)
        async with streaming(stub) as caller:
            states = []
            for lengths in ([len(x)], cuts, [1] * len(x)):
                session_id, position, outputs = await caller.open(), 0, []
                for length in lengths:
                    part = x[position : position + length]
                    (result,) = await caller.step(chunk(session_id, position, part))
                    outputs.append(array(result.outputs[0]))
                    position += length
                np.testing.assert_allclose(np.concatenate(outputs), expected(x), rtol=0, atol=BOUND)
                exported = await stub.ExportSession(pb.ExportSessionRequest(session_id=session_id))
                states.append([state.data for state in exported.state.states])
            assert states[0] == states[1] == states[2]

    loop.run(example())


@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_isolation_in_a_batch(
    loop: asyncio.Runner, stub: stubs.ConveyorServiceStub, lengths: list[int], seed: int
) -> None:
    """A row of a ragged batch is what it is alone, and zeros after its length, whatever stands in its padding."""

    async def example() -> None:
        x = np.random.default_rng(seed).standard_normal((len(lengths), max(lengths), INPUT)).astype(np.float32)
        request = pb.InferRequest(model="lstm", inputs=[tensor(x)], lengths=lengths, return_states=True)
        reply = await stub.Infer(request)
        outputs = array(reply.outputs[0])
        for row, length in enumerate(lengths):
            alone = await stub.Infer(
                pb.InferRequest(model="lstm", inputs=[tensor(x[row : row + 1, :length])], return_states=True)
            )
            np.testing.assert_allclose(outputs[row, :length], array(alone.outputs[0])[0], rtol=0, atol=1e-6)
            assert not outputs[row, length:].any()
            for together, by_itself in zip(reply.final_states, alone.final_states, strict=True):
                assert (array(together)[row] == array(by_itself)[0]).all()

    loop.run(example())


async def test_states_pass_from_batch_to_batch(lstm_repository: Path) -> None:
    """Final states that were asked for, given back as initial ones, go on where the first batch ended."""
    x = np.random.default_rng(0).standard_normal((3, 9, INPUT)).astype(np.float32)
    async with running(lstm_repository) as server, calling(server) as stub:
        first = await stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(x[:, :4])], return_states=True))
        second = await stub.Infer(
            pb.InferRequest(model="lstm", inputs=[tensor(x[:, 4:])], initial_states=first.final_states)
        )
    for row in range(3):
        np.testing.assert_allclose(array(second.outputs[0])[row], expected(x[row])[4:], rtol=0, atol=BOUND)
    assert not second.final_states


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
        await call.write(pb.StreamRequest(chunks=[chunk("one", 0, x)]))
        assert (await call.read()).results[0].error.reason == "session_unknown"
        call.cancel()
        await stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"), metadata=yours)
        reply = await stub.GetSession(pb.GetSessionRequest(session_id="one"), metadata=mine)
        assert reply.session.position == 0


async def test_a_copy_from_before_a_reset_is_refused(lstm_repository: Path) -> None:
    """A chunk held up on its way is not taken for one of the session after the reset, though its position fits."""
    x = np.ones((2, INPUT), np.float32)
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        opened = (await stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"))).session
        first = chunk("one", 0, x)
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
        second = chunk("one", 0, -x)
        second.epoch = reset.epoch
        (result,) = await caller.step(second)
        np.testing.assert_allclose(array(result.outputs[0]), expected(-x), rtol=0, atol=BOUND)
        forked = (await stub.ForkSession(pb.ForkSessionRequest(session_id="one"))).session
        assert forked.epoch not in (0, reset.epoch)
