"""Which ticks run as a captured graph, told from trials; and graphs of one step beside those of any, on the CPU.

Nothing is captured here: that is for a machine with a GPU. The graph that would be is held against the other, the rows
that only fill it up too.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.engines.engine import Engine
from service.engines.provider import CudaOptions, start
from service.engines.resident_engine import ResidentEngine
from service.engines.resident_workspace import ResidentWorkspace
from service.engines.stepping import StepByStep
from service.graphs.capture import TOLERANCES, Choice, Trial, buckets, difference, make_one_step
from service.manifest import METADATA_KEY, Manifest
from service.states.device import HostDevice
from tests.disorder import Disorder, runs_wait_in_queues
from tests.graphs import write_lstm
from tests.unit.service.engines.test_resident_engine import equal, feeds, one_step, tick, uncounted


def trial(rows: int, plain_s: float, captured_s: float, difference: float = 0.0) -> Trial:
    """What was found of a number of rows."""
    return Trial(rows, plain_s, captured_s, difference)


def test_what_is_quicker_is_used() -> None:
    """By enough to be told from chance."""
    choice = Choice([trial(1, 1.0, 0.5), trial(2, 1.0, 0.96), trial(4, 1.0, 2.0), trial(8, 1.0, 0.94)])
    assert [choice.rows(rows) for rows in (1, 2, 4, 8)] == [1, None, None, 8]
    assert choice.graphs == {1, 8}


def test_padding_has_to_pay() -> None:
    """Rows between two powers of two run in the room of the upper one if that is quicker than the lower one plainly."""
    cheap = Choice([trial(4, 1.0, 0.4), trial(8, 1.1, 0.5)])
    assert [cheap.rows(rows) for rows in range(1, 10)] == [None, None, None, 4, 8, 8, 8, 8, None]
    dear = Choice([trial(4, 1.0, 0.4), trial(8, 2.0, 1.5)])
    assert [dear.rows(rows) for rows in range(4, 9)] == [4, None, None, None, 8]
    # One row alone is not padded to two unless that is quicker than one alone; there is none between them.
    assert Choice([trial(1, 1.0, 2.0), trial(2, 1.0, 0.1)]).rows(1) is None


@pytest.mark.parametrize("wrong", [2e-5, float("inf"), float("nan")])
def test_what_differs_is_never_used(wrong: float) -> None:
    """However quick it is."""
    choice = Choice([trial(1, 1.0, 0.1, 9e-6), trial(2, 1.0, 0.1, wrong)], TOLERANCES["float32"])
    assert [choice.rows(rows) for rows in (1, 2)] == [1, None]
    assert not Choice([trial(2, 1.0, 0.1, wrong)], TOLERANCES["float32"])


def test_nothing_was_tried() -> None:
    """Everything runs plainly."""
    assert not Choice()
    assert Choice().rows(1) is None


@pytest.mark.parametrize(
    ("tick_rows", "tried"),
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 8]), (8, [1, 2, 4, 8]), (10**6, [2**n for n in range(11)])],
)
def test_which_numbers_of_rows_are_tried(tick_rows: int, tried: list[int]) -> None:
    """Powers of two, up to the one that a whole tick fits into, within a bound."""
    assert buckets(tick_rows) == tried


def test_differences() -> None:
    """Absolute up to 1, shares beyond; whole numbers are equal or not; NaN is equal to itself alone."""
    assert difference(np.array([1.0, 100.0]), np.array([1.5, 101.0])) == pytest.approx(0.5 / 1.5)
    assert difference(np.array([2]), np.array([2])) == 0
    assert difference(np.array([2]), np.array([3])) == float("inf")
    assert difference(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert difference(np.array([np.nan]), np.array([np.nan])) == 0
    assert difference(np.array([]), np.array([])) == 0


def test_a_graph_of_one_step_asks_for_no_lengths(tmp_path: Path) -> None:
    """Every row has one step: what an operator would read of them on the host is gone, and so is the input."""
    model = onnx.load(write_lstm(tmp_path))
    (text,) = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    served = make_one_step(model, Manifest.model_validate_json(text))
    assert served.lengths is None
    assert "lengths" not in {value.name for value in model.graph.input}
    onnx.checker.check_model(model)


class Quick(Trial):
    """A trial that a captured graph has won, if it gave the same."""

    def __init__(self, rows: int, plain_s: float, captured_s: float, difference: float) -> None:
        super().__init__(rows, 1.0, 0.1, difference)


@pytest.mark.parametrize("kind", ["operator", "one step a run"])
def test_ticks_with_room_for_more_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of every number of rows, between ticks of several steps: each slot's states are those carried by hand."""
    path = write_lstm(tmp_path) if kind == "operator" else one_step(tmp_path)
    plain: Any = Engine(path) if kind == "operator" else StepByStep(Engine(path))
    monkeypatch.setattr("service.engines.capture_trial.Trial", Quick)
    engine = ResidentEngine(path, HostDevice(), capture=True)
    manifest = engine.manifest
    pool = engine.pool(40, 6, uncounted)
    free = pool.free_places
    assert pool.settle_in() == "ticks of one step are captured with room for [1, 2, 4, 8] rows"
    assert (pool.taken, pool.free_places, pool.copied) == (0, free, {})
    slots = pool.allocate_many(7)
    carried = {
        state.input: np.zeros([7 if n is None else n for n in state.shape], np.float32) for state in manifest.states
    }
    rooms = []
    for seed, (rows, steps) in enumerate(itertools.product((1, 2, 3, 5, 6, 7), (1, 3))):
        chosen = np.random.default_rng(seed).permutation(7)[:rows]
        given = feeds(manifest, rows, steps, seed=seed)
        for state in manifest.states:
            given[state.input] = carried[state.input].take(chosen, state.batch_axis)
        outputs, after = plain.run(given)
        workspace = engine.workspace(rows, steps)
        rooms.append(workspace.rows)
        workspace.release()
        equal((tick(engine, pool, slots[chosen], given), []), (outputs, []), manifest)
        for state, array in zip(manifest.states, after, strict=True):
            np.moveaxis(carried[state.input], state.batch_axis, 0)[chosen] = np.moveaxis(array, state.batch_axis, 0)
        for n, slot in enumerate(slots):
            for state, array in zip(manifest.states, pool.peek_many([int(slot)])[0], strict=True):
                assert np.array_equal(array, carried[state.input].take(n, state.batch_axis))
    assert rooms == [1, 1, 2, 2, 4, 3, 8, 5, 8, 6, 8, 7]


