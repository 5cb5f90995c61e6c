"""A model at work, with a graph that adds up in the engine's place, so that runs can fail or be held.

Once with its states in this machine's memory, and once with its states on a device.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from service.errors import Cancelled, Draining, EngineFailed, Full, InvalidRequest, Late
from service.metrics import Metrics
from service.ticks.admission import Limits
from service.ticks.execution import Execution
from service.ticks.row import Block, Phase, Row, Track
from service.ticks.runner import Runner
from service.ticks.scheduler import Tick
from service.ticks.statistics import Spent
from tests.clock import Clock
from tests.sums import POISON, ResidentSums, Sums

Array = NDArray[np.generic]


LIMITS = Limits(queued_rows=20, tick_rows=16, tick_steps=1000)


class Bench:
    """A runner of the graph, and rows for it."""

    def __init__(self, graph: Sums | ResidentSums, limits: Limits = LIMITS, slots: int = 100) -> None:
        self.limits = limits
        self.slots = slots
        self.graph = graph
        self.clock = Clock()
        self.metrics = Metrics()
        self.runner = self.another()
        self.ended: list[Block] = []
        self._news = asyncio.Event()

    def another(self) -> Runner:
        """A runner of the same name and version."""
        loop = asyncio.get_running_loop()
        return Runner(
            "sums",
            1,
            self.graph,
            self.limits,
            self.slots,
            self.metrics,
            self.clock,
            loop,
            calendar=lambda: 1_800_000_000.5,
        )

    def row(self, *x: float, track: Track | None = None, position: int = 0, deadline: float | None = None) -> Block:
        """A row of those steps."""
        track = track or Track(self.runner.pool.allocate())
        return Block([Row(track, position)], len(x), [np.array([x])], self._end, deadline)

    def state(self, row: Block) -> float:
        """What the pool holds for a row."""
        (state,) = self.runner.pool.read(row.rows[0].track.slot)
        return float(state)

    async def all_ended(self, count: int) -> None:
        """Wait until so many rows have ended."""
        async with asyncio.timeout(30):
            while len(self.ended) < count:
                self._news.clear()
                await self._news.wait()

    async def run(self, *rows: Block) -> None:
        """Queue rows together, and wait until they have ended."""
        before = len(self.ended)
        self.runner.submit(rows)
        await self.all_ended(before + len(rows))

    def _end(self, row: Block) -> None:
        self.ended.append(row)
        self._news.set()

    def counted(self, name: str, **labels: str) -> float | None:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(name, {"model": "sums", "version": "1", **labels})


@pytest.fixture(params=["host", "device"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Sums | ResidentSums:
    """The graph, with its states in either memory."""
    return Sums() if request.param == "host" else ResidentSums(tmp_path)


@pytest.fixture
async def bench(graph: Sums | ResidentSums) -> AsyncIterator[Bench]:
    """A runner that has started, and is stopped in the end."""
    bench = Bench(graph)
    bench.runner.start()
    yield bench
    await bench.runner.stop(30)


def outputs(row: Block) -> list[float]:
    """The row's only output."""
    assert row.outputs is not None
    (y,) = row.outputs
    return [float(value) for value in y[0]]


async def test_rows_queued_together_run_together(bench: Bench) -> None:
    """Each gets its own outputs without padding, its state and its position move, and it ends once."""
    long, short, other = bench.row(1, 2, 3, 4), bench.row(10, 20), bench.row(5, 5, 5)
    await bench.run(long, short, other)
    assert [outputs(row) for row in (long, short, other)] == [[1, 3, 6, 10], [10, 30], [5, 10, 15]]
    assert [bench.state(row) for row in (long, short, other)] == [10, 30, 15]
    assert [row.rows[0].track.position for row in (long, short, other)] == [4, 2, 3]
    assert (bench.graph.runs[0], len(bench.ended)) == (3, 3)


