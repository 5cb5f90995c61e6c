"""A cell over time: lengths, direction, chunks, and what must not depend on the neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.reference import State, run_sequence, step
from models.spec import Layer
from models.weights import Array
from tests.unit.models.drawn import LAYERS, draw, draw_weights

every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
N, T, LENGTHS = 5, 7, np.array([7, 1, 4, 0, 6])


def _state(layer: Layer) -> State:
    return tuple(draw(N, 4, seed=2 + part) for part in range(1 + layer.has_cell_state))


def _assert_close(actual: tuple[Array, State], expected: tuple[Array, State]) -> None:
    for one, other in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


@every_layer
@pytest.mark.parametrize("reverse", [False, True])
def test_is_its_steps_one_by_one(layer: Layer, reverse: bool) -> None:
    """Rows of any length, read either way, equal the cell's step applied to each row on its own.

    Past a row's length the outputs are 0, the state stays, and what stands in x (here NaN) is not seen.
    """
    weights, x, start = draw_weights(layer.weight_shapes), draw(N, T, 3), _state(layer)
    for n, length in enumerate(LENGTHS):
        x[n, length:] = np.nan

    outputs = np.zeros((N, T, 4))
    final = tuple(part.copy() for part in start)
    for n, length in enumerate(LENGTHS):
        state = tuple(part[n : n + 1] for part in start)
        for t in reversed(range(length)) if reverse else range(length):
            state = step(layer, weights, x[n : n + 1, t], state)
            outputs[n, t] = state[0]
        for part, row in zip(final, state, strict=True):
            part[n] = row

    _assert_close(run_sequence(layer, weights, x, LENGTHS, start, reverse), (outputs, final))


@every_layer
def test_chunks_add_up(layer: Layer) -> None:
    """A sequence cut into chunks of 1, 4 and 2 steps, the state handed on, gives the whole one's outputs and state."""
    weights, x, state = draw_weights(layer.weight_shapes), draw(N, T, 3), _state(layer)
    whole = run_sequence(layer, weights, x, state=state)
    pieces = []
    for chunk in np.split(x, [1, 5], axis=1):
        outputs, state = run_sequence(layer, weights, chunk, state=state)
        pieces.append(outputs)
    _assert_close((np.concatenate(pieces, axis=1), state), whole)


@every_layer
def test_no_state_is_zeros(layer: Layer) -> None:
    """Leaving the initial state out is the same as giving zeros."""
    weights, x = draw_weights(layer.weight_shapes), draw(N, T, 3)
    zeros = (np.zeros((N, 4)),) * (1 + layer.has_cell_state)
    _assert_close(run_sequence(layer, weights, x), run_sequence(layer, weights, x, state=zeros))


def test_nothing_to_do() -> None:
    """No steps leave the state as it is; no rows give empty arrays of the right shape."""
    layer = LAYERS["lstm"]
    weights, state = draw_weights(layer.weight_shapes), _state(layer)
    outputs, after = run_sequence(layer, weights, np.zeros((N, 0, 3)), state=state)
    assert outputs.shape == (N, 0, 4)
    assert all(np.array_equal(one, other) for one, other in zip(after, state, strict=True))
    outputs, after = run_sequence(layer, weights, np.zeros((0, T, 3)), reverse=True)
    assert outputs.shape == (0, T, 4)
    assert [part.shape for part in after] == [(0, 4)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3))}, r"x has shape \(2, 3\), expected \[N, T, 3\]"),
        ({"x": np.zeros((2, 5, 4))}, r"expected \[N, T, 3\]"),
        ({"lengths": np.array([5, 6])}, "lie between 5 and 6, expected 0 to T = 5"),
        ({"lengths": np.array([-1, 5])}, "lie between -1 and 5"),
        ({"lengths": np.array([5])}, r"expected integers of shape \(2,\)"),
        ({"lengths": np.array([5.0, 5.0])}, "lengths are float64"),
        ({"state": (np.zeros((2, 4)),)}, r"expected \(h, c\), each \(2, 4\)"),
        ({"state": (np.zeros((1, 4)),) * 2}, r"has shapes \[\(1, 4\), \(1, 4\)\]"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    """What does not fit is refused, with what was expected."""
    layer = LAYERS["lstm"]
    with pytest.raises(ValueError, match=message):
        run_sequence(layer, draw_weights(layer.weight_shapes), **{"x": np.zeros((2, 5, 3)), **change})
