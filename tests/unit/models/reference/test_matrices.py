"""The LSTM from eight bias-free matrices."""

from __future__ import annotations

import numpy as np
import pytest

from models.reference import run_matrices
from models.weights import Array
from tests.unit.models.drawn import draw

B, T, I, H = 3, 5, 4, 6
MATRICES = tuple(0.5 * draw(I if index % 2 == 0 else H, H, seed=index) for index in range(8))


def _sigmoid(a: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-a))
    return result


@pytest.mark.parametrize("given_state", [False, True])
def test_equals_the_equations_gate_by_gate(given_state: bool) -> None:
    """The eight matrices go in as they are, each gate ``x @ U + h @ W``; out come outputs[B, T, H], h and c."""
    U_f, W_f, U_i, W_i, U_c, W_c, U_o, W_o = MATRICES
    x = draw(B, T, I)
    start = {"h": draw(B, H, seed=10), "c": draw(B, H, seed=11)} if given_state else {}
    h, c = start.get("h", np.zeros((B, H))), start.get("c", np.zeros((B, H)))
    steps = []
    for t in range(T):
        f = _sigmoid(x[:, t] @ U_f + h @ W_f)
        i = _sigmoid(x[:, t] @ U_i + h @ W_i)
        o = _sigmoid(x[:, t] @ U_o + h @ W_o)
        c = f * c + i * np.tanh(x[:, t] @ U_c + h @ W_c)
        h = o * np.tanh(c)
        steps.append(h)

    outputs, final_h, final_c = run_matrices(MATRICES, x, **start)

    assert outputs.shape == (B, T, H)
    np.testing.assert_allclose(outputs, np.stack(steps, axis=1), rtol=0, atol=1e-14)
    np.testing.assert_allclose(final_h, h, rtol=0, atol=1e-14)
    np.testing.assert_allclose(final_c, c, rtol=0, atol=1e-14)


def test_lengths() -> None:
    """A shorter row ends where it ends."""
    x = draw(B, T, I)
    outputs, h, c = run_matrices(MATRICES, x, lengths=np.array([T, 2, 3]))
    short, short_h, short_c = run_matrices(MATRICES, x[1:2, :2])
    np.testing.assert_allclose(outputs[1, :2], short[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.stack([h[1], c[1]]), np.stack([short_h[0], short_c[0]]), rtol=0, atol=1e-14)
    assert not outputs[1, 2:].any()


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (MATRICES[:7], "expected U_f, W_f"),
        ((*MATRICES[:7], np.zeros((H, H + 1))), r"'W_o' has shape \(6, 7\), expected \(6, 6\)"),
        (MATRICES[::-1], r"expected \(6, 6\)"),
    ],
)
def test_refusals(matrices: tuple[Array, ...], message: str) -> None:
    """Too few, a wrong shape, or U and W swapped are refused."""
    with pytest.raises(ValueError, match=message):
        run_matrices(matrices, draw(B, T, I))