async def test_the_state_goes_on_from_tick_to_tick(bench: Bench) -> None:
    """Chunks of one track, queued at once, each begin in the state that the one before left."""
    first = bench.row(1, 2)
    second, third = (
        bench.row(3, track=first.rows[0].track, position=2),
        bench.row(4, 5, track=first.rows[0].track, position=3),
    )
    await bench.run(first, second, third)
    assert [outputs(row) for row in (first, second, third)] == [[1, 3], [6], [10, 15]]
    assert bench.graph.runs == [1, 1, 1]


@pytest.mark.parametrize("poisoned", range(5))
async def test_a_row_that_the_model_cannot_take_fails_alone(bench: Bench, poisoned: int) -> None:
    """The others of its tick succeed, whatever its place in it; its own state and position have not moved."""

    def refuse(x: Array) -> None:
        if (x == POISON).any():
            raise RuntimeError("secret")

    rows = [bench.row(n + 1, n + 2) for n in range(5)]
    await bench.run(*rows)
    before = [bench.state(row) for row in rows]
    bench.graph.before = refuse
    again = [
        bench.row(
            POISON if n == poisoned else 1,
            track=row.rows[0].track,
            position=2 if row.rows[0].track.position == 2 else 0,
        )
        for n, row in enumerate(rows)
    ]
    await bench.run(*again)
    for n, row in enumerate(again):
        if n == poisoned:
            assert isinstance(row.error, EngineFailed)
            assert "secret" not in str(row.error)
            assert (row.outputs, bench.state(row), row.rows[0].track.position) == (None, before[n], 2)
        else:
            assert (row.error, outputs(row), row.rows[0].track.position) == (None, [before[n] + 1], 3)
            assert bench.state(row) == before[n] + 1


async def test_an_engine_that_always_fails_fails_every_row_and_the_runner_lives(bench: Bench) -> None:
    """Each row ends once with an error, no state moves, and when the engine works again so does everything."""

    def fail(x: Array) -> None:
        raise MemoryError("out of it")

    bench.graph.before = fail
    rows = [bench.row(1) for _ in range(7)]
    await bench.run(*rows)
    assert [type(row.error) for row in rows] == [EngineFailed] * 7
    assert [bench.state(row) for row in rows] == [0] * 7
    assert len(bench.ended) == 7
    bench.graph.before = lambda x: None
    again = [bench.row(2, track=row.rows[0].track) for row in rows]
    await bench.run(*again)
    assert [outputs(row) for row in again] == [[2]] * 7


async def test_outputs_that_are_not_as_the_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that gives too few arrays is an engine failure, found before any state has moved."""
    bench = Bench(Sums())
    bench.runner.start()
    monkeypatch.setattr(bench.graph, "run", lambda feeds: ([], []))
    row = bench.row(1)
    await bench.run(row)
    assert isinstance(row.error, EngineFailed)
    assert (bench.state(row), row.rows[0].track.position) == (0, 0)
    assert await bench.runner.stop(30)


async def test_a_row_cancelled_while_it_runs_is_not_applied(bench: Bench) -> None:
    """Its tick goes on for the others; it ends once, cancelled, with its state where it was."""
    stays, goes = bench.row(1), bench.row(2)
    told: list[Block] = []
    bench.graph.before = lambda x: told.extend(bench.runner.cancel(goes.rows))
    await bench.run(stays, goes)
    assert told == []
    assert (outputs(stays), bench.state(stays), stays.rows[0].track.position) == ([1], 1, 1)
    assert isinstance(goes.error, Cancelled)
    assert (goes.outputs, bench.state(goes), goes.rows[0].track.position) == (None, 0, 0)
    assert bench.ended.count(goes) == 1


async def test_a_row_whose_deadline_passes_while_it_runs_is_not_applied(bench: Bench) -> None:
    """The clock moves inside the run: what is late when the run ends has not happened."""
    in_time, late = bench.row(1, deadline=bench.clock.now + 10), bench.row(2, deadline=bench.clock.now + 5)

    def take_time(x: Array) -> None:
        bench.clock.now += 7

    bench.graph.before = take_time
    await bench.run(in_time, late)
    assert (outputs(in_time), bench.state(in_time)) == ([1], 1)
    assert isinstance(late.error, Late)
    assert (bench.state(late), late.rows[0].track.position) == (0, 0)


async def test_a_row_cancelled_while_it_waits_never_runs(bench: Bench) -> None:
    """Whoever cancels it is told that it has ended, and nobody is told a second time."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(x: Array) -> None:
        inside.set()
        assert go_on.wait(30)

    bench.graph.before = hold
    running, waiting, last = bench.row(1), bench.row(2), bench.row(3)
    bench.runner.submit([running])
    assert await asyncio.to_thread(inside.wait, 30)
    bench.runner.submit([waiting, last])
    assert bench.runner.queued == 2
    assert bench.runner.cancel(waiting.rows)
    go_on.set()
    await bench.all_ended(2)
    assert bench.ended == [running, last]
    assert (waiting.phase, type(waiting.error), bench.state(waiting)) == (Phase.REFUSED, Cancelled, 0)
    assert sum(bench.graph.runs) == 2


