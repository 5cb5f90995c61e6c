"""Ticks that are under way at once, on a device whose runs end when the test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import EngineFailed
from service.metrics import Metrics
from service.states.device import HostDevice, HostStream, Mark
from service.states.resident_pool import ResidentPool
from service.ticks.admission import Limits
from service.ticks.row import Block, Row, Track
from service.ticks.runner import Runner
from tests.clock import Clock
from tests.sums import ResidentSums


class Held:
    """A mark that is reached when the test says so; where the device fails it is never, as an event of CUDA's."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._reached = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has been."""
        return self._reached.is_set() and self.error is None

    def wait(self) -> None:
        """Wait until it is."""
        assert self._reached.wait(30)
        if self.error is not None:
            raise self.error

    def reach(self, error: Exception | None = None) -> None:
        """Let it be reached, or say why it never is."""
        self.error = error
        self._reached.set()


class Slow(HostStream):
    """A stream whose marks wait for the test, once it is told to."""

    def __init__(self) -> None:
        self.holds = False
        self.held: list[Held] = []

    def mark(self) -> Mark:
        """Mark this moment."""
        if not self.holds:
            return super().mark()
        self.held.append(Held())
        return self.held[-1]


class Bench:
    """A runner on a slow device."""

    def __init__(self, folder: Path) -> None:
        self.stream = Slow()
        device = HostDevice()
        device.ahead = device.runs = device.behind = self.stream
        self.graph = ResidentSums(folder, device)
        self.clock = Clock()
        self.metrics = Metrics()
        limits = Limits(queued_rows=100, tick_rows=4, tick_steps=1000)
        loop = asyncio.get_running_loop()
        self.runner = Runner("sums", 1, self.graph, limits, 50, self.metrics, self.clock, loop)
        assert isinstance(self.runner.pool, ResidentPool)
        self.pool = self.runner.pool
        self.places = self.pool.free_places
        self.ended: list[Block] = []
        self.looks = 0
        over = self.runner._over

        def look(flight: Any) -> bool:
            self.looks += 1
            return over(flight)

        self.runner._over = look  # type: ignore[method-assign]

    def row(self, x: float, track: Track | None = None, position: int = 0) -> Block:
        """A row of one step."""
        track = track or Track(self.runner.pool.allocate())
        return Block([Row(track, position)], 1, [np.array([[x]])], self.ended.append)

    def state(self, row: Block) -> float:
        """What the pool holds for a row."""
        holds, self.stream.holds = self.stream.holds, False
        (state,) = self.runner.pool.read(row.rows[0].track.slot)
        self.stream.holds = holds
        return float(state)

    async def until_started(self, ticks: int) -> None:
        """Wait until so many ticks have been started."""
        await until(lambda: len(self.stream.held) >= ticks)

    async def submit_in_vain(self, row: Block) -> None:
        """Queue a row, and wait until the runner has seen it and started nothing."""
        ticks, looks = len(self.stream.held), self.looks
        self.runner.submit([row])
        await until(lambda: self.looks > looks)
        assert len(self.stream.held) == ticks

    async def until_ended(self, *rows: Block) -> None:
        """Wait until those rows, and no others, have ended in that order."""
        await until(lambda: len(self.ended) >= len(rows))
        assert self.ended == list(rows)


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop go on until something holds."""
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110  what is waited for lies in the engine's thread, which tells nobody
            await asyncio.sleep(0.001)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A runner that has started on a device that holds, and is stopped in the end."""
    bench = Bench(tmp_path)
    bench.runner.start()
    bench.stream.holds = True
    yield bench
    bench.stream.holds = False
    for held in bench.stream.held:
        held.reach()
    assert await bench.runner.stop(30)


def output(row: Block) -> float:
    """The row's only output."""
    assert row.outputs is not None
    return float(row.outputs[0][0, 0])


