"""What is held of a graph before it is served, with real graphs: what passes, what is looped, what is refused."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import quantize_dynamic

from service.engines.engine import Engine
from service.errors import LoadError
from service.graphs.description import parse
from service.graphs.presented import present
from service.manifest import Parity, ParityRow
from service.settings import Settings
from service.versions.audit import audit
from service.versions.loading import Loaded, load_model
from tests.any_graphs import CASES, CELL, GRU, LSTM, H, I, draw, model, place

BY_NAME = {case.name: case for case in CASES}
SWAPPED = """\
    inputs: {x: {time_axis: 0, batch_axis: 1}}
    states:
      - {input: h0, output: cT, batch_axis: 1}
      - {input: c0, output: hT, batch_axis: 1}
    outputs: {y: {time_axis: 0, batch_axis: 1}}
    """
LSTM_GRAPH = """g (float[T, N, 3] x, float[1, N, 4] h0, float[1, N, 4] c0)
    => (float[T, N, 4] y, float[1, N, 4] hT, float[1, N, 4] cT) {
    Y, hT, cT = LSTM<hidden_size = 4>(x, W, R, B, , h0, c0)
    y = Squeeze(Y, axis)
}"""
STEP = """\
    inputs: {x: {batch_axis: 0}}
    states: [{input: h, output: h_next, batch_axis: 0}]
    outputs: {y: {batch_axis: 0}}
    """


def load(folder: Path, graph: str, weights: dict[str, Any], description: str) -> Loaded:
    """Load a graph, described."""
    return load_model(place(folder, "any", model(graph, weights), description), Settings(threads=1))


def test_swapped_states_are_found(tmp_path: Path) -> None:
    """Two of one shape, the wrong way round: whole and chunks differ, and the error says what it may be."""
    says = (
        r"in chunks gives other results than whole \((output|state) .*, 1e-05 allowed\): two states .* may be swapped"
    )
    with pytest.raises(LoadError, match=says):
        load(tmp_path / "wrong", LSTM_GRAPH, LSTM, SWAPPED)
    right = SWAPPED.replace("cT", "?").replace("hT", "cT").replace("?", "hT")
    assert load(tmp_path / "right", LSTM_GRAPH, LSTM, right).warnings == ()


def test_a_state_that_was_left_out_is_found(tmp_path: Path) -> None:
    """A graph that begins anew in every run does not carry a sequence."""
    graph = (
        """g (float[T, N, 3] x) => (float[T, N, 4] y) { Y, hT = GRU<hidden_size = 4>(x, W, R)  y = Squeeze(Y, axis) }"""
    )
    description = "{inputs: {x: {time_axis: 0, batch_axis: 1}}, outputs: {y: {time_axis: 0, batch_axis: 1}}}"
    with pytest.raises(LoadError, match=r"output 'y' by .* or a state left out"):
        load(tmp_path, graph, GRU, description)


def test_a_graph_that_reads_both_ways(tmp_path: Path) -> None:
    """Refused as a stream, and served without one where its description says so."""
    graph = """g (float[T, N, 3] x) => (float[T, N, 8] y) {
        Y = GRU<hidden_size = 4, direction = "bidirectional">(x, W, R)
        t = Transpose<perm = [0, 2, 1, 3]>(Y)  y = Reshape(t, sizes)
    }"""
    weights = {"W": draw(2, 3 * H, 3), "R": draw(2, 3 * H, H), "sizes": np.array([0, 0, 2 * H])}
    description = "inputs: {x: {time_axis: 0, batch_axis: 1}}\noutputs: {y: {time_axis: 0, batch_axis: 1}}\n"
    with pytest.raises(LoadError, match=r"of a graph that reads both ways, model\.yaml says streamable: false"):
        load(tmp_path / "a", graph, weights, description)
    loaded = load(tmp_path / "b", graph, weights, description + "streamable: false")
    assert not loaded.graph.manifest.streamable
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a batch that is declared free and fails at two rows", r"it does not run on 3 rows \(.*requested shape"),
        (
            "rows that are mixed",
            r"a row among 3 gives other results than alone \(output 'y' by 0\.\d+, 1e-05 allowed\)",
        ),
    ],
)
def test_rows_that_do_not_keep_to_themselves(tmp_path: Path, name: str, says: str) -> None:
    """Run row by row with a warning; refused where the description is strict; no word where the operator chose so."""
    case = BY_NAME[name]
    settings = Settings(threads=1)
    path = case.write(tmp_path)
    loaded = load_model(path, settings)
    (warning,) = loaded.warnings
    assert warning.endswith("; it is run row by row")
    assert loaded.graph.manifest.rows_per_run == 1
    yaml = path.parent.parent / "model.yaml"
    described = yaml.read_text()
    yaml.write_text(described + "strict: true")
    with pytest.raises(LoadError, match=f"{says}.* and model.yaml says strict"):
        load_model(path, settings)
    yaml.write_text(described + "strict: true\nrow_by_row: true")
    assert load_model(path, settings).warnings == ()


def test_rows_that_are_mixed_over_their_padding(tmp_path: Path) -> None:
    """A graph that ignores lengths gives a short row its neighbour's steps: found on rows of different lengths."""
    graph = """g (float[T, N, 3] x, int32[N] lens, float[1, N, 4] h0) => (float[T, N, 4] y, float[1, N, 4] hT) {
        Y, hT = GRU<hidden_size = 4>(x, W, R, , , h0)
        y = Squeeze(Y, axis)
    }"""
    description = """\
        inputs: {x: {time_axis: 0, batch_axis: 1}, lens: {role: lengths}}
        states: [{input: h0, output: hT, batch_axis: 1}]
        outputs: {y: {time_axis: 0, batch_axis: 1}}
        """
    (warning,) = load(tmp_path, graph, GRU, description).warnings
    assert warning.startswith("a row among 3 gives other results than alone (state 'h0' by ")