async def test_what_queues_while_a_run_is_held_shares_the_next(bench: Bench) -> None:
    """Any number of submissions, one run; over the limit of the queue the answer is immediate."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(x: Array) -> None:
        inside.set()
        assert go_on.wait(30)

    bench.graph.before = hold
    bench.runner.submit([bench.row(1)])
    assert await asyncio.to_thread(inside.wait, 30)
    for n in range(16):
        bench.runner.submit([bench.row(n)])
    assert bench.counted("conveyor_queued_rows") == 16
    with pytest.raises(Full, match="limit of 20"):
        bench.runner.submit([bench.row(0) for _ in range(5)])
    go_on.set()
    await bench.all_ended(17)
    assert bench.graph.runs == [1, 16]


async def test_a_result_that_its_owner_cannot_take_costs_the_others_nothing(bench: Bench) -> None:
    """Everyone else of the tick is told all the same, and so is the next tick."""

    def choke(row: Block) -> None:
        raise RuntimeError("full")

    bad = Block([Row(Track(bench.runner.pool.allocate()), 0)], 1, [np.ones((1, 1))], choke)
    good = bench.row(1)
    bench.runner.submit([bad, good])
    await bench.all_ended(1)
    await bench.run(bench.row(2))
    assert bad.phase is Phase.APPLIED
    assert outputs(good) == [1]


async def test_stop_finishes_the_run_and_refuses_what_waits(bench: Bench) -> None:
    """Each row ends once: the one that runs is applied, the one that waits is told, a new one is not taken."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(x: Array) -> None:
        inside.set()
        assert go_on.wait(30)

    bench.graph.before = hold
    running, waiting = bench.row(1), bench.row(2)
    bench.runner.submit([running])
    assert await asyncio.to_thread(inside.wait, 30)
    bench.runner.submit([waiting])
    stop = asyncio.create_task(bench.runner.stop(30))
    await bench.all_ended(1)
    assert isinstance(waiting.error, Draining)
    with pytest.raises(Draining):
        bench.runner.submit([bench.row(3)])
    assert not stop.done()
    go_on.set()
    await stop
    await bench.all_ended(2)
    assert (outputs(running), bench.state(waiting)) == ([1], 0)


async def test_warm_up_leaves_nothing_behind(graph: Sums | ResidentSums) -> None:
    """It runs the graph at several sizes, and every slot it took is free and in its initial state afterwards."""
    bench = Bench(graph)
    bench.graph.before = lambda x: np.copyto(x, 1)
    bench.runner.warm_up()
    assert len(bench.graph.runs) > 1
    assert bench.runner.pool.taken == 0
    rows = [bench.row(0) for _ in range(max(bench.graph.runs))]
    assert [bench.state(row) for row in rows] == [0] * len(rows)


async def test_warm_up_says_what_the_engine_says(graph: Sums | ResidentSums) -> None:
    """A graph that does not run is found before it is served."""
    bench = Bench(graph)

    def fail(x: Array) -> None:
        raise RuntimeError("no kernel")

    bench.graph.before = fail
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.runner.warm_up()