async def test_as_much_as_runs_is_started_meanwhile(bench: Bench) -> None:
    """Two ticks are under way; a third waits; results of the first are told while the second runs."""
    first, second, third = bench.row(1), bench.row(2), bench.row(3)
    for count, row in enumerate((first, second), start=1):
        bench.runner.submit([row])
        await bench.until_started(count)
    bench.runner.submit([third])
    assert (bench.ended, bench.runner.queued) == ([], 1)
    bench.stream.held[0].reach()
    await bench.until_ended(first)
    await bench.until_started(3)
    bench.stream.held[1].reach()
    bench.stream.held[2].reach()
    await bench.until_ended(first, second, third)
    assert [output(row) for row in (first, second, third)] == [1, 2, 3]
    assert bench.graph.runs == [1, 1, 1]


async def test_fewer_than_run_wait_for_more(bench: Bench) -> None:
    """A tick of two rows is not followed by one of a single row: another comes, and they run together."""
    running = [bench.row(1), bench.row(2)]
    bench.runner.submit(running)
    await bench.until_started(1)
    waiting = [bench.row(3), bench.row(4)]
    await bench.submit_in_vain(waiting[0])
    bench.runner.submit(waiting[1:])
    await bench.until_started(2)
    for held in bench.stream.held:
        held.reach()
    await bench.until_ended(*running, *waiting)
    assert bench.graph.runs == [2, 2]


async def test_what_waits_runs_when_nothing_else_does(bench: Bench) -> None:
    """Fewer rows than run are started as soon as those have ended, without anything else coming."""
    running = [bench.row(1), bench.row(2)]
    bench.runner.submit(running)
    await bench.until_started(1)
    waiting = bench.row(3)
    await bench.submit_in_vain(waiting)
    bench.stream.held[0].reach()
    await bench.until_started(2)
    bench.stream.held[1].reach()
    await bench.until_ended(*running, waiting)


async def test_a_session_is_in_one_tick_at_a_time(bench: Bench) -> None:
    """Its next chunk is started when the one before has ended, on the state that it left."""
    first = bench.row(1)
    track = first.rows[0].track
    second = bench.row(2, track, 1)
    bench.runner.submit([first])
    await bench.until_started(1)
    await bench.submit_in_vain(second)
    bench.stream.held[0].reach()
    await bench.until_started(2)
    bench.stream.held[1].reach()
    await bench.until_ended(first, second)
    assert (output(second), bench.state(second), track.position) == (3, 3, 2)


async def test_a_run_that_fails_on_its_way_leaves_the_next_alone(bench: Bench) -> None:
    """Its rows run again, each alone; the tick that was under way beside it is applied."""
    first, second = [bench.row(1), bench.row(2)], [bench.row(3), bench.row(4)]
    for count, rows in enumerate((first, second), start=1):
        bench.runner.submit(rows)
        await bench.until_started(count)
    bench.stream.held[0].reach(RuntimeError("the device stumbled"))
    # Before its memory is used again, whatever it had begun is waited for.
    await bench.until_started(3)
    bench.stream.held[2].reach()
    await bench.until_started(4)
    bench.stream.held[3].reach()
    await bench.until_started(5)
    bench.stream.held[4].reach(RuntimeError("the device stumbled"))
    await bench.until_started(6)
    bench.stream.held[5].reach()
    bench.stream.held[1].reach()
    await bench.until_ended(*first, *second)
    assert [type(row.error) for row in (*first, *second)] == [type(None), EngineFailed, type(None), type(None)]
    assert [bench.state(row) for row in (*first, *second)] == [1, 0, 3, 4]
    # Every place that a tick had taken is back but for those of the states that moved.
    assert bench.pool.free_places == bench.places - 3


async def test_a_run_that_fails_alone_under_way_ends(bench: Bench) -> None:
    """Its mark is never reached: nothing else comes, and its row is refused all the same."""
    row = bench.row(1)
    bench.runner.submit([row])
    await bench.until_started(1)
    await until(lambda: bench.looks > 0)
    bench.stream.held[0].reach(RuntimeError("the device stumbled"))
    await bench.until_started(2)
    bench.stream.held[1].reach()
    await bench.until_ended(row)
    assert (type(row.error), bench.state(row)) == (EngineFailed, 0)


