"""Graphs whose states stay on a device, with real files and this machine's memory as the device.

Each is held against the same file with states that come and go: to the bit, for both are run by the same kernels.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from service.engines.engine import Engine
from service.engines.provider import NotOnCuda
from service.engines.resident_engine import ResidentEngine
from service.engines.resident_workspace import ResidentWorkspace
from service.engines.stepping import StepByStep
from service.graphs.graph import Graph
from service.manifest import Manifest, StateSpec, TensorSpec
from service.settings import Settings
from service.states.device import HostDevice
from service.states.resident_pool import ResidentPool
from service.versions.loading import load_model
from tests.any_graphs import CASES, Case
from tests.graphs import write_lstm
from tests.resident import states_on_a_device

Array = NDArray[Any]
Arrays = dict[str, Array]


def feeds(manifest: Manifest, rows: int, steps: int, lengths: list[int] | None = None, seed: int = 0) -> Arrays:
    """Random input and states, in the axes of the manifest."""
    random = np.random.default_rng(seed)

    def draw(spec: TensorSpec | StateSpec) -> Array:
        sizes = {spec.batch_axis: rows}
        if isinstance(spec, TensorSpec) and spec.time_axis is not None:
            sizes[spec.time_axis] = steps
        shape = [sizes[axis] if size is None else size for axis, size in enumerate(spec.shape)]
        if spec.dtype.startswith("float"):
            return random.uniform(-1, 1, shape).astype(spec.dtype)
        return random.integers(0, getattr(spec, "below", None) or 2, shape).astype(spec.dtype)

    given = {spec.name: draw(spec) for spec in manifest.inputs}
    given |= {state.input: draw(state) for state in manifest.states}
    if manifest.lengths is not None:
        given[manifest.lengths] = np.array(lengths or [steps] * rows, np.int32)
    return given


def equal(ours: tuple[Any, Any], theirs: tuple[Any, Any], manifest: Manifest, lengths: list[int] | None = None) -> None:
    """The same outputs up to each row's length, and the same states."""
    for spec, one, other in zip(manifest.outputs, ours[0], theirs[0], strict=True):
        for row in range(one.shape[spec.batch_axis]):
            a, b = (np.take(array, row, spec.batch_axis) for array in (one, other))
            if lengths is not None and spec.time_axis is not None:
                axis = spec.time_axis - (spec.batch_axis < spec.time_axis)
                a, b = (np.take(array, range(lengths[row]), axis) for array in (a, b))
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tobytes() == b.tobytes()
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def tick(engine: Any, pool: ResidentPool, slots: NDArray[np.intp], given: Arrays, keep: bool = True) -> list[Array]:
    """What a runner does with a tick; its outputs."""
    manifest = engine.manifest
    x = manifest.inputs[0]
    steps = 1 if x.time_axis is None else given[x.name].shape[x.time_axis]
    workspace: ResidentWorkspace = engine.workspace(len(slots), steps)
    for spec, array in zip(manifest.inputs, workspace.inputs, strict=True):
        assert array is not None
        array[...] = given[spec.name]
    if workspace.lengths is not None:
        workspace.lengths[:] = given[manifest.lengths]
    moves = pool.gather(slots, workspace.states)
    workspace.start()
    outputs, after = workspace.run()
    copies = [output.copy() for output in outputs]
    if keep:
        pool.scatter(slots, np.arange(len(slots)), after)
    else:
        pool.abandon(moves)
    workspace.release()
    return copies


def uncounted(direction: str, size: int) -> None:
    """Nobody asks."""


BATCHED = [case for case in CASES if not case.row_by_row]


