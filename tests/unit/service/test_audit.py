"""What is held of a graph before it is served, with real graphs: what passes, what is looped, what is refused."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from service.errors import LoadError
from service.loading import Loaded, load_model
from service.settings import Settings
from tests.any_graphs import CASES, CELL, GRU, LSTM, H, draw, model, place

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
    (warning,) = load(tmp_path, graph, CELL, STEP).warnings
    assert warning == "state 'h' holds NaN or infinity after random input"


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
