"""One step of each cell, as the textbooks write it.

Owns the recurrent equations and nothing else: no time, no lengths, no layers. NumPy only; every array keeps its dtype.

In each equation ``a = W_x x_t + b`` is what the input alone gives to the gates. It does not depend on the state, so
whoever runs a sequence computes it for all steps at once. The gates stand side by side in its last axis, in the order
of ``models.spec.GATES``. Arrays are rows: ``a[N, G*H]``, ``h[N, H]``, ``c[N, H]``; a product ``W h`` is ``h @ W.T``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from models.spec import Activation, Cell, Layer
from models.weights import Array, Weights

State = tuple[Array, ...]
"""What one step hands to the next: ``(h,)``, or ``(h, c)`` for the LSTMs; each ``[N, H]``."""


def sigmoid(x: Array) -> Array:
    """The logistic function, 1 / (1 + exp(-x)), of any shape."""
    with np.errstate(over="ignore"):  # exp(-x) = inf is no accident for very negative x: 1 / inf is the limit, 0
        result: Array = 1 / (1 + np.exp(-x))
    return result


def relu(x: Array) -> Array:
    """max(0, x), of any shape."""
    return np.maximum(x, 0)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"tanh": np.tanh, "relu": relu}


def rnn(layer: Layer, weights: Weights, a: Array, state: State) -> State:
    """The simple recurrent network.

    h_t = tanh(W_x x_t + W_h h_{t-1} + b), or relu in the place of tanh.

    Source: Elman, Finding structure in time (1990); with relu: Le, Jaitly, Hinton (2015), arXiv:1504.00941.
    """
    (h,) = state
    activation = ACTIVATIONS[layer.activation]
    return (activation(a + h @ weights["W_h"].T),)


def lstm(layer: Layer, weights: Weights, a: Array, state: State) -> State:
    """Long short-term memory with a forget gate, and with peepholes where the layer has them.

    ::

        i  = sigmoid(W_xi x_t + W_hi h_{t-1} + V_i * c_{t-1} + b_i)     what to write
        f  = sigmoid(W_xf x_t + W_hf h_{t-1} + V_f * c_{t-1} + b_f)     what to keep
        c~ = tanh   (W_xc x_t + W_hc h_{t-1} + b_c)                     the candidate; relu where the layer says so
        c  = f * c_{t-1} + i * c~                                       the belt
        o  = sigmoid(W_xo x_t + W_ho h_{t-1} + V_o * c_t + b_o)         what to show; it sees the new cell state
        h  = o * tanh(c)

    The peepholes V are diagonal, so vectors; without them their terms are absent.

    Source: Hochreiter and Schmidhuber (1997); the forget gate: Gers, Schmidhuber and Cummins (2000); the peepholes:
    Gers, Schraudolph and Schmidhuber (2002), JMLR 3.
    """
    h, c = state
    activation = ACTIVATIONS[layer.activation]
    a_i, a_f, a_c, a_o = np.split(a + h @ weights["W_h"].T, 4, axis=-1)
    V_i, V_f, V_o = _peepholes(layer, weights, 3)

    i = sigmoid(a_i + V_i * c)
    f = sigmoid(a_f + V_f * c)
    candidate = activation(a_c)
    c = f * c + i * candidate
    o = sigmoid(a_o + V_o * c)
    h = o * np.tanh(c)
    return h, c


def lstm_coupled(layer: Layer, weights: Weights, a: Array, state: State) -> State:
    """The LSTM that writes exactly where it forgets: i = 1 - f. Everything else as in ``lstm``.

    Source: Greff, Srivastava, Koutník, Steunebrink and Schmidhuber, LSTM: A Search Space Odyssey (2017),
    arXiv:1503.04069, there called CIFG, coupled input and forget gate.
    """
    h, c = state
    activation = ACTIVATIONS[layer.activation]
    a_f, a_c, a_o = np.split(a + h @ weights["W_h"].T, 3, axis=-1)
    V_f, V_o = _peepholes(layer, weights, 2)

    f = sigmoid(a_f + V_f * c)
    candidate = activation(a_c)
    c = f * c + (1 - f) * candidate
    o = sigmoid(a_o + V_o * c)
    h = o * np.tanh(c)
    return h, c


def gru(layer: Layer, weights: Weights, a: Array, state: State) -> State:
    """The gated recurrent unit, its reset gate before or after the recurrent product.

    ::

        r  = sigmoid(W_xr x_t + W_hr h_{t-1} + b_r)                     how much of the past the candidate sees
        z  = sigmoid(W_xz x_t + W_hz h_{t-1} + b_z)                     how much of the past stays
        h~ = tanh(W_xh x_t + b + W_hh (r * h_{t-1}))                    reset before
        h~ = tanh(W_xh x_t + b + r * (W_hh h_{t-1} + b_h))              reset after, with a bias of its own inside
        h  = z * h_{t-1} + (1 - z) * h~

    Source: Cho et al. (2014), arXiv:1406.1078v3, equations 5 to 8 (reset before); reset after is the form that cuDNN
    and torch have. With relu for the candidate: Ravanelli et al., Light gated recurrent units (2018), arXiv:1803.10225.
    """
    (h,) = state
    activation = ACTIVATIONS[layer.activation]
    a_r, a_z, a_h = np.split(a, 3, axis=-1)
    W_hr, W_hz, W_hh = np.split(weights["W_h"], 3)

    r = sigmoid(a_r + h @ W_hr.T)
    z = sigmoid(a_z + h @ W_hz.T)
    if layer.reset == "before":
        candidate = activation(a_h + (r * h) @ W_hh.T)
    else:
        candidate = activation(a_h + r * (h @ W_hh.T + weights.get("b_h", 0)))
    h = z * h + (1 - z) * candidate
    return (h,)


CELLS: dict[Cell, Callable[[Layer, Weights, Array, State], State]] = {
    "rnn": rnn,
    "lstm": lstm,
    "lstm_peephole": lstm,
    "lstm_coupled": lstm_coupled,
    "gru": gru,
}


def from_input(weights: Weights, x: Array) -> Array:
    """What the input alone gives to the gates: ``a = W_x x + b``, for ``x[..., I]`` of one step or of many."""
    a: Array = x @ weights["W_x"].T
    return a + weights["b"] if "b" in weights else a


def step(layer: Layer, weights: Weights, x: Array, state: State) -> State:
    """One step of one direction: ``x[N, I]`` and the state before it give the state after it; the output is its h."""
    return CELLS[layer.cell](layer, weights, from_input(weights, x), state)


def _peepholes(layer: Layer, weights: Weights, count: int) -> tuple[Any, ...]:
    """The peephole vectors, each [H]; plain zeros where the layer has none."""
    return tuple(np.split(weights["V"], count)) if layer.has_peepholes else (0,) * count