@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
def test_any_graph(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As others export them: axes anywhere, constants, lengths, several states, one step a run; whole and ragged."""
    path = case.write(tmp_path)
    settings = Settings(repository=tmp_path, tune_s=0)
    plain = load_model(path, settings).graph
    states_on_a_device(monkeypatch)
    resident = load_model(path, settings).graph
    assert isinstance(resident, ResidentEngine)
    assert (resident.digest, resident.manifest) == (plain.digest, plain.manifest)
    manifest = plain.manifest
    for rows, steps, lengths in ((1, 1, None), (3, 1, None), (3, 5, [5, 2, 4]), (4, 4, None)):
        if steps > 1 and any(x.time_axis is None for x in manifest.inputs):
            continue
        ragged = lengths if manifest.lengths is not None else None
        given = feeds(manifest, rows, steps, ragged)
        equal(resident.run(given), plain.run(given), manifest, ragged)


def test_ticks_go_on_from_each_other(tmp_path: Path) -> None:
    """The states of each slot, through ticks of different rows, are those that are carried by hand."""
    path = write_lstm(tmp_path)
    carries(ResidentEngine(path, HostDevice()), Engine(path))


def test_a_graph_of_one_step_goes_on_from_itself(tmp_path: Path) -> None:
    """Within a tick of rows of different lengths too: their states stay on the device between the steps."""
    path = one_step(tmp_path)
    carries(ResidentEngine(path, HostDevice()), StepByStep(Engine(path)))


def carries(resident: ResidentEngine, plain: Graph) -> None:
    """Ticks of either, with the states of the one in slots and those of the other in a dict."""
    manifest = plain.manifest
    pool = resident.pool(20, 5, uncounted)
    slots = pool.allocate_many(6)
    states = {int(slot): [np.zeros(state.tail, state.dtype) for state in manifest.states] for slot in slots}
    for seed, (order, steps, lengths) in enumerate(
        [([0, 1, 2], 4, [4, 1, 3]), ([5, 3, 2, 1], 1, None), ([2], 7, None), ([0, 1, 2, 3, 4], 3, [2, 3, 3, 1, 2])]
    ):
        chosen = slots[order]
        given = feeds(manifest, len(order), steps, lengths, seed)
        for index, state in enumerate(manifest.states):
            given[state.input] = np.stack([states[int(slot)][index] for slot in chosen], state.batch_axis)
        outputs, after = plain.run(given)
        tick(resident, pool, chosen, given, keep=False)
        ours = tick(resident, pool, chosen, given)
        for row, slot in enumerate(chosen):
            states[int(slot)] = [
                np.take(array, row, state.batch_axis) for state, array in zip(manifest.states, after, strict=True)
            ]
        equal((ours, []), (outputs, []), manifest, lengths)
        for slot in slots:
            for one, other in zip(pool.read(int(slot)), states[int(slot)], strict=True):
                assert one.tobytes() == other.tobytes()
    assert pool.copied["up"] == 0


def one_step(folder: Path) -> Path:
    """A cell that takes one step a run, without a time axis, whose two states hang on each other; with its manifest."""
    from service.manifest import METADATA_KEY

    graph = onnx.parser.parse_graph("""cell (float[N, 3] x, float[N, 3] a0, float[2, N] b0)
        => (float[N, 3] y, float[N, 3] a1, float[2, N] b1) <int64[1] zero = {0}, int64[1] one = {1}> {
            turned = Transpose<perm = [1, 0]>(b0)
            sum = ReduceSum<keepdims = 1>(turned, one)
            added = Add(x, sum)
            more = Add(added, a0)
            a1 = Tanh(more)
            y = Identity(a1)
            mean = ReduceMean<keepdims = 0>(a0, one)
            b1 = Sub(b0, mean)
        }""")
    manifest = Manifest(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, None, 3), batch_axis=1, time_axis=0, absent=(0,)),),
        steps_per_run=1,
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, None, 3), batch_axis=1, time_axis=0, absent=(0,)),),
        states=(
            StateSpec(name="a", input="a0", output="a1", dtype="float32", shape=(None, 3), batch_axis=0),
            StateSpec(name="b", input="b0", output="b1", dtype="float32", shape=(2, None), batch_axis=1),
        ),
        streamable=True,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: manifest.model_dump_json()})
    onnx.save(model, folder / "cell.onnx")
    return folder / "cell.onnx"


def test_two_ticks_have_memory_of_their_own(tmp_path: Path) -> None:
    """What one is filled with, or has given, stays while another of its shape runs; a third is too many."""
    path = write_lstm(tmp_path)
    engine = ResidentEngine(path, HostDevice())
    pool = engine.pool(20, 4, uncounted)
    given = feeds(engine.manifest, 2, 3)
    first, second = engine.workspace(2, 3), engine.workspace(2, 3)
    for workspace in (first, second):
        (x,) = workspace.inputs
        assert x is not None
        assert workspace.lengths is not None
        workspace.lengths[:] = 3
        pool.gather(pool.allocate_many(2), workspace.states)
    with pytest.raises(RuntimeError, match="no memory of ticks"):
        engine.workspace(1, 1)
    assert first.inputs[0] is not None
    first.inputs[0][...] = given["x"]
    first.start()
    second.start()
    (y,), _ = first.run()
    (nothing,), _ = second.run()
    assert not np.array_equal(y, nothing)
    zeros = {"h0": np.zeros_like(given["h0"]), "c0": np.zeros_like(given["c0"])}
    assert np.array_equal(y, Engine(path).run(given | zeros)[0][0])
    for workspace in (second, first):
        workspace.release()
    assert engine.workspace(1, 1).rows == 1


def test_ticks_of_many_shapes(tmp_path: Path) -> None:
    """Memory grows with the largest; smaller ones lie in it, and what was made before it grew still works."""
    path = write_lstm(tmp_path)
    engine, plain = ResidentEngine(path, HostDevice()), Engine(path)
    pool = engine.pool(300, 200, uncounted)
    for rows, steps in ((1, 1), (200, 9), (1, 1), (3, 200), (200, 9), (7, 2)):
        slots = pool.allocate_many(rows)
        given = feeds(engine.manifest, rows, steps)
        (y,) = tick(engine, pool, slots, given)
        given |= {"h0": np.zeros_like(given["h0"]), "c0": np.zeros_like(given["c0"])}
        assert np.array_equal(y, plain.run(given)[0][0])
        pool.free_many(slots)


def test_a_tick_too_large_to_keep_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has memory of its own, and those after it have theirs."""
    monkeypatch.setattr("service.engines.lane._KEPT_BYTES", 1 << 12)
    test_ticks_of_many_shapes(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "bool"])
