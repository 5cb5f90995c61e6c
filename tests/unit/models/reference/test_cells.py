"""One step of each cell against its equation, worked out number by number."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, tanh

import numpy as np
import pytest

from models.reference import State, step
from models.reference.cells import sigmoid
from models.spec import GATES, Activation, Layer
from tests.unit.models.drawn import LAYERS, draw, draw_weights

# One input, one hidden and one cell value, and for each gate a weight of its own, so that no two can be mistaken.
X, H, C = 0.7, -0.4, 0.9
W_X = {"i": 0.3, "f": -0.8, "c": 1.1, "o": 0.6, "r": 0.5, "z": -0.2, "h": 0.9}
W_H = {"i": -0.5, "f": 0.7, "c": 0.2, "o": -0.9, "r": 1.3, "z": 0.4, "h": -0.6}
B = {"i": 0.05, "f": 1.0, "c": -0.15, "o": 0.25, "r": -0.35, "z": 0.45, "h": 0.55}
V = {"i": 0.8, "f": -0.3, "o": 1.7}
B_H = 0.65

both_activations = pytest.mark.parametrize(
    ("activation", "g"), [("tanh", tanh), ("relu", lambda a: max(0.0, a))], ids=["tanh", "relu"]
)


def _sigmoid(a: float) -> float:
    return 1 / (1 + exp(-a))


def _gate(name: str) -> float:
    return W_X[name] * X + W_H[name] * H + B[name]


def _step(layer: Layer) -> list[float]:
    names = GATES[layer.cell]
    weights = {
        "W_x": np.array([[W_X[name]] for name in names]),
        "W_h": np.array([[W_H[name]] for name in names]),
        "b": np.array([B[name] for name in names]),
        "V": np.array([V[name] for name in names if name in V]),
        "b_h": np.array([B_H]),
    }
    state = (np.array([[H]]), np.array([[C]])) if layer.has_cell_state else (np.array([[H]]),)
    return [part.item() for part in step(layer, weights, np.array([[X]]), state)]


@both_activations
def test_rnn(activation: Activation, g: Callable[[float], float]) -> None:
    """The state is h = g(W_x x + W_h h + b)."""
    assert _step(Layer("rnn", 1, 1, activation=activation)) == pytest.approx([g(_gate("h"))], abs=1e-15)


@both_activations
def test_lstm(activation: Activation, g: Callable[[float], float]) -> None:
    """The belt is c = f*c + i*c~, and h = o*tanh(c); the activation is the candidate's alone."""
    c = _sigmoid(_gate("f")) * C + _sigmoid(_gate("i")) * g(_gate("c"))
    h = _sigmoid(_gate("o")) * tanh(c)
    assert _step(Layer("lstm", 1, 1, activation=activation)) == pytest.approx([h, c], abs=1e-15)


def test_lstm_peephole() -> None:
    """The input and forget gates see the old cell state, the output gate the new one."""
    c = _sigmoid(_gate("f") + V["f"] * C) * C + _sigmoid(_gate("i") + V["i"] * C) * tanh(_gate("c"))
    h = _sigmoid(_gate("o") + V["o"] * c) * tanh(c)
    assert _step(Layer("lstm_peephole", 1, 1)) == pytest.approx([h, c], abs=1e-15)


@pytest.mark.parametrize("peepholes", [False, True])
def test_lstm_coupled(peepholes: bool) -> None:
    """The input gate is i = 1 - f, without and with peepholes."""
    f = _sigmoid(_gate("f") + peepholes * V["f"] * C)
    c = f * C + (1 - f) * tanh(_gate("c"))
    h = _sigmoid(_gate("o") + peepholes * V["o"] * c) * tanh(c)
    # The weights of all gates have a V; without peepholes the cell must leave it alone.
    assert _step(Layer("lstm_coupled", 1, 1, peepholes=peepholes)) == pytest.approx([h, c], abs=1e-15)


@both_activations
def test_gru_reset_before(activation: Activation, g: Callable[[float], float]) -> None:
    """The reset gate scales the state before the recurrent product; z keeps the past.

    With one value the product commutes with the reset, so the bias alone would tell before from after; that the product
    comes second is shown by ``test_gru_resets_each_value_before_they_mix``.
    """
    r, z = _sigmoid(_gate("r")), _sigmoid(_gate("z"))
    h = z * H + (1 - z) * g(W_X["h"] * X + W_H["h"] * (r * H) + B["h"])
    assert _step(Layer("gru", 1, 1, activation=activation)) == pytest.approx([h], abs=1e-15)


@both_activations
def test_gru_reset_after(activation: Activation, g: Callable[[float], float]) -> None:
    """The reset gate scales the recurrent product and its bias b_h."""
    r, z = _sigmoid(_gate("r")), _sigmoid(_gate("z"))
    h = z * H + (1 - z) * g(W_X["h"] * X + B["h"] + r * (W_H["h"] * H + B_H))
    assert _step(Layer("gru", 1, 1, reset="after", activation=activation)) == pytest.approx([h], abs=1e-15)


def test_gru_resets_each_value_before_they_mix() -> None:
    """Two hidden values that the recurrent product swaps: the candidate sees r_2 h_2 before, r_1 h_2 after."""
    # r = (1, 0) and z = (0, 0) to within exp(-40); the candidate is W_hh (r * h) or r * (W_hh h), W_hh swaps.
    weights = {
        "W_x": np.array([[40.0], [-40.0], [-40.0], [-40.0], [0.0], [0.0]]),
        "W_h": np.array([[0.0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [1, 0]]),
    }
    x, h = np.array([[1.0]]), np.array([[0.3, 0.5]])
    (before,) = step(Layer("gru", 1, 2, bias=False), weights, x, (h,))
    (after,) = step(Layer("gru", 1, 2, bias=False, reset="after"), weights, x, (h,))
    np.testing.assert_allclose(before, [[0, tanh(0.3)]], atol=1e-15)
    np.testing.assert_allclose(after, [[tanh(0.5), 0]], atol=1e-15)


def test_forget_gate_is_the_belt() -> None:
    """A coupled LSTM whose forget gate is saturated open keeps c exactly; saturated shut, it takes the candidate."""
    x, state = np.array([[1.0]]), (np.array([[0.2]]), np.array([[0.75]]))
    for saturation, expected in ((800.0, 0.75), (-800.0, tanh(0.5))):
        weights = {"W_x": np.array([[saturation], [0.5], [0.0]]), "W_h": np.zeros((3, 1))}
        _, c = step(Layer("lstm_coupled", 1, 1, bias=False), weights, x, state)
        assert c.item() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sigmoid_at_both_ends(dtype: type) -> None:
    """Exact limits, no warning and no change of dtype where exp overflows."""
    values = sigmoid(np.array([-6e4, 0, 6e4], dtype))
    assert values.dtype == dtype
    assert values.tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_dtype_is_kept(layer: Layer, dtype: type) -> None:
    """Every part of the state comes back in the dtype that came in."""
    state: State = tuple(draw(2, 4).astype(dtype) for _ in range(1 + layer.has_cell_state))
    after = step(layer, draw_weights(layer.weight_shapes, dtype=dtype), draw(2, 3).astype(dtype), state)
    assert [part.dtype for part in after] == [dtype] * len(state)