def test_chance(tmp_path: Path) -> None:
    """A second run that gives other results is told, and refused where the description is strict."""
    graph = """g (float[N, 3] x, float[N, 4] h) => (float[N, 4] y, float[N, 4] h_next) {
        a = MatMul(x, W)  h_next = Add(a, h)
        noise = RandomUniformLike<high = 1.0e-7>(h)  y = Add(h_next, noise)
    }"""
    (warning,) = load(tmp_path / "a", graph, CELL, STEP).warnings
    assert warning == "a second run of the same input gives other results"
    with pytest.raises(
        LoadError, match=r"a second run of the same input gives other results, and model\.yaml says strict"
    ):
        load(tmp_path / "b", graph, CELL, dedent(STEP) + "strict: true")


def test_states_that_are_no_numbers(tmp_path: Path) -> None:
    """A state that holds NaN or infinity is told."""
    graph = """g (float[N, 3] x, float[N, 4] h) => (float[N, 4] y, float[N, 4] h_next) {
        a = MatMul(x, W)  l = Log(a)  h_next = Add(l, h)  y = MatMul(a, R)
    }"""
    state, unknown = load(tmp_path, graph, CELL, STEP).warnings
    assert state == "state 'h' holds NaN or infinity after random input"
    assert unknown == "rows and chunks could not be checked: results hold NaN after random input"


def test_a_graph_whose_results_are_not_as_described(tmp_path: Path) -> None:
    """Where the file leaves axes unsaid, the run shows what they are."""
    graph = """g (float[N, 3] x, float[N, 4] h, int64[k] sizes) => (float[] y, float[N, 4] h_next) {
        a = MatMul(x, W)  h_next = Add(a, h)  y = Reshape(h_next, sizes)
    }"""
    described = """\
        inputs: {x: {batch_axis: 0}, sizes: {role: constant, value: [-1, 2]}}
        states: [{input: h, output: h_next, batch_axis: 0}]
        outputs: {y: {batch_axis: 0, shape: [null, 4]}}
        """
    with pytest.raises(
        LoadError, match=r"does not run: 'y' came out as \[2, 1, 2\] for 1 rows and 1 steps; expected \[1, 1, 4\]"
    ):
        load(tmp_path / "a", graph, CELL, described)
    assert load(tmp_path / "b", graph, CELL, described.replace("[-1, 2]", "[-1, 4]")).warnings == ()


