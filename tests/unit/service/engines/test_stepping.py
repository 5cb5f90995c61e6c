"""The loops over rows and steps against the same graph run whole: a loop changes nothing but how often it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.engines.engine import Engine
from service.engines.stepping import RowByRow, StepByStep
from service.graphs.graph import Array, Graph
from tests.graphs import HIDDEN, INPUT, write_lstm

LENGTHS = [4, 1, 6, 4]


def feeds(graph: Graph) -> dict[str, Array]:
    """Four rows of different lengths, from states of their own."""
    random = np.random.default_rng(3)
    x = np.zeros((6, 4, INPUT), np.float32)
    for row, length in enumerate(LENGTHS):
        x[:length, row] = random.uniform(-1, 1, (length, INPUT))
    states = {name: random.uniform(-1, 1, (1, 4, HIDDEN)).astype(np.float32) for name in ("h0", "c0")}
    return {"x": x, str(graph.manifest.lengths): np.array(LENGTHS, np.int32), **states}


def close(given: Array, expected: Array) -> None:
    """Equal up to float32's last bits."""
    np.testing.assert_allclose(given.astype(np.float64), expected.astype(np.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loops", [(RowByRow,), (StepByStep,), (StepByStep, RowByRow)], ids=["rows", "steps", "both"])
def test_a_loop_gives_what_the_whole_gives(
    tmp_path: Path, loops: tuple[type[RowByRow] | type[StepByStep], ...]
) -> None:
    """Outputs up to each row's length, zeros behind it, and the states of its end; what was given stays as it was."""
    engine = Engine(write_lstm(tmp_path), threads=1)
    graph: Graph = engine
    for loop in loops:
        graph = loop(graph)
    given = feeds(graph)
    before = {name: array.copy() for name, array in given.items()}
    (y,), states = graph.run(given)
    (expected,), expected_states = engine.run(before)
    assert y.shape == expected.shape
    for row, length in enumerate(LENGTHS):
        close(y[:length, row], expected[:length, row])
        assert not y[length:, row].any()
    for state, should in zip(states, expected_states, strict=True):
        close(state, should)
    for name, array in before.items():
        np.testing.assert_array_equal(given[name], array)


def test_each_loop_runs_only_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has as many steps as it has: no run holds padding."""
    runs: list[tuple[int, ...]] = []
    engine = Engine(write_lstm(tmp_path), threads=1)
    run = engine.run

    def watched(feeds: dict[str, Array]) -> object:
        runs.append(feeds["x"].shape[:2])
        return run(feeds)

    monkeypatch.setattr(engine, "run", watched)
    RowByRow(engine).run(feeds(engine))
    assert runs == [(4, 1), (1, 1), (6, 1), (4, 1)]
    runs.clear()
    StepByStep(engine).run(feeds(engine))
    assert runs == [(1, 4), (1, 3), (1, 3), (1, 3), (1, 1), (1, 1)]


def test_what_a_loop_says_of_itself(tmp_path: Path) -> None:
    """The graph's own manifest and digest; rows may differ in length, whatever runs inside."""
    engine = Engine(write_lstm(tmp_path), threads=1)
    looped = RowByRow(StepByStep(engine))
    assert looped.digest == engine.digest
    assert looped.manifest == engine.manifest.model_copy(update={"rows_per_run": 1})
    engine.manifest = engine.manifest.model_copy(update={"lengths": None})
    assert StepByStep(engine).manifest.lengths is not None
