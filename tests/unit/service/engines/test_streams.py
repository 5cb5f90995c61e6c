"""Ticks, forks and copies in three streams, in whatever order their events leave open: the numbers are always right.

Each seed is another order. States and outputs are held, to the bit, against those of the same file with states that
come and go, so that whatever overtakes what it should have followed is seen.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engines.engine import Engine
from service.engines.resident_engine import ResidentEngine
from service.engines.resident_workspace import ResidentWorkspace
from service.engines.stepping import StepByStep
from service.graphs.graph import Graph
from service.states.resident_pool import Moves, ResidentPool
from service.ticks.execution import Execution
from service.ticks.row import Block, Row, Track
from service.ticks.scheduler import Tick
from tests.disorder import Disorder, runs_wait_in_queues
from tests.graphs import write_lstm
from tests.unit.service.engines.test_resident_engine import Array, Arrays, carries, equal, feeds, one_step, uncounted
from tests.unit.service.graphs.test_capture import Quick

SEEDS = range(12)
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Graph]]] = {
    "operator": (write_lstm, Engine),
    "one step a run": (one_step, lambda path: StepByStep(Engine(path))),
}


@dataclass
class Flight:
    """A tick under way.

    Attributes:
        slots: of its rows.
        lengths: of its rows; None where all are as long.
        workspace: its arrays.
        outputs: what should come out.
        states: what should be the states after it.
    """

    slots: list[int]
    lengths: list[int] | None
    workspace: ResidentWorkspace
    outputs: Any
    states: Any


class Life:
    """Slots that are taken, copied, reset, run and given back, and what each should hold.

    Args:
        engine: whose pool and runs are looked at.
        plain: the same graph, with states that come and go.
        chance: what happens next.
    """

    def __init__(self, engine: ResidentEngine, plain: Graph, chance: random.Random) -> None:
        self.engine = engine
        self.plain = plain
        self.chance = chance
        self.manifest = plain.manifest
        self.pool: ResidentPool = engine.pool(12, 4, uncounted)
        self.pool.settle_in()
        self.should: dict[int, list[Array]] = {}
        self.under_way: deque[Flight] = deque()

    @property
    def idle(self) -> list[int]:
        """The slots that no tick under way has."""
        busy = {slot for flight in self.under_way for slot in flight.slots}
        return [slot for slot in self.should if slot not in busy]

    def happen(self, number: int) -> None:
        """Do one thing."""
        idle, chance = self.idle, self.chance
        match chance.choice(["open", "fork", "close", "reset", "read", *["start", "end"] * 4]):
            case "open" if len(self.should) < 12:
                given = None if chance.random() < 0.3 else self._drawn(number)
                self.should[self.pool.allocate(given)] = given or self._zeros()
            case "fork" if idle and len(self.should) < 12:
                source = chance.choice(idle)
                self.should[self.pool.allocate(source)] = self.should[source]
            case "close" if idle:
                slot = chance.choice(idle)
                self.pool.free(slot)
                del self.should[slot]
            case "reset" if idle:
                slot = chance.choice(idle)
                self.pool.reset(slot)
                self.should[slot] = self._zeros()
            case "read" if idle:
                self._check(chance.choice(idle))
            case "start" if idle and len(self.under_way) < self.pool.in_flight:
                self._start(number, chance.sample(idle, min(chance.randint(1, 4), len(idle))))
            case "end" if self.under_way:
                self._end(self.under_way.popleft())

    def end(self) -> None:
        """End what is under way, and look at all that is left."""
        while self.under_way:
            self._end(self.under_way.popleft())
        for slot in self.should:
            self._check(slot)

    def _start(self, seed: int, slots: list[int]) -> None:
        manifest = self.manifest
        rows, steps = len(slots), self.chance.choice((1, 1, 3))
        lengths = [self.chance.randint(1, steps) for _ in slots]
        given = feeds(manifest, rows, steps, lengths, seed)
        for index, state in enumerate(manifest.states):
            given[state.input] = np.stack([self.should[slot][index] for slot in slots], state.batch_axis)
        outputs, after = self.plain.run(given)
        workspace = self.engine.workspace(rows, steps)
        for spec, array in zip(manifest.inputs, workspace.inputs, strict=True):
            assert array is not None
            array[...] = given[spec.name]
        if workspace.lengths is not None:
            workspace.lengths[:] = lengths
        self.pool.gather(np.array(slots, np.intp), workspace.states)
        workspace.start()
        self.under_way.append(Flight(slots, lengths, workspace, outputs, after))

    def _end(self, flight: Flight) -> None:
        outputs, moves = flight.workspace.run()
        equal((outputs, []), (flight.outputs, []), self.manifest, flight.lengths)
        rows = sorted(self.chance.sample(range(len(flight.slots)), self.chance.randint(0, len(flight.slots))))
        if rows:
            self.pool.scatter(np.array(flight.slots, np.intp)[rows], np.array(rows, np.intp), moves)
        else:
            self.pool.abandon(moves)
        flight.workspace.release()
        for row in rows:
            self.should[flight.slots[row]] = [
                np.take(array, row, state.batch_axis)
                for state, array in zip(self.manifest.states, flight.states, strict=True)
            ]

    def _check(self, slot: int) -> None:
        for ours, should in zip(self.pool.read(slot), self.should[slot], strict=True):
            assert ours.tobytes() == should.tobytes()

    def _drawn(self, seed: int) -> list[Array]:
        given: Arrays = feeds(self.manifest, 1, 1, seed=seed)
        return [np.take(given[state.input], 0, state.batch_axis) for state in self.manifest.states]

    def _zeros(self) -> list[Array]:
        return [np.zeros(state.tail, state.dtype) for state in self.manifest.states]


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "room for more rows"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_long_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, kind: str, captured: bool) -> None:
    """Two ticks under way, and states that are written, copied, read and given back meanwhile."""
    write, plain = KINDS[kind]
    device = Disorder(seed)
    runs_wait_in_queues(monkeypatch)
    monkeypatch.setattr("service.engines.capture_trial.Trial", Quick)
    path = write(tmp_path)
    life = Life(ResidentEngine(path, device, capture=captured), plain(path), random.Random(seed))
    for number in range(150):
        life.happen(number)
    life.end()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_ticks_with_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, kind: str) -> None:
    """As those that the audit runs, and ticks that go on from each other."""
    write, plain = KINDS[kind]
    device = Disorder(seed)
    runs_wait_in_queues(monkeypatch)
    path = write(tmp_path)
    engine, other = ResidentEngine(path, device), plain(path)
    for rows, steps in ((1, 1), (3, 2), (2, 4)):
        given = feeds(engine.manifest, rows, steps, seed=seed)
        expected = other.run(given)
        equal(engine.run(given), expected, engine.manifest)
        tick = engine.rehearse(given)
        for _ in range(2):
            equal((tick()[0], []), (expected[0], []), engine.manifest)
    carries(engine, other)


@pytest.mark.parametrize("seed", SEEDS)
def test_places_of_a_tick_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What it had begun is over before others get the places that it writes to: their states stay what they are."""
    device = Disorder(seed, lazy=True)
    runs_wait_in_queues(monkeypatch)
    engine = ResidentEngine(one_step(tmp_path), device)
    session = engine._graph.session
    ask = type(session).run_with_iobinding

    def fail(ties: Any, options: Any) -> None:
        if len(asked) == 2:
            raise RuntimeError("no memory")
        asked.append(ties)
        ask(session, ties, options)

    asked: list[Any] = []
    session.run_with_iobinding = fail
    pool = engine.pool(20, 3, uncounted)
    execution = Execution(engine, pool, lambda: 0.0)
    x = [np.ones((3, 4, 3), np.float32)]
    block = Block([Row(Track(pool.allocate()), 0) for _ in range(3)], 4, x, lambda block: None)
    flight = execution.start(Tick([block], [4]), 0.0)
    assert isinstance(flight.error, RuntimeError)
    assert not device.idle
    given = [[np.full(state.tail, number, state.dtype) for state in engine.manifest.states] for number in range(2, 12)]
    slots: list[int] = []
    abandon = pool.abandon

    def taken_at_once(moves: Moves) -> None:
        """As another thread may."""
        abandon(moves)
        slots.extend(pool.allocate(states) for states in given)
        device.work(lambda: device.idle)

    monkeypatch.setattr(pool, "abandon", taken_at_once)
    execution.give_up(flight)
    for slot, states in zip(slots, given, strict=True):
        for ours, should in zip(pool.read(slot), states, strict=True):
            assert np.array_equal(ours, should)