def test_a_graph_that_does_not_run(tmp_path: Path) -> None:
    """The reason, and what the description could say of sizes that were tried as 1."""
    graph = """g (float[N, S] x, float[N, 4] h) => (float[N, 4] y, float[N, 4] h_next) {
        a = MatMul(x, W)  h_next = Add(a, h)  y = Identity(h_next)
    }"""
    free = STEP.replace("{x: {batch_axis: 0}}", "{x: {batch_axis: 0, shape: [null, null]}}")
    with pytest.raises(
        LoadError, match=r"the model does not run: .*; inputs \['x'\] were tried with size 1 .* give a shape"
    ):
        load(tmp_path / "a", graph, CELL, free)
    assert load(tmp_path / "b", graph, CELL, free.replace("null, null", "null, 3")).warnings == ()


def test_a_tolerance_of_its_own(tmp_path: Path) -> None:
    """Rows that are mixed by less than the operator lets pass are served together."""
    case = BY_NAME["rows that are mixed"]
    path = place(tmp_path, "any", model(case.graph, case.weights), dedent(case.description) + "tolerance: 2.0")
    loaded = load_model(path, Settings(threads=1))
    assert loaded.warnings == ()
    assert loaded.graph.manifest.rows_per_run is None


# --- what shows only later, elsewhere, or not at all ---

BATCH_FIRST = """\
    inputs: {x: {batch_axis: 0, time_axis: 1}}
    states: [{input: h0, output: hT, batch_axis: 1}]
    outputs: {y: {batch_axis: 0, time_axis: 1}}
    """
MIXED_STATES = """g (float[N, T, 3] x, float[1, N, 4] h0) => (float[N, T, 4] y, float[1, N, 4] hT) {
    mean = ReduceMean<keepdims = 1>(h0, rows)  zero = Sub(h0, h0)  h = Add(zero, mean)
    t = Transpose<perm = [1, 0, 2]>(x)
    Y, hT = GRU<hidden_size = 4>(t, W, R, , , h)
    u = Squeeze(Y, axis)  y = Transpose<perm = [1, 0, 2]>(u)
}"""


@pytest.mark.parametrize("also", ["", "streamable: false"])
def test_rows_that_are_mixed_through_their_states(tmp_path: Path, also: str) -> None:
    """From the beginning, where all states are alike, it does not show; of a stream or of whole sequences."""
    loaded = load(tmp_path, MIXED_STATES, GRU | {"rows": np.array([1])}, dedent(BATCH_FIRST) + also)
    (warning,) = loaded.warnings
    assert warning.startswith("a row among 3 gives other results than alone (")
    assert loaded.graph.manifest.rows_per_run == 1


def test_rows_that_are_mixed_when_there_are_many(tmp_path: Path) -> None:
    """A graph may keep three rows apart, and not four."""
    graph = """g (float[N, 3] x, float[N, 4] h) => (float[N, 2] y, float[N, 4] h_next) {
        n = Shape<start = 0, end = 1>(x)  size = Cast<to = 1>(n)  over = Sub(size, three)  on = Clip(over, zero, one)
        mean = ReduceMean<keepdims = 1>(x, rows)  m = Mul(mean, on)  d = Add(x, m)
        a = MatMul(d, W)  b = MatMul(h, R)  s = Add(a, b)  h_next = Tanh(s)  y = MatMul(h_next, V)
    }"""
    numbers = {name: np.array(value, np.float32) for name, value in (("zero", 0), ("one", 1), ("three", 3))}
    (warning,) = load(tmp_path, graph, CELL | numbers | {"rows": np.array([0])}, STEP).warnings
    assert warning.startswith("a row among 33 gives other results than alone (")