async def test_memory_that_a_failed_device_may_work_on_is_not_used_again(bench: Bench) -> None:
    """Each tick that could not be waited for takes its memory with it; without any, rows are refused at once."""
    rows = [bench.row(1), bench.row(2), bench.row(3)]
    for count, row in enumerate(rows[:2]):
        bench.runner.submit([row])
        for mark in (2 * count, 2 * count + 1):
            await bench.until_started(mark + 1)
            bench.stream.held[mark].reach(RuntimeError("the device is gone"))
        await bench.until_ended(*rows[: count + 1])
    bench.runner.submit(rows[2:])
    await bench.until_ended(*rows)
    assert [type(row.error) for row in rows] == [EngineFailed] * 3
    assert len(bench.stream.held) == 4
    assert bench.pool.free_places == bench.places


async def test_the_states_of_a_batch_are_waited_for_once(bench: Bench) -> None:
    """In the engine's thread: the event loop goes on, and each sequence has its own when it ends."""
    loop_thread = threading.current_thread()
    waited: list[threading.Thread] = []

    class Told(Held):
        def wait(self) -> None:
            waited.append(threading.current_thread())
            super().wait()

    rows = [bench.row(x) for x in (1, 2, 3)]
    for row in rows:
        row.with_states = True
        row.scratch = [row.rows[0].track.slot]
    bench.runner.submit(rows)
    await bench.until_started(1)
    bench.stream.mark = lambda: bench.stream.held.append(Told()) or bench.stream.held[-1]  # type: ignore[func-returns-value, method-assign]
    bench.stream.held[0].reach()
    await bench.until_started(2)
    assert bench.ended == []
    bench.stream.held[1].reach()
    await bench.until_ended(*rows)
    assert [[float(state) for state in row.states[0]] for row in rows] == [[1], [2], [3]]
    assert len(waited) == 1
    assert loop_thread not in waited


async def test_states_that_cannot_be_read_end_their_batch(bench: Bench) -> None:
    """With an error; the engine's thread goes on."""
    lost, other = bench.row(1), bench.row(2)
    lost.with_states = True
    bench.runner.submit([lost])
    await bench.until_started(1)
    bench.stream.held[0].reach()
    await bench.until_started(2)
    bench.stream.held[1].reach(RuntimeError("the device stumbled"))
    await bench.until_ended(lost)
    assert (type(lost.error), lost.states) == (EngineFailed, ())
    bench.runner.submit([other])
    await bench.until_started(3)
    bench.stream.held[2].reach()
    await bench.until_ended(lost, other)
    assert output(other) == 2


async def test_a_row_that_is_cancelled_under_way_is_not_applied(bench: Bench) -> None:
    """Nothing has moved: its state is where it was."""
    first, second = bench.row(1), bench.row(2)
    for count, row in enumerate((first, second), start=1):
        bench.runner.submit([row])
        await bench.until_started(count)
    bench.runner.cancel(first.rows)
    for held in bench.stream.held:
        held.reach()
    await bench.until_ended(first, second)
    assert (first.outputs, bench.state(first), first.rows[0].track.position) == (None, 0, 0)
    assert output(second) == 2


async def test_stop_ends_what_is_under_way(bench: Bench) -> None:
    """Both ticks are applied and told, then the thread ends."""
    first, second = bench.row(1), bench.row(2)
    for count, row in enumerate((first, second), start=1):
        bench.runner.submit([row])
        await bench.until_started(count)
    stop = asyncio.create_task(bench.runner.stop(30))
    await until(lambda: bench.runner._stopping)
    assert not stop.done()
    for held in bench.stream.held:
        held.reach()
    assert await stop
    await bench.until_ended(first, second)
    assert [bench.state(row) for row in (first, second)] == [1, 2]


async def test_time_is_counted_once(bench: Bench) -> None:
    """A tick that was started while another ran has taken the time since that one ended."""
    learned: list[float] = []
    bench.runner._scheduler.pace.learn = lambda rows, steps, seconds: learned.append(seconds)  # type: ignore[method-assign]
    first, second = bench.row(1), bench.row(2)
    for count, row in enumerate((first, second), start=1):
        bench.runner.submit([row])
        await bench.until_started(count)
    bench.clock.now += 5
    bench.stream.held[0].reach()
    await bench.until_ended(first)
    bench.clock.now += 2
    bench.stream.held[1].reach()
    await bench.until_ended(first, second)
    assert learned == [5, 2]
