"""Measuring: what is run, how often, within which time, and what is noted. The clock stands still but for runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from service.graphs.graph import Array, Graph
from service.graphs.workspace import FedWorkspace, Workspace
from service.manifest import Manifest, StateSpec, TensorSpec
from service.states.pool import Pool
from service.versions.trial import measure
from service.versions.tuning import WIDEST, Bounds, Measurement, choose

MANIFEST = Manifest(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, None, 3), batch_axis=1, time_axis=0),),
    lengths="lengths",
    outputs=(TensorSpec(name="y", dtype="float32", shape=(None, None, 2), batch_axis=1, time_axis=0),),
    states=(StateSpec(name="h", input="h0", output="hT", dtype="float32", shape=(1, None, 5), batch_axis=1),),
    streamable=True,
)


@dataclass
class Machine:
    """A clock, and graphs whose runs take time by it.

    Attributes:
        run_s: seconds of a run, by its threads, rows and steps.
        runs: all that ran.
        begun: the thread counts that were made ready, in order.
    """

    run_s: Callable[[int, int, int], float]
    now: float = 0.0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    graphs: dict[int, FakeGraph] = field(default_factory=dict)

    def graph_with(self, threads: int) -> Graph:
        """A graph with so many threads."""
        if threads not in self.graphs:
            self.begun.append(threads)
            self.graphs[threads] = FakeGraph(self, threads)
        return self.graphs[threads]

    def measure(
        self, counts: Sequence[int], seconds: float, start_s: float = 0.0, every: bool = False
    ) -> tuple[Measurement, ...]:
        """Measure by this machine's clock; its CPU time goes twice as fast."""
        return measure(self.graph_with, counts, seconds, start_s, every, WIDEST, lambda: self.now, lambda: 2 * self.now)


@dataclass
class FakeGraph:
    """What takes time and gives nothing."""

    machine: Machine
    threads: int
    manifest: Manifest = MANIFEST
    digest: str = ""

    def run(self, feeds: Mapping[str, Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Take the time of a run; its feeds have to fit each other."""
        steps, rows, features = feeds["x"].shape
        assert features == 3
        assert feeds["h0"].shape == (1, rows, 5)
        assert feeds["lengths"].tolist() == [steps] * rows
        self.machine.runs.append((self.threads, rows, steps))
        self.machine.now += self.machine.run_s(self.threads, rows, steps)
        return [], []

    def workspace(self, rows: int, steps: int) -> Workspace:
        """Arrays for a run."""
        return FedWorkspace(self.manifest, rows, steps, self.run)

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> Pool:
        """None that anybody asks for."""
        return Pool(self.manifest.states, slots)


def test_every_size_is_measured_where_there_is_time() -> None:
    """With the seconds of a run and of its CPU, after a run that does not count."""
    machine = Machine(lambda threads, rows, steps: rows * steps * 1e-3)
    found = machine.measure([1], seconds=1e9)
    assert len(found) == 20
    for one in found:
        assert one.seconds == pytest.approx(one.rows * one.steps * 1e-3)
        assert one.cpu_s == pytest.approx(2 * one.seconds)
        assert machine.runs.count((1, one.rows, one.steps)) >= 4


def test_the_quickest_run_counts() -> None:
    """A first run that is slow, and one during which somebody else had the core, change nothing."""
    machine = Machine(lambda threads, rows, steps: 0.0)
    machine.run_s = lambda threads, rows, steps: {1: 7.0, 2: 5.0, 4: 3.0}.get(machine.runs.count((1, rows, steps)), 1.0)
    assert {one.seconds for one in machine.measure([1], seconds=1e9)} == {1.0}


def test_it_ends_in_time() -> None:
    """However little there is: the smallest size is measured in any case, and a run that has begun is the last."""
    for seconds in (0.01, 0.1, 1.0, 10.0):
        machine = Machine(lambda threads, rows, steps: rows * steps * 5e-3 + 1e-3)
        found = machine.measure([1], seconds)
        assert found[0].rows == found[0].steps == 1
        assert machine.now < 2 * seconds + 0.05


def test_threads_take_turns() -> None:
    """What else happens on the machine meets each thread count alike: here everything gets slower all the time."""
    machine = Machine(lambda threads, rows, steps: 0.0)
    machine.run_s = lambda threads, rows, steps: (1 + 0.1 * len(machine.runs)) * rows * steps / threads * 1e-3
    found = machine.measure([1, 2], seconds=1e9)
    times = {(one.threads, one.rows, one.steps): one.seconds for one in found}
    assert len(times) == 40
    assert all(1.6 < times[1, rows, steps] / times[2, rows, steps] < 2.0 for _, rows, steps in times)


def test_a_count_that_does_not_pay_ends_the_search() -> None:
    """Of 1, 2, 4 and 8 threads, 4 pay no more than 2: 8 are not looked at, unless every one is asked for."""
    speed = {1: 1.0, 2: 2.0, 4: 2.9, 8: 3.0}
    for every, begun in ((False, [1, 2, 4]), (True, [1, 2, 4, 8])):
        machine = Machine(lambda threads, rows, steps: rows * steps * 1e-4 / speed[threads])
        found = machine.measure([1, 2, 4, 8], seconds=1e9, every=every)
        assert machine.begun == begun
        assert {one.threads for one in found} == (set(begun) if every else {2, 4})
        assert choose(found).threads == 2
        assert len({(one.threads, one.rows, one.steps) for one in found}) == len(found)


def test_a_model_that_takes_long_to_start_is_not_started_again() -> None:
    """One thread is measured then."""
    machine = Machine(lambda threads, rows, steps: rows * steps * 1e-6)
    found = machine.measure([1, 2], seconds=0.4, start_s=0.3)
    assert machine.begun == [1]
    assert {one.threads for one in found} == {1}


def test_what_won_in_turns_is_what_is_chosen() -> None:
    """The machine was busy while 1 thread and 2 were compared, and not while 2 and 4 were, of which 2 are enough."""
    speed = {1: 1.0, 2: 1.6, 4: 1.7}
    machine = Machine(lambda threads, rows, steps: 0.0)
    machine.run_s = lambda threads, rows, steps: (
        rows * steps * 1e-4 / speed[threads] * (1.0 if 4 in machine.begun else 2.0)
    )
    found = machine.measure([1, 2, 4], seconds=1e9)
    assert choose(found).threads == 2
    times = {one.threads: one.seconds for one in found if (one.rows, one.steps) == (64, 1)}
    assert times == pytest.approx({2: 4e-3, 4: 64e-4 / 1.7})


def test_what_is_too_large_is_not_run() -> None:
    """No more rows, steps and cells than the server's ticks have, nor many bytes."""
    machine = Machine(lambda threads, rows, steps: 1e-3)
    found = measure(machine.graph_with, [1], 1e9, bounds=Bounds(rows=64, cells=128), clock=lambda: machine.now)
    assert max(one.rows for one in found) == 64
    assert max(one.rows * one.steps for one in found) == 128
    assert {one.steps for one in measure(machine.graph_with, [1], 1e9, bounds=Bounds(steps=15))} == {1}