def test_input_that_must_be_positive(tmp_path: Path) -> None:
    """NaN is equal to itself and hides whatever is wrong: input is drawn anew where results hold it."""
    graph = LSTM_GRAPH.replace(
        "Y, hT, cT = LSTM<hidden_size = 4>(x,", "l = Log(x)  Y, hT, cT = LSTM<hidden_size = 4>(l,"
    )
    with pytest.raises(LoadError, match="two states of one shape may be swapped"):
        load(tmp_path / "wrong", graph, LSTM, SWAPPED)
    right = SWAPPED.replace("cT", "?").replace("hT", "cT").replace("?", "hT")
    assert load(tmp_path / "right", graph, LSTM, right).warnings == ()


def test_results_that_show_nothing(tmp_path: Path) -> None:
    """NaN whatever goes in: no difference is told as though it had been seen."""
    graph = """g (float[N, T, 3] x, float[1, N, 4] h0) => (float[N, T, 4] y, float[1, N, 4] hT) {
        n = Neg(x)  m = Sub(n, one)  l = Sqrt(m)  t = Transpose<perm = [1, 0, 2]>(l)
        Y, hT = GRU<hidden_size = 4>(t, W, R, , , h0)
        u = Squeeze(Y, axis)  y = Transpose<perm = [1, 0, 2]>(u)
    }"""
    loaded = load(tmp_path, graph, GRU | {"one": np.array(1, np.float32)}, BATCH_FIRST)
    found = audit(loaded.graph)
    assert (found.rows, found.chunks) == (None, None)
    assert "rows and chunks could not be checked: results hold NaN after random input" in loaded.warnings


def test_a_state_in_which_the_graph_does_not_run(tmp_path: Path) -> None:
    """It runs from the beginning and not from what that gives: no sequence would get past its first step."""
    graph = """g (float[T, N, 3] x, float[1, N, 4] h0) => (float[T, N, 4] y, float[1, N, 4] hT) {
        used = Abs(h0)  most = ReduceMax<keepdims = 0>(used)  far = Ceil(most)
        i = Cast<to = 7>(far)  g = Gather(only, i)  h = Add(h0, g)
        Y, hT = GRU<hidden_size = 4>(x, W, R, , , h)  y = Squeeze(Y, axis)
    }"""
    description = BATCH_FIRST.replace("batch_axis: 0, time_axis: 1", "batch_axis: 1, time_axis: 0")
    with pytest.raises(LoadError, match="does not run from the states that it gives"):
        load(tmp_path, graph, GRU | {"only": np.zeros(1, np.float32)}, description)


def test_a_graph_whose_single_steps_differ(tmp_path: Path) -> None:
    """Chunks of two and three steps are right, and those of one step are not."""
    graph = """g (float[T, N, 3] x, float[1, N, 4] h0) => (float[T, N, 4] y, float[1, N, 4] hT) {
        n = Shape<start = 0, end = 1>(x)  size = Cast<to = 1>(n)  short = Sub(two, size)  on = Clip(short, zero, one)
        d = Add(x, on)  Y, hT = GRU<hidden_size = 4>(d, W, R, , , h0)  y = Squeeze(Y, axis)
    }"""
    numbers = {name: np.array(value, np.float32) for name, value in (("zero", 0), ("one", 1), ("two", 2))}
    description = BATCH_FIRST.replace("batch_axis: 0, time_axis: 1", "batch_axis: 1, time_axis: 0")
    with pytest.raises(LoadError, match="a sequence in chunks gives other results than whole"):
        load(tmp_path, graph, GRU | numbers, description)


