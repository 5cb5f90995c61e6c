"""What blocks must not do: hold others up, the event loop or memory; and no message that its client would not take."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from conveyor.v1 import conveyor_pb2 as pb
from service.server import Server
from service.ticks.row import Block
from service.wire import flow
from service.wire.streaming import Stream
from tests.conftest import calling, running
from tests.graphs import INPUT
from tests.wire.gate import gated, until
from tests.wire.native import Caller, chunk, streaming, tensor

x = np.random.default_rng(0).standard_normal((5, 9, INPUT)).astype(np.float32)


def block(sessions: list[str], at: int, steps: int = 1, tag: int = 7) -> pb.Block:
    """The next steps of some sessions."""
    inputs = np.resize(x, (len(sessions), steps, INPUT))
    return pb.Block(tag=tag, session_ids=sessions, positions=[at] * len(sessions), inputs=[tensor(inputs)])


@pytest.fixture
async def house(lstm_repository: Path) -> AsyncIterator[tuple[Server, Caller]]:
    """A server, and a stream to it."""
    async with running(lstm_repository) as server, calling(server) as stub, streaming(stub) as caller:
        yield server, caller


async def test_no_session_of_a_block_waits_for_another(house: tuple[Server, Caller]) -> None:
    """One whose earlier chunk runs still comes later; the others are applied meanwhile. The answer waits for all."""
    server, caller = house
    sessions = [await caller.open() for _ in range(3)]
    table = server.operations.sessions
    with gated(server) as gate:
        await caller.send(chunk(sessions[1], 0, x[1, :1]))
        await gate.entered()
        await caller.call.write(
            pb.StreamRequest(
                blocks=[pb.Block(tag=1, session_ids=sessions, positions=[0, 1, 0], inputs=[tensor(x[:3, :1])])]
            )
        )
        await until(lambda: len(table.find(b"", sessions[1]).pending) == 2)
        blocks = {session: table.find(b"", session).newest.block for session in sessions}
        assert blocks[sessions[0]] is blocks[sessions[2]] is not blocks[sessions[1]]
        gate.let(1)
        assert (await caller.result()).steps == 1
        gate.let(2)
        response = await caller.call.read()
        assert isinstance(response, pb.StreamResponse)
        assert [(one.tag, len(one.errors)) for one in response.block_results] == [(1, 0)]


async def test_results_that_are_large_go_alone(house: tuple[Server, Caller]) -> None:
    """Together they would be more than a client takes that takes each of them."""
    _, caller = house
    sessions = [await caller.open() for _ in range(400)]
    # Each of the results holds some 0.6 MB, and both are there at once: they are repeated.
    asked = pb.StreamRequest(blocks=[block(sessions[:200], 0, 200, 1), block(sessions[200:], 0, 200, 2)])
    for _ in range(2):
        await caller.call.write(asked)
        tags: list[int] = []
        while len(tags) < 2:
            response = await caller.call.read()
            assert isinstance(response, pb.StreamResponse)
            assert len(response.block_results) == 1 or response.ByteSize() < 1 << 20
            tags += [one.tag for one in response.block_results]


async def test_a_flood_of_blocks_lets_others_have_their_turn(
    house: tuple[Server, Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of a message is answered at once: once its time is over, others come before its next block."""
    _, caller = house
    monkeypatch.setattr(flow, "_LONG_S", 0.0)
    accept, turns, taken_in, ended = Stream.accept, 0, list[int](), False

    def accept_and_note(stream: Stream, part: pb.Chunk | pb.Block) -> None:
        taken_in.append(turns)
        accept(stream, part)

    async def count() -> None:
        nonlocal turns
        while not ended:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Stream, "accept", accept_and_note)
    counting = asyncio.create_task(count())
    names = [f"nobody-{number}" for number in range(50)]
    await caller.call.write(pb.StreamRequest(blocks=[block(names, 0, tag=number) for number in range(40)]))
    count_answered = 0
    while count_answered < 40:
        response = await caller.call.read()
        assert isinstance(response, pb.StreamResponse)
        count_answered += len(response.block_results)
    ended = True
    await counting
    assert len(set(taken_in)) == 40


@pytest.mark.parametrize("delay_us", [0, 600_000_000])
async def test_chunks_wait_for_others_where_they_are_told_to(lstm_repository: Path, delay_us: int) -> None:
    """--max-queue-delay-us: an idle engine waits for as long, or until the tick is full, and runs them together."""
    async with (
        running(lstm_repository, max_queue_delay_us=delay_us, max_tick_rows=2) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        sessions = [await caller.open() for _ in range(2)]
        with gated(server) as gate:
            gate.let(2)
            await caller.send(chunk(sessions[0], 0, x[0, :1]))
            await until(lambda: server.repository.find("lstm").queued == 1 if delay_us else gate.rows == [1])
            await caller.send(chunk(sessions[1], 0, x[1, :1]))
            await until(lambda: gate.rows == ([2] if delay_us else [1, 1]))


async def test_what_is_refused_holds_nothing(lstm_repository: Path) -> None:
    """Nor do rows that hold NaN: memory comes back without the collector."""
    async with (
        running(lstm_repository, max_queued_rows=4) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        sessions = [await caller.open() for _ in range(5)]
        bad = block(sessions[:2], 0)
        bad.inputs[0].data = np.array([[[np.nan] * INPUT]] * 2, "<f4").tobytes()
        gc.collect()
        gc.disable()
        try:
            before = sum(isinstance(one, Block) for one in gc.get_objects())
            for _ in range(5):
                await caller.call.write(pb.StreamRequest(blocks=[block(sessions, 0), bad]))
                for _ in range(2):
                    response = await caller.call.read()
                    assert isinstance(response, pb.StreamResponse)
                    if len(response.block_results) == 2:
                        break
            assert sum(isinstance(one, Block) for one in gc.get_objects()) <= before
        finally:
            gc.enable()
        assert server.operations.replies.held == 0


async def test_an_engine_that_rests_holds_nothing(house: tuple[Server, Caller]) -> None:
    """Of its last tick: no block, and so no arrays, while nobody asks for more."""
    server, caller = house
    sessions = [await caller.open() for _ in range(3)]
    await caller.call.write(pb.StreamRequest(blocks=[block(sessions, 0)]))
    await caller.call.read()
    await until(lambda: all(server.operations.sessions.find(b"", one).at_rest for one in sessions))
    tracks = {server.operations.sessions.find(b"", one).track for one in sessions}
    gc.collect()

    def held() -> list[Block]:
        blocks = [one for one in gc.get_objects() if isinstance(one, Block)]
        return [one for one in blocks if any(row.track in tracks for row in one.rows)]

    await until(lambda: not held())