@pytest.mark.parametrize(
    "shape", [(None, 3), (1, None, 3), (2, None, 3), (2, 3, None), (None,), (1, 1, None, 2)], ids=str
)
def test_states_of_any_shape(tmp_path: Path, dtype: str, shape: tuple[int | None, ...]) -> None:
    """A graph that swaps two states gives back each of them in the other's place, whatever axes they have."""
    from service.manifest import METADATA_KEY

    axes = ", ".join("N" if size is None else str(size) for size in shape)
    kind = {"float16": "float16", "float64": "double", "int64": "int64", "bool": "bool"}[dtype]
    graph = onnx.parser.parse_graph(
        f"swap (float[T, N, 1] x, {kind}[{axes}] a0, {kind}[{axes}] b0)"
        f" => (float[T, N, 1] y, {kind}[{axes}] a1, {kind}[{axes}] b1) {{"
        "y = Identity(x) a1 = Identity(b0) b1 = Identity(a0) }"
    )
    axis = shape.index(None)
    manifest = Manifest.model_validate(
        {
            "inputs": [{"name": "x", "dtype": "float32", "shape": [None, None, 1], "batch_axis": 1, "time_axis": 0}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": [None, None, 1], "batch_axis": 1, "time_axis": 0}],
            "states": [
                {"name": s, "input": f"{s}0", "output": f"{s}1", "dtype": dtype, "shape": shape, "batch_axis": axis}
                for s in "ab"
            ],
            "streamable": True,
        }
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: manifest.model_dump_json()})
    path = tmp_path / "swap.onnx"
    onnx.save(model, path)
    engine = ResidentEngine(path, HostDevice())
    given = feeds(manifest, 3, 2)
    _, (a, b) = engine.run(given)
    assert np.array_equal(a, given["b0"])
    assert np.array_equal(b, given["a0"])


@pytest.mark.parametrize("least", [0, 100], ids=["all of them", "the large ones"])
def test_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """They are read from there, although the graph itself is another than the file's; the small ones too."""
    monkeypatch.setattr("service.graphs.resident._SMALL_BYTES", 100)
    path = write_lstm(tmp_path)
    given = feeds(Engine(path).manifest, 2, 3)
    expected = Engine(path).run(given)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=least)
    engine = ResidentEngine(path, HostDevice(), external=[path.with_name("weights.bin")])
    assert len(engine.file_digests) == 2
    equal(engine.run(given), expected, engine.manifest)


def change(path: Path, what: Callable[[Any], None]) -> Path:
    """The file with something changed."""
    model = onnx.load(path)
    what(model)
    onnx.save(model, path)
    return path


def test_an_old_graph(tmp_path: Path) -> None:
    """Of an opset that has no ScatterElements: said, with what to do."""
    path = change(write_lstm(tmp_path), lambda model: setattr(model.opset_import[0], "version", 10))
    with pytest.raises(NotOnCuda, match=r"opset 10.*from opset 11 on"):
        ResidentEngine(path, HostDevice())


@pytest.mark.parametrize("case", [case for case in CASES if case.row_by_row], ids=lambda case: case.name)
def test_a_graph_that_runs_row_by_row(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused for a device: the CPU runs it."""
    states_on_a_device(monkeypatch)
    with pytest.raises(NotOnCuda, match=r"run it on the CPU|it is run row by row"):
        load_model(case.write(tmp_path), Settings(repository=tmp_path, tune_s=0))


def test_a_run_that_is_interrupted(tmp_path: Path) -> None:
    """It raises, and so does every later one."""
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice())
    given = feeds(engine.manifest, 1, 1)
    engine.run(given)
    engine.interrupt()
    with pytest.raises(Exception, match="terminate"):
        engine.run(given)


def test_a_tick_that_is_rehearsed(tmp_path: Path) -> None:
    """Each time it runs, from the same states; what it gives is what a run gives."""
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice())
    given = feeds(engine.manifest, 3, 2)
    expected, _ = engine.run(given)
    rehearsed = engine.rehearse(given)
    for _ in range(3):
        (y,), _ = rehearsed()
        assert np.array_equal(y, expected[0])
        # Nobody else writes there: the next one is seen to have run.
        y[:] = 0


def test_memory_goes_with_the_engine(tmp_path: Path) -> None:
    """At once, without the collector: another model may be waiting for it."""
    engine = ResidentEngine(write_lstm(tmp_path), HostDevice(), capture=True)
    engine.rehearse(feeds(engine.manifest, 1, 1))()
    pool = engine.pool(10, 2, uncounted)
    pool.settle_in()
    tick(engine, pool, pool.allocate_many(2), feeds(engine.manifest, 2, 3))
    held: list[weakref.ref[Any]] = [weakref.ref(engine), *(weakref.ref(buffer.memory) for buffer in pool.buffers)]
    assert engine._captures is not None
    held += [weakref.ref(engine._graph.session), weakref.ref(engine._captures)]
    gc.disable()
    try:
        del engine, pool
        assert [ref() for ref in held] == [None] * 5
    finally:
        gc.enable()