def test_integers_have_a_tolerance_too(tmp_path: Path) -> None:
    """Rounded from real numbers, some of them differ by chance: refused, told how to let it pass, and then served."""
    graph = """g (float[T, N, 3] x, float[1, N, 4] h0) => (int32[T, N, 4] y, float[1, N, 4] hT) {
        Y, hT = GRU<hidden_size = 4>(x, W, R, , , h0)  u = Squeeze(Y, axis)
        n = Shape<start = 0, end = 1>(x)  size = Cast<to = 1>(n)  share = Mul(size, little)
        v = Add(u, share)  z = Mul(v, scale)  r = Round(z)  y = Cast<to = 6>(r)
    }"""
    numbers = {"scale": np.array(1e4, np.float32), "little": np.array(2e-6, np.float32)}
    description = dedent(BATCH_FIRST.replace("batch_axis: 0, time_axis: 1", "batch_axis: 1, time_axis: 0"))
    says = r"output 'y' by 0\.\d+ of its int32 values, 0 allowed.* tolerance lets more pass"
    with pytest.raises(LoadError, match=says):
        load(tmp_path / "a", graph, GRU | numbers, description)
    assert load(tmp_path / "b", graph, GRU | numbers, description + "tolerance: 0.4").warnings == ()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_graph_that_was_quantised(tmp_path: Path, swapped: bool) -> None:
    """Its scale follows each run's input: chunks differ by what int8 differs by, and a swapped pair by more."""
    size = 64
    weights = {
        "W": 0.2 * draw(1, 4 * size, I),
        "R": 0.2 * draw(1, 4 * size, size),
        "B": draw(1, 8 * size),
        "axis": np.array([1]),
    }
    graph = LSTM_GRAPH.replace("4", str(size))
    path = place(tmp_path, "any", model(graph, weights), "")
    quantize_dynamic(path, path)
    right = SWAPPED.replace("cT", "?").replace("hT", "cT").replace("?", "hT")
    (path.parent.parent / "model.yaml").write_text(dedent(SWAPPED if swapped else right))
    if swapped:
        with pytest.raises(LoadError, match=r"0\.05 allowed"):
            load_model(path, Settings(threads=1))
    else:
        loaded = load_model(path, Settings(threads=1))
        assert loaded.graph.manifest.precision == "int8"
        assert audit(loaded.graph).chunks > 1e-5  # type: ignore[operator]


def test_states_that_only_their_description_pairs(tmp_path: Path) -> None:
    """Two of one shape, one step a run: told, but no reason to refuse, because each LSTM cell is such a graph."""
    graph = """g (float[N, 3] x, float[N, 4] h, float[N, 4] c) => (float[N, 4] h_next, float[N, 4] c_next) {
        a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)  c_next = Add(c, s)  h_next = Tanh(c_next)
    }"""
    description = """\
        inputs: {x: {batch_axis: 0}}
        states: [{input: h, output: h_next, batch_axis: 0}, {input: c, output: c_next, batch_axis: 0}]
        outputs: {h_next: {batch_axis: 0}}
        strict: true
        """
    (warning,) = load(tmp_path, graph, CELL, description).warnings
    assert warning.startswith("states 'h', 'c' are alike and a run takes one step: nothing here can show")


def test_axes_that_were_taken_for_each_other(tmp_path: Path) -> None:
    """Of a graph that fails on what was tried, that is told."""
    swapped = SWAPPED.replace("time_axis: 0, batch_axis: 1", "time_axis: 1, batch_axis: 0")
    with pytest.raises(LoadError, match=r"'x' was \[1, 5, 3\], 1 row and 5 steps: are time_axis and batch_axis as the"):
        load(tmp_path, LSTM_GRAPH, LSTM, swapped)


@pytest.mark.parametrize(("bound", "passes"), [(1e-3, True), (1e-7, False)])
def test_what_export_measured_is_allowed(tmp_path: Path, bound: float, passes: bool) -> None:
    """A model whose rounding errors grow was let through by its export: two runs may differ by twice that."""
    mixed = BY_NAME["rows that are mixed"]
    weights = {**mixed.weights, "little": np.array(1e-4, np.float32)}
    graph = mixed.graph.replace("d = Add(x, mean)", "m = Mul(mean, little)  d = Add(x, m)")
    engine = Engine(
        place(tmp_path, "any", model(graph, weights)),
        threads=1,
        describe=lambda signature: present(
            parse(dedent(mixed.description)), signature, tmp_path, lambda name: None
        ).model_copy(update={"parity": Parity(reference="", provider="", rows=(_row(bound), _row(np.inf)))}),
    )
    assert (audit(engine).graph is engine) == passes


def _row(bound: float) -> ParityRow:
    return ParityRow(case="", batch=1, steps=1, outputs=0, states=0, bound=bound)
