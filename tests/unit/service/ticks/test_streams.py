"""Neighbouring ticks in three streams: what is held up holds up only what has to wait for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from service.metrics import Metrics
from service.states.resident_pool import ResidentPool
from service.ticks.admission import Limits
from service.ticks.row import Block, Row, Track
from service.ticks.runner import Runner
from tests.clock import Clock
from tests.disorder import Disorder, runs_wait_in_queues
from tests.sums import ResidentSums
from tests.unit.service.ticks.test_ticks_under_way import output, until


class Line:
    """A runner, and the device that its ticks go through.

    Attributes:
        device: which is to be told what it may do.
        runner: of sums.
        pool: its states.
        ended: the blocks that have ended, in that order.
    """

    def __init__(self, folder: Path, device: Disorder) -> None:
        self.device = device
        graph = ResidentSums(folder, self.device)
        limits = Limits(queued_rows=100, tick_rows=4, tick_steps=1000)
        loop = asyncio.get_running_loop()
        self.runner = Runner("sums", 1, graph, limits, 50, Metrics(), Clock(), loop)
        assert isinstance(self.runner.pool, ResidentPool)
        self.pool = self.runner.pool
        self.ended: list[Block] = []

    def row(self, x: float) -> Block:
        """A row of one step, of a session of its own."""
        track = Track(self.pool.allocate())
        return Block([Row(track, 0)], 1, [np.array([[x]])], self.ended.append)

    async def two_up(self, *rows: Block) -> None:
        """Start ticks, none of which may run, and wait until the input of each has gone up."""
        self.device.let(self.device.runs, 0)
        for count, row in enumerate(rows, self.done("ahead", "upload") + 1):
            self.runner.submit([row])
            await until(lambda count=count: self.done("ahead", "upload") == count)  # type: ignore[misc]

    def done(self, stream: str, kind: str) -> int:
        """How many things of a kind a stream has done."""
        return getattr(self.device, stream).done[kind]  # type: ignore[no-any-return]


@asynccontextmanager
async def line(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> AsyncIterator[Line]:
    """A runner that has started, and is stopped in the end."""
    device = Disorder(seed)
    runs_wait_in_queues(monkeypatch)
    line = Line(folder, device)
    line.runner.start()
    yield line
    line.device.let(line.device.runs, None)
    assert await line.runner.stop(30)


async def test_what_goes_up_waits_for_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of the second tick is there while the run of the first is held up."""
    async with line(tmp_path, monkeypatch) as it:
        first, second = it.row(1), it.row(2)
        await it.two_up(first, second)
        assert (it.done("runs", "run"), it.ended) == (0, [])
        it.device.let(it.device.runs, None)
        await until(lambda: it.ended == [first, second])
        assert [output(row) for row in (first, second)] == [1, 2]


async def test_what_comes_down_waits_for_no_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tick's results are told, a sequence's final states too, while the run of the second is held up."""
    async with line(tmp_path, monkeypatch) as it:
        first, second = it.row(1), it.row(2)
        first.with_states = True
        await it.two_up(first, second)
        it.device.let(it.device.runs, 1)
        await until(lambda: it.ended == [first])
        assert (output(first), [float(state) for state in first.states[0]]) == (1, [1])
        assert (it.done("runs", "run"), it.done("behind", "download")) == (1, 1)
        it.device.let(it.device.runs, None)
        await until(lambda: it.ended == [first, second])


async def test_states_that_come_and_go_wait_for_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is imported, forked and exported while two runs are held up."""
    async with line(tmp_path, monkeypatch) as it:
        first, second = it.row(1), it.row(2)
        await it.two_up(first, second)
        imported = it.pool.allocate([np.array(7.0)])
        assert [float(state) for state in it.pool.read(it.pool.allocate(imported))] == [7]
        assert it.done("runs", "run") == 0
        it.device.let(it.device.runs, None)
        await until(lambda: it.ended == [first, second])


@pytest.mark.parametrize("seed", range(8))
async def test_sessions_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Sessions of chunks of all lengths, begun, forked and looked into meanwhile: each has its own sums."""
    chance = random.Random(seed)
    async with line(tmp_path, monkeypatch, seed) as it:

        async def step(track: Track, x: list[float]) -> list[float]:
            ended: asyncio.Future[Block] = asyncio.get_running_loop().create_future()
            row = Row(track, track.position)
            it.runner.submit([Block([row], len(x), [np.array([x])], ended.set_result)])
            block = await ended
            assert block.outputs is not None
            return [float(y) for y in block.outputs[0][0]]

        async def live(begin: float, chunks: int) -> None:
            track, total = Track(it.pool.allocate([np.array(begin)] if begin else None)), begin
            for _ in range(chunks):
                x = [float(chance.randint(-9, 9)) for _ in range(chance.randint(1, 3))]
                assert await step(track, x) == [total + sum(x[: n + 1]) for n in range(len(x))]
                total += sum(x)
                if chance.random() < 0.3:
                    copy = it.pool.allocate(track.slot)
                    (state,) = await asyncio.to_thread(it.pool.read, copy)
                    assert float(state) == total
                    it.pool.free(copy)
            it.pool.free(track.slot)

        await asyncio.gather(*(live(begin, 8) for begin in range(8)))
        await asyncio.gather(*(live(begin, 4) for begin in range(20, 28)))
        assert it.pool.taken == 0