async def test_a_row_that_is_taken_out_between_its_slices_ends_once(
    graph: Sums | ResidentSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever took it out was told so then; its tick, whose rows are delivered after that, does not tell again."""
    bench = Bench(graph, Limits(queued_rows=20, tick_rows=16, tick_steps=2))
    long, other = bench.row(1, 2, 3, 4), bench.row(5)
    taken_out: list[Block] = []
    # The last thing that a tick does before its rows are told.
    monkeypatch.setattr(bench.runner.statistics, "run", lambda **_: taken_out.extend(bench.runner.cancel(long.rows)))
    bench.runner.start()
    bench.runner.submit([long])
    bench.runner.submit([other])
    await bench.all_ended(1)
    assert taken_out == [long]
    assert bench.ended == [other]
    assert await bench.runner.stop(30)


async def test_a_slice_without_room_for_its_states_fails_alone(graph: Sums | ResidentSums) -> None:
    """The others of its tick are applied, states and all; nothing of its own has moved, and no slot is lost."""
    bench = Bench(graph, Limits(queued_rows=20, tick_rows=16, tick_steps=4), slots=2)
    long, short = bench.row(1, 2, 3, 4), bench.row(5, 6)
    bench.runner.submit([long, short])
    bench.runner.start()
    await bench.all_ended(2)
    assert isinstance(long.error, Full)
    assert len(bench.graph.runs) == 1
    assert (long.rows[0].track.position, bench.state(long)) == (0, 0)
    assert (outputs(short), short.rows[0].track.position, bench.state(short)) == ([5, 11], 2, 11)
    assert bench.runner.pool.taken == 2
    assert await bench.runner.stop(30)


async def test_outputs_that_cannot_be_joined(graph: Sums | ResidentSums, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for all of a long chunk's outputs is an engine failure: nothing has moved, and no slot is lost."""
    bench = Bench(graph, Limits(queued_rows=20, tick_rows=16, tick_steps=2))

    def fail(execution: Execution, tick: Tick, outputs: object) -> None:
        if any(block.parts for block in tick.blocks):
            raise MemoryError("no room")

    monkeypatch.setattr(Execution, "_join", fail)
    long = bench.row(1, 2, 3, 4)
    bench.runner.start()
    await bench.run(long)
    assert isinstance(long.error, EngineFailed)
    assert (long.rows[0].track.position, bench.state(long), bench.runner.pool.taken) == (0, 0, 1)
    assert await bench.runner.stop(30)


async def test_stop_does_not_go_on_with_slices(graph: Sums | ResidentSums) -> None:
    """Only the slice that runs is finished; what is left then, and what waits, is told, and no slot is lost."""
    bench = Bench(graph, Limits(queued_rows=2000, tick_rows=1, tick_steps=2))
    inside, go_on = threading.Event(), threading.Event()

    def hold(x: Array) -> None:
        if len(bench.graph.runs) == 4:
            inside.set()
            assert go_on.wait(30)

    bench.graph.before = hold
    one, other = bench.row(*[1] * 100), bench.row(*[1] * 100)
    other.caller = "other"
    bench.runner.submit([one, other, bench.row(1, track=one.rows[0].track, position=100)])
    bench.runner.start()
    assert await asyncio.to_thread(inside.wait, 30)
    assert bench.runner.pool.taken == 4
    runs = len(bench.graph.runs)
    stop = asyncio.create_task(bench.runner.stop(30))
    # It refuses what waits before it waits for anything itself.
    await asyncio.sleep(0)
    if bench.runner.pool.in_flight == 1:
        # Elsewhere both of them are under way, and the third row waits for one of those.
        await bench.all_ended(1)
    go_on.set()
    assert await stop
    await bench.all_ended(3)
    assert [type(row.error) for row in bench.ended] == [Draining] * 3
    assert len(bench.graph.runs) - runs <= 1
    assert bench.runner.pool.taken == 2


async def test_only_what_ran_as_a_whole_teaches_the_pace(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick that failed and ran again in halves does not; and nobody reads the pace while it learns."""
    learned: list[tuple[int, bool]] = []
    held: Callable[[], bool] = bench.runner._wake._is_owned  # type: ignore[attr-defined]
    monkeypatch.setattr(
        bench.runner._scheduler.pace, "learn", lambda rows, steps, seconds: learned.append((rows, held()))
    )

    def refuse(x: Array) -> None:
        if (x == POISON).any():
            raise RuntimeError("no")

    bench.graph.before = refuse
    await bench.run(bench.row(1), bench.row(POISON))
    assert learned == []
    await bench.run(bench.row(1), bench.row(2))
    assert learned == [(2, True)]


async def test_a_tick_that_cannot_be_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is told, also what was refused or taken by then, and the runner lives."""

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    late, first, second = bench.row(1, deadline=bench.clock.now), bench.row(1, 2), bench.row(3)
    with monkeypatch.context() as broken:
        broken.setattr(bench.runner._scheduler, "_choose", fail)
        await bench.run(late, first, second)
    assert [type(row.error) for row in (late, first, second)] == [Late, EngineFailed, EngineFailed]
    assert bench.runner.queued == 0
    again = bench.row(2, track=first.rows[0].track)
    await bench.run(again)
    assert outputs(again) == [2]


async def test_what_is_counted(bench: Bench) -> None:
    """Steps applied, steps of padding, rows by how they ended, rows a tick."""
    # One of five is a step shorter than the others: so little is padded.
    await bench.run(*[bench.row(*range(6)) for _ in range(4)], bench.row(*range(5)), bench.row(1, deadline=0))
    assert bench.counted("conveyor_steps_total") == 29
    assert bench.counted("conveyor_padding_steps_total") == 1
    assert bench.counted("conveyor_rows_total", outcome="applied") == 5
    assert bench.counted("conveyor_rows_total", outcome="refused") == 1
    assert bench.counted("conveyor_tick_rows_sum") == 5
    assert bench.counted("conveyor_tick_seconds_count") == 1


async def test_what_is_turned_away(bench: Bench) -> None:
    """Counted apart from what was queued, and said once a minute with how many they were since."""
    bench.runner.turn_away(2)
    with capture_logs() as logs:
        bench.clock.now += 59
        with pytest.raises(InvalidRequest, match="never fit"):
            bench.runner.submit([bench.row(1) for _ in range(LIMITS.queued_rows + 1)])
        bench.runner.turn_away(3)
        assert logs == []
        bench.clock.now += 1
        bench.runner.turn_away(1)
    (said,) = logs
    assert (said["event"], said["model"], said["turned_away"]) == ("over capacity", "sums", 4)
    assert bench.counted("conveyor_rows_total", outcome="turned_away") == 6
    assert bench.counted("conveyor_rows_total", outcome="refused") == 0


async def test_what_is_measured(bench: Bench) -> None:
    """Rows applied, runs, and where the time went: each row has seen the whole of its run, each run counts once."""

    def take_time(x: Array) -> None:
        bench.clock.now += 0.25

    bench.graph.before = take_time
    await bench.run(bench.row(1), bench.row(2), bench.row(4, deadline=bench.clock.now + 0.125))
    await bench.run(bench.row(1))
    counts = bench.runner.statistics.snapshot()
    assert (counts.inference_count, counts.execution_count) == (3, 2)
    assert counts.last_inference_ms == 1_800_000_000_500
    assert counts.queue == Spent(4, 0)
    assert counts.compute_infer == Spent(4, 1_000_000_000)
    assert (counts.compute_input, counts.compute_output) == (Spent(4, 0), Spent(4, 0))
    assert {rows: runs.compute_infer for rows, runs in counts.runs.items()} == {
        1: Spent(1, 250_000_000),
        3: Spent(1, 250_000_000),
    }


async def test_what_waits_is_measured(bench: Bench) -> None:
    """A row that came while another ran has waited for the end of that."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(x: Array) -> None:
        inside.set()
        assert go_on.wait(30)

    bench.graph.before = hold
    bench.runner.submit([bench.row(1)])
    assert await asyncio.to_thread(inside.wait, 30)
    bench.runner.submit([bench.row(2), bench.row(3)])
    bench.clock.now += 2
    go_on.set()
    await bench.all_ended(3)
    assert bench.runner.statistics.snapshot().queue == Spent(3, 4_000_000_000)


async def test_runs_that_fail_are_not_measured(bench: Bench) -> None:
    """Of a tick that is cut in halves only the runs that succeeded count, each with the rows that it had."""

    def refuse(x: Array) -> None:
        if (x == POISON).any():
            raise RuntimeError("no")

    bench.graph.before = refuse
    await bench.run(bench.row(1), bench.row(2), bench.row(3), bench.row(POISON))
    counts = bench.runner.statistics.snapshot()
    assert (counts.inference_count, counts.execution_count, list(counts.runs)) == (3, 2, [1, 2])


async def test_a_stopped_runner_is_let_go_of(bench: Bench) -> None:
    """The metrics show its queue no more, and nothing holds it or its graph."""
    runner = bench.another()
    runner.start()
    assert bench.counted("conveyor_queued_rows") == 0
    await runner.stop(30)
    assert bench.counted("conveyor_queued_rows") is None
    gone = weakref.ref(runner)
    del runner
    gc.collect()
    assert gone() is None


async def test_a_runner_that_stops_does_not_take_its_successor_along(bench: Bench) -> None:
    """Of two of one name and version the metrics show the one that began last, whichever was made or stops first."""
    later = bench.another()
    assert later.queued == 0
    later.start()
    await bench.runner.stop(30)
    assert bench.counted("conveyor_queued_rows") == 0
    await later.stop(30)
    assert bench.counted("conveyor_queued_rows") is None


@pytest.mark.parametrize("says", ["Failed to allocate memory for requested buffer of size 64", "CUDA out of memory"])
async def test_no_memory_for_so_many_rows(bench: Bench, says: str) -> None:
    """The newest sessions of the tick are refused, the others are applied, and the runner lives."""

    def fail(x: Array) -> None:
        if x.shape[1] > 2:
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {says}")

    # Slots that were given back are used again: the newest has not the highest.
    first = bench.row(1)
    rows = [bench.row(n) for n in range(2, 6)]
    bench.runner.pool.free(first.rows[0].track.slot)
    newest = bench.row(6)
    assert newest.rows[0].track.slot == first.rows[0].track.slot
    bench.graph.before = fail
    await bench.run(newest, *rows)
    assert [type(row.error) for row in (*rows, newest)] == [type(None)] * 2 + [Full] * 3
    assert "memory" in str(newest.error)
    assert [outputs(row) for row in rows[:2]] == [[2], [3]]
    assert [bench.state(row) for row in (*rows, newest)] == [2, 3, 0, 0, 0]
    assert [row.rows[0].track.position for row in (*rows, newest)] == [1, 1, 0, 0, 0]
    again = bench.row(7, track=newest.rows[0].track)
    await bench.run(again)
    assert outputs(again) == [7]


async def test_no_memory_for_a_single_row(bench: Bench) -> None:
    """It is refused, and told so; nothing has moved."""

    def fail(x: Array) -> None:
        raise RuntimeError("out of memory")

    bench.graph.before = fail
    row = bench.row(1)
    await bench.run(row)
    assert isinstance(row.error, Full)
    assert (bench.state(row), bench.runner.pool.taken) == (0, 1)


async def test_no_memory_for_a_part_of_a_block(bench: Bench) -> None:
    """Of rows that came together those of the newest sessions are refused in a block of their own."""

    def fail(x: Array) -> None:
        if x.shape[1] > 2:
            raise RuntimeError("out of memory")

    tracks = [Track(bench.runner.pool.allocate()) for _ in range(4)]
    # The newest stand first.
    block = Block([Row(track, 0) for track in reversed(tracks)], 1, [np.arange(4.0).reshape(4, 1)], bench._end)
    bench.graph.before = fail
    bench.runner.submit([block])
    await bench.all_ended(2)
    assert [row.track for row in block.rows] == [tracks[1], tracks[0]]
    assert block.outputs is not None
    assert block.outputs[0].tolist() == [[2], [3]]
    (refused,) = [other for other in bench.ended if other is not block]
    assert [row.track for row in refused.rows] == [tracks[3], tracks[2]]
    assert isinstance(refused.error, Full)