def test_a_graph_that_cannot_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and the model runs as it did; nothing that was tried stays."""

    def fail(*_: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr("service.engines.resident_engine.make_one_step", fail)
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice(), capture=True)
    pool = engine.pool(10, 4, uncounted)
    assert pool.settle_in() == "ticks of one step are not captured: no way"
    assert pool.settle_in() == ""
    tick(engine, pool, pool.allocate_many(3), feeds(engine.manifest, 3, 1))


def test_a_captured_graph_that_gives_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out, and not used however quick it is."""

    def other_weights(model: Any, manifest: Manifest) -> Manifest:
        served = make_one_step(model, manifest)
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "R"]
        tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(1.001)).tobytes()
        return served

    monkeypatch.setattr("service.engines.capture_trial.Trial", Quick)
    monkeypatch.setattr("service.engines.resident_engine.make_one_step", other_weights)
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice(), capture=True)
    pool = engine.pool(10, 4, uncounted)
    found = pool.settle_in()
    assert found.startswith("ticks of one step are captured with room for [] rows; not for 1: 100000 us captured, ")
    assert len(re.findall(r"; not for \d: \d+ us captured, 1000000 us plainly, results differ by 0\.00", found)) == 3
    assert engine.workspace(3, 1).rows == 3


def test_a_trial_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its step had taken of the pool is back: slots, and the places that it writes to, when it does no longer."""
    device = Disorder(lazy=True)
    runs_wait_in_queues(monkeypatch)
    engine = ResidentEngine(write_lstm(tmp_path), device, capture=True)
    pool = engine.pool(10, 4, uncounted)
    free = pool.free_places
    start = ResidentWorkspace.start

    def fail(workspace: ResidentWorkspace) -> Any:
        mark = start(workspace)
        if pool.taken:
            raise RuntimeError("no memory")
        return mark

    monkeypatch.setattr(ResidentWorkspace, "start", fail)
    assert pool.settle_in() == "ticks of one step are not captured: no memory"
    assert (pool.taken, pool.free_places, device.idle) == (0, free, True)


@pytest.mark.parametrize(("capture", "limits"), [(False, [1001]), (True, [500, 500])])
def test_sessions_of_one_model_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: bool, limits: list[int]
) -> None:
    """What was set is for the model: the session of the graph of one step has half of it, and so has the other."""
    given: list[int | None] = []

    def seen(model: Any, device: Any, threads: int, cuda: CudaOptions, *more: Any) -> Any:
        given.append(cuda.memory_limit_bytes)
        return start(model, device, threads, cuda, *more)

    monkeypatch.setattr("service.engines.resident_engine.start", seen)
    options = CudaOptions(memory_limit_bytes=1001)
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice(), cuda=options, capture=capture)
    engine.pool(10, 4, uncounted).settle_in()
    assert given == limits


def test_no_session_is_started_or_freed_by_a_thread_that_the_device_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes and gives back memory itself, which spoils what another thread captures unless that is said before."""
    known: set[int] = set()
    strange: list[str] = []

    class Device(HostDevice):
        def enter(self) -> None:
            known.add(threading.get_ident())

    def seen(*given: Any) -> Any:
        if threading.get_ident() not in known:
            strange.append(threading.current_thread().name)
        return start(*given)

    def within(work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    device = Device()
    engine = ResidentEngine(write_lstm(tmp_path), device, capture=True)
    pool = engine.pool(10, 4, uncounted)
    monkeypatch.setattr("service.engines.resident_engine.start", seen)
    within(pool.settle_in)
    assert strange == []
    known.clear()
    del pool, engine
    assert known == {threading.get_ident()}


@pytest.mark.parametrize("kind", ["operator", "one step a run"])
def test_a_rehearsal_of_one_step_runs_as_it_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Captured where that is quicker, so that devices are compared by what will run; and it gives the same."""
    ran: list[Any] = []
    sessions: set[Any] = set()
    compute = ResidentWorkspace.compute

    def seen(workspace: ResidentWorkspace) -> None:
        ran.append(workspace._graph.session)
        compute(workspace)

    monkeypatch.setattr("service.engines.capture_trial.Trial", Quick)
    monkeypatch.setattr(ResidentWorkspace, "compute", seen)
    path = write_lstm(tmp_path) if kind == "operator" else one_step(tmp_path)
    engine = ResidentEngine(path, HostDevice(), capture=True)
    for rows, steps, captured in ((1, 1, True), (4, 1, True), (3, 1, False), (4, 2, False)):
        given = feeds(engine.manifest, rows, steps)
        expected, _ = engine.run(given)
        tick = engine.rehearse(given)
        ran.clear()
        for _ in range(2):
            equal((tick()[0], []), (expected, []), engine.manifest)
        assert [session is not engine._graph.session for session in ran] == [captured, captured]
        sessions.update(ran)
    (rehearsed,) = [weakref.ref(one) for one in sessions - {engine._graph.session}]
    sessions.clear()
    ran.clear()
    del tick
    assert rehearsed() is not None
    engine.pool(4, 2, uncounted)
    assert rehearsed() is None


def test_a_rehearsal_that_cannot_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs plainly, and so do those after it, without another trial."""
    tried: list[object] = []

    def fail(*_: object) -> None:
        tried.append(_)
        raise RuntimeError("no way")

    monkeypatch.setattr("service.engines.resident_engine.make_one_step", fail)
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice(), capture=True)
    for rows in (1, 2):
        given = feeds(engine.manifest, rows, 1)
        equal((engine.rehearse(given)()[0], []), (engine.run(given)[0], []), engine.manifest)
    assert len(tried) == 1
