"""Whole models: what goes in below, how layers and directions stack, what comes out on top."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.reference import initial_states, run_model, run_sequence, stack_states, unstack_states
from models.spec import Layer, ModelSpec
from models.weights import select
from tests.unit.models.drawn import draw, draw_weights

N, T, LENGTHS = 4, 6, np.array([6, 2, 5, 1])
# Layers of different cells, sizes and directions, so that nothing fits where it does not belong.
STACK = (
    Layer("gru", 3, 5, bidirectional=True, learned_initial_state=True),
    Layer("lstm_peephole", 10, 4),
    Layer("lstm", 4, 2, bidirectional=True, learned_initial_state=True),
)


def test_layers_directions_and_head() -> None:
    """A stack is its directions run one by one, side by side, each layer on the one below, the head on top."""
    spec = ModelSpec(STACK, head_size=3)
    weights, x = draw_weights(spec.weight_shapes), draw(N, T, 3)
    below, expected_states = x, []
    for index, layer in enumerate(STACK):
        sides = []
        for prefix in ("", "reverse.")[: layer.directions]:
            here = select(weights, f"layers.{index}.{prefix}")
            start = tuple(np.tile(here[name], (N, 1)) for name in ("h0", "c0") if name in here) or None
            outputs, state = run_sequence(layer, here, below, LENGTHS, start, reverse=bool(prefix))
            sides.append(outputs)
            expected_states.append(state)
        below = np.concatenate(sides, axis=-1)

    y, states = run_model(spec, weights, x, LENGTHS)

    for n, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            y[n, :length], below[n, :length] @ weights["head.W"].T + weights["head.b"], atol=1e-15
        )
        assert not y[n, length:].any()
    assert [len(state) for state in states] == [1, 1, 2, 2, 2]
    for state, expected in zip(states, expected_states, strict=True):
        np.testing.assert_array_equal(np.stack(state), np.stack(expected))


@pytest.mark.parametrize("head_size", [None, 3])
def test_last_valid_step(head_size: int | None) -> None:
    """On the last step alone, a model gives what it gives on every step at each row's last valid one."""
    every = ModelSpec(STACK, head_size=head_size)
    weights, x = draw_weights(every.weight_shapes), draw(N, T, 3)
    y, states = run_model(every, weights, x, LENGTHS)
    last, last_states = run_model(replace(every, head_on="last"), weights, x, LENGTHS)
    np.testing.assert_allclose(last, y[np.arange(N), LENGTHS - 1], atol=1e-15)
    assert last.shape == (N, every.output_size)
    for state, expected in zip(last_states, states, strict=True):
        np.testing.assert_array_equal(np.stack(state), np.stack(expected))


def test_tokens() -> None:
    """Token ids give what their embeddings give as vectors."""
    tokens_in = ModelSpec((Layer("lstm", 3, 4),), vocabulary_size=9)
    weights = draw_weights(tokens_in.weight_shapes)
    ids = np.random.default_rng(3).integers(0, 9, (N, T))
    y, _ = run_model(tokens_in, weights, ids, LENGTHS)
    vectors = {name: array for name, array in weights.items() if name != "embedding"}
    expected, _ = run_model(replace(tokens_in, vocabulary_size=None), vectors, weights["embedding"][ids], LENGTHS)
    np.testing.assert_array_equal(y, expected)


def test_given_states_replace_the_learned_ones() -> None:
    """A sequence cut in two with the states handed on equals the whole; learned states stand in where none come."""
    spec = ModelSpec((Layer("lstm", 3, 4, learned_initial_state=True), Layer("gru", 4, 5)))
    weights, x = draw_weights(spec.weight_shapes), draw(N, T, 3)
    whole, final = run_model(spec, weights, x)
    first, states = run_model(spec, weights, x[:, :2])
    rest, after = run_model(spec, weights, x[:, 2:], states=states)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=1e-15)
    np.testing.assert_allclose(
        np.concatenate([*after[0], *after[1]], 1), np.concatenate([*final[0], *final[1]], 1), atol=1e-15
    )
    np.testing.assert_array_equal(initial_states(spec, weights, 2)[0][1], np.tile(weights["layers.0.c0"], (2, 1)))


def test_stacked_states() -> None:
    """States of a uniform model stack to [L * directions, N, H], layer by layer, forward first, and back."""
    states = [(draw(N, 4, seed=seed), draw(N, 4, seed=seed + 9)) for seed in range(4)]
    h, c = stack_states(states)
    assert h.shape == c.shape == (4, N, 4)
    assert np.array_equal(c[2], states[2][1])
    for state, expected in zip(unstack_states((h, c)), states, strict=True):
        np.testing.assert_array_equal(np.stack(state), np.stack(expected))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype_is_kept(dtype: type) -> None:
    """Outputs and states are in the dtype of weights and input."""
    spec = ModelSpec(STACK, head_size=3)
    y, states = run_model(spec, draw_weights(spec.weight_shapes, dtype=dtype), draw(N, T, 3).astype(dtype), LENGTHS)
    assert {y.dtype, *(part.dtype for state in states for part in state)} == {np.dtype(dtype)}


PLAIN = ModelSpec((Layer("lstm", 3, 4),), head_on="last")
TOKENS = ModelSpec((Layer("lstm", 3, 4),), vocabulary_size=9)


@pytest.mark.parametrize(
    ("spec", "weights", "arguments", "message"),
    [
        (PLAIN, {"extra": np.zeros(1)}, {}, r"missing \[\], unknown \['extra'\]"),
        (PLAIN, {"layers.0.b": np.zeros(15)}, {}, r"'layers.0.b' has shape \(15,\), expected \(16,\)"),
        (PLAIN, {}, {"x": np.zeros((2, 5, 3), int)}, r"expected floating point \[N, T, 3\]"),
        (PLAIN, {}, {"states": []}, "got 0 states, expected 1"),
        (PLAIN, {}, {"lengths": np.array([0, 5])}, "no valid step"),
        (TOKENS, {}, {"x": np.zeros((2, 5))}, r"expected integer token ids \[N, T\]"),
        (TOKENS, {}, {"x": np.full((2, 5), 9)}, "between 9 and 9, expected 0 to 8"),
        (TOKENS, {}, {"x": np.full((2, 5), -1)}, "between -1 and -1"),
    ],
)
def test_refusals(spec: ModelSpec, weights: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    """What does not fit is refused, with what was expected."""
    with pytest.raises(ValueError, match=message):
        run_model(spec, draw_weights(spec.weight_shapes) | weights, **{"x": np.zeros((2, 5, 3)), **arguments})


def test_missing_weights_are_named() -> None:
    """A weight that is not there is refused by name."""
    with pytest.raises(ValueError, match=r"missing \['layers.0.W_h', 'layers.0.W_x', 'layers.0.b'\]"):
        run_model(PLAIN, {}, np.zeros((2, 5, 3)))
