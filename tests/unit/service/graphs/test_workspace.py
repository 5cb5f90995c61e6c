"""The arrays of a tick against a run by name: bit-equal, read and filled in place, bounded."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import onnx
import pytest

from service.engines.engine import Engine
from service.engines.stepping import RowByRow, StepByStep
from service.graphs.graph import Array, Graph
from service.graphs.workspace import BoundWorkspaces, Workspace
from service.manifest import METADATA_KEY, ConstantSpec, Manifest, StateSpec, TensorSpec
from service.settings import Settings
from service.versions.loading import load_model
from tests.any_graphs import CASES, Case, model
from tests.graphs import HIDDEN, INPUT, write_lstm

SHAPES = [(1, 1), (3, 1), (2, 4), (1, 1), (3, 4)]


def tensor(name: str, dtype: str, shape: tuple[int | None, ...], batch: int, time: int | None) -> TensorSpec:
    """A tensor of a graph."""
    return TensorSpec.model_validate(
        {"name": name, "dtype": dtype, "shape": shape, "batch_axis": batch, "time_axis": time}
    )


def state(name: str, dtype: str, shape: tuple[int | None, ...], output: str = "") -> StateSpec:
    """A state of a graph."""
    return StateSpec.model_validate(
        {
            "name": f"{name} carried",
            "input": name,
            "output": output or f"{name}_next",
            "dtype": dtype,
            "shape": shape,
            "batch_axis": shape.index(None),
        }
    )


def write(path: Path, graph: str, manifest: Manifest, weights: dict[str, Array] | None = None) -> Path:
    """Write a graph with its manifest inside."""
    file = model(graph, weights)
    onnx.helper.set_model_props(file, {METADATA_KEY: manifest.model_dump_json()})
    onnx.save(file, path)
    return path


def every_dtype(folder: Path) -> Engine:
    """Inputs of every dtype, states of some, lengths of int64, a constant, a state that is an output too."""
    graph = """g (int64[T, N] token, bool[N, T] on, int8[2, T, N] small, double[T, N, 2] wide, float16[T, 2, N] half,
                  int64[N] lens, int64 rate, int32[N] count, float16[N, 3] h, bool[1, N] seen)
        => (int64[T, N] doubled, bool[N, T] off, int8[2, T, N] kept, double[T, N, 2] scaled, float16[T, 2, N] cut,
            int64[N] ends, int32[N] count_next, float16[N, 3] h_next, bool[1, N] seen_next) {
        doubled = Add(token, token)
        off = Not(on)
        kept = Neg(small)
        factor = Cast<to = 11>(rate)  scaled = Mul(wide, factor)
        cut = Mul(half, half)
        ends = Mul(lens, rate)
        narrow = Cast<to = 6>(lens)  count_next = Add(count, narrow)
        h_next = Add(h, h)
        seen_next = Not(seen)
    }"""
    manifest = Manifest(
        inputs=(
            tensor("token", "int64", (None, None), 1, 0),
            tensor("on", "bool", (None, None), 0, 1),
            tensor("small", "int8", (2, None, None), 2, 1),
            tensor("wide", "float64", (None, None, 2), 1, 0),
            tensor("half", "float16", (None, 2, None), 2, 0),
        ),
        lengths="lens",
        lengths_dtype="int64",
        constants=(ConstantSpec(name="rate", dtype="int64", value=base64.b64encode(np.int64(3).tobytes()).decode()),),
        outputs=(
            tensor("doubled", "int64", (None, None), 1, 0),
            tensor("off", "bool", (None, None), 0, 1),
            tensor("kept", "int8", (2, None, None), 2, 1),
            tensor("h_next", "float16", (None, 3), 0, None),
            tensor("scaled", "float64", (None, None, 2), 1, 0),
            tensor("cut", "float16", (None, 2, None), 2, 0),
            tensor("ends", "int64", (None,), 0, None),
        ),
        states=(
            state("count", "int32", (None,)),
            state("h", "float16", (None, 3)),
            state("seen", "bool", (1, None)),
        ),
        streamable=True,
    )
    return Engine(write(folder / "model.onnx", graph, manifest), threads=1)


def any_features(folder: Path) -> Engine:
    """A graph that takes any number of features, which nobody knows before the run."""
    manifest = Manifest(
        inputs=(tensor("x", "float32", (None, None, None), 1, 0),),
        outputs=(tensor("y", "float32", (None, None, None), 1, 0),),
        states=(state("s", "float32", (None, 2)),),
        streamable=True,
    )
    graph = """g (float[T, N, F] x, float[N, 2] s) => (float[T, N, F] y, float[N, 2] s_next) {
        y = Neg(x)  s_next = Neg(s)
    }"""
    return Engine(write(folder / "model.onnx", graph, manifest), threads=1)


def fill(graph: Graph, workspace: Workspace, rows: int, steps: int, seed: int) -> dict[str, Array]:
    """Fill a workspace with random values, and return copies by name."""
    random = np.random.default_rng(seed)
    manifest, feeds = graph.manifest, {}

    def draw(array: Array) -> None:
        array[...] = (
            random.uniform(-2, 2, array.shape) if array.dtype.kind == "f" else random.integers(0, 2, array.shape)
        )

    for index, spec in enumerate(manifest.inputs):
        array = workspace.inputs[index]
        if array is None:
            shape = [5 if size is None else size for size in spec.shape]
            shape[spec.batch_axis] = rows
            if spec.time_axis is not None:
                shape[spec.time_axis] = steps
            array = workspace.inputs[index] = np.empty(shape, spec.dtype)
        draw(array)
        feeds[spec.name] = array.copy()
    for carried, array in zip(manifest.states, workspace.states, strict=True):
        draw(array)
        feeds[carried.input] = array.copy()
    if workspace.lengths is not None and manifest.lengths is not None:
        workspace.lengths[:] = random.integers(1, steps + 1, rows)
        workspace.lengths[0] = steps
        feeds[manifest.lengths] = workspace.lengths.copy()
    return feeds


def same(graph: Graph, rows: int, steps: int, seed: int) -> Workspace:
    """A run of the workspace gives what one by name gives, to the bit."""
    workspace = graph.workspace(rows, steps)
    feeds = fill(graph, workspace, rows, steps, seed)
    (outputs, after), (outputs_by_name, after_by_name) = workspace.run(), graph.run(feeds)
    for given, expected in zip([*outputs, *after], [*outputs_by_name, *after_by_name], strict=True):
        assert (given.shape, given.dtype) == (expected.shape, expected.dtype)
        assert given.tobytes() == expected.tobytes()
    return workspace


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_graphs_from_elsewhere(case: Case, tmp_path: Path) -> None:
    """Those in loops, those with axes that the graph lacks, and all others, whatever shapes follow each other."""
    graph = load_model(case.write(tmp_path), Settings(threads=1)).graph
    timeless = any(spec.time_axis is None for spec in graph.manifest.inputs)
    for seed, (rows, steps) in enumerate(SHAPES):
        same(graph, rows, 1 if timeless else steps, seed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_graphs_from_elsewhere_inside_their_loops(case: Case, tmp_path: Path) -> None:
    """With axes that the graph lacks, and a state that is an output too, in place all the same."""
    graph = load_model(case.write(tmp_path), Settings(threads=1)).graph
    while isinstance(graph, RowByRow | StepByStep):
        graph = graph._graph
    manifest = graph.manifest
    timeless = any(spec.time_axis is None for spec in manifest.inputs)
    for seed, (rows, steps) in enumerate(SHAPES):
        rows, steps = manifest.rows_per_run or rows, 1 if timeless else manifest.steps_per_run or steps
        if case.name != "a batch that is declared free and fails at two rows" or rows == 1:
            workspace = same(graph, rows, steps, seed)
            assert graph.workspace(rows, steps) is workspace


def test_every_dtype_is_bound(tmp_path: Path) -> None:
    """Lengths of int64, a constant, and a state that is served as an output too; one workspace for each shape."""
    engine = every_dtype(tmp_path)
    seen = {shape: same(engine, *shape, seed) for seed, shape in enumerate(SHAPES)}
    for shape, workspace in seen.items():
        assert engine.workspace(*shape) is workspace


def test_bound_arrays_are_read_and_filled_in_place(tmp_path: Path) -> None:
    """What is written after binding counts, and each run fills the same memory."""
    engine = Engine(write_lstm(tmp_path), threads=1)
    workspace = same(engine, 2, 3, seed=1)
    (first,), after = workspace.run()
    before = first.copy()
    fill(engine, workspace, 2, 3, seed=2)
    (second,), again = workspace.run()
    assert second is first
    assert all(a is b for a, b in zip(after, again, strict=True))
    assert not np.array_equal(second, before)
    # The states of a run that came to nothing are still those that went in.
    assert not any(np.shares_memory(a, b) for a, b in zip(workspace.states, after, strict=True))


def test_sizes_that_are_not_known(tmp_path: Path) -> None:
    """The input is put there by whoever knows its features."""
    engine = any_features(tmp_path)
    workspace = same(engine, 3, 2, seed=1)
    assert engine.workspace(3, 2) is not workspace
    assert engine.workspace(3, 2).inputs == [None]


def test_results_of_another_shape_are_refused(tmp_path: Path) -> None:
    """As a run by name refuses them: a graph that gives other rows than it was given."""
    manifest = Manifest(
        inputs=(tensor("x", "float32", (None, None), 1, 0),),
        outputs=(tensor("y", "float32", (None, None), 1, 0),),
        states=(state("s", "float32", (None,)),),
        streamable=True,
    )
    graph = """g (float[T, N] x, float[N] s) => (float[A, B] y, float[C] s_next) {
        y = Concat<axis = 1>(x, x)  s_next = Neg(s)
    }"""
    engine = Engine(write(tmp_path / "model.onnx", graph, manifest), threads=1)
    workspace = engine.workspace(2, 3)
    feeds = fill(engine, workspace, 2, 3, seed=1)
    with pytest.raises(Exception, match=r"(?i)shape"):
        workspace.run()
    with pytest.raises(ValueError, match="'y' came out as"):
        engine.run(feeds)


def test_a_failed_run_leaves_the_workspace_fit_for_the_next(tmp_path: Path) -> None:
    """An index that the graph does not have fails its run alone."""
    manifest = Manifest(
        inputs=(tensor("token", "int64", (None, None), 1, 0),),
        outputs=(tensor("y", "float32", (None, None, 4), 1, 0),),
        states=(state("s", "float32", (None,)),),
        streamable=True,
    )
    graph = """g (int64[T, N] token, float[N] s) => (float[T, N, 4] y, float[N] s_next) {
        y = Gather(table, token)  s_next = Neg(s)
    }"""
    table = np.arange(8, dtype=np.float32).reshape(2, 4)
    engine = Engine(write(tmp_path / "model.onnx", graph, manifest, {"table": table}), threads=1)
    workspace = same(engine, 2, 3, seed=1)
    (token,) = workspace.inputs
    assert token is not None
    token[0, 0] = 7
    with pytest.raises(Exception, match="indices"):
        workspace.run()
    assert same(engine, 2, 3, seed=2) is workspace


def test_an_interrupted_engine_ends_bound_runs_too(tmp_path: Path) -> None:
    """As every later run."""
    engine = Engine(write_lstm(tmp_path), threads=1)
    workspace = same(engine, 2, 3, seed=1)
    engine.interrupt()
    with pytest.raises(Exception, match="terminate"):
        workspace.run()


def test_as_many_shapes_are_kept_as_there_is_room_for(tmp_path: Path) -> None:
    """Those that have not been used for longest go; all lie in the same memory, and what is too large has none."""
    manifest = Engine(write_lstm(tmp_path), threads=1).manifest
    bound = BoundWorkspaces(manifest, lambda feeds, results: lambda: None, limit_bytes=4096, most=3)
    first, second, third = (bound.get(rows, 1) for rows in (1, 2, 3))
    assert bound.get(1, 1) is first
    bound.get(4, 1)
    assert bound.get(1, 1) is first
    assert bound.get(3, 1) is third
    assert bound.get(2, 1) is not second
    assert first is not None
    assert third is not None
    assert first.states[0].shape == (1, 1, HIDDEN)
    assert third.states[0].shape == (1, 3, HIDDEN)
    assert first.inputs[0] is not None
    assert third.inputs[0] is not None
    assert np.shares_memory(first.inputs[0], third.inputs[0])
    assert bound.get(1000, 1) is None


def test_a_tick_that_is_too_large_for_the_memory_runs_all_the_same(tmp_path: Path) -> None:
    """With arrays of its own."""
    engine = Engine(write_lstm(tmp_path), threads=1)
    rows = (64 << 20) // (4 * INPUT)
    assert engine.workspace(rows, 1) is not engine.workspace(rows, 1)
    assert engine.workspace(5, 2) is engine.workspace(5, 2)
