"""Recurrent networks as small programs have them: one matrix a gate, ``x @ W``, one sequence, one step after the other.

Written from the equations, in float64, and from nothing in the project: what is read and exported is held against
these. Weights come in under the names that such programs give them; ``w["Wf"]`` is [H, H + I] in ``lstm_joined``, and
[I, H] elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
W = Mapping[str, Array]
Step = Callable[[W, Array, Array, Array], tuple[Array, Array]]


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a))."""
    return np.asarray(1 / (1 + np.exp(-a)))


def relu(a: Array) -> Array:
    """max(0, a)."""
    return np.asarray(np.where(a > 0, a, 0))


def run(step: Step, w: W, xs: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    """All steps of one sequence [T, I]: the outputs [T, H], and the last h and c."""
    w = {name: np.asarray(array, np.float64) for name, array in w.items()}
    hs = []
    for x in xs:
        h, c = step(w, x, h, c)
        hs.append(h)
    return np.array(hs), h, c


def elman_relu(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """A simple network with two biases and relu."""
    return relu(x @ w["Wxh"] + w["bx"] + h @ w["Whh"] + w["bh"]), c


def lstm(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """An LSTM with a matrix and a bias for each gate; its candidate is called g."""
    i = sigmoid(x @ w["Wi"] + h @ w["Ui"] + w["bi"])
    f = sigmoid(x @ w["Wf"] + h @ w["Uf"] + w["bf"])
    g = np.tanh(x @ w["Wg"] + h @ w["Ug"] + w["bg"])
    o = sigmoid(x @ w["Wo"] + h @ w["Uo"] + w["bo"])
    c = f * c + i * g
    return o * np.tanh(c), c


def lstm_joined(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """An LSTM whose matrices stand before the column [h, x]; its biases are columns."""
    hx = np.concatenate([h, x])[:, None]
    f, i, o = (sigmoid(w[f"W{gate}"] @ hx + w[f"b{gate}"])[:, 0] for gate in "fio")
    candidate = np.tanh(w["WC"] @ hx + w["bC"])[:, 0]
    c = f * c + i * candidate
    return o * np.tanh(c), c


def lstm_peephole(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """An LSTM whose gates see the cell state: i and f the last one, o the new one."""
    i = sigmoid(x @ w["Wi"] + h @ w["Ui"] + w["pi"] * c + w["bi"])
    f = sigmoid(x @ w["Wf"] + h @ w["Uf"] + w["pf"] * c + w["bf"])
    g = np.tanh(x @ w["Wg"] + h @ w["Ug"] + w["bg"])
    c = f * c + i * g
    o = sigmoid(x @ w["Wo"] + h @ w["Uo"] + w["po"] * c + w["bo"])
    return o * np.tanh(c), c


def lstm_forgets_what_it_writes(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """A coupled LSTM with an input gate, and f = 1 - i."""
    i = sigmoid(x @ w["Wi"] + h @ w["Ui"] + w["bi"])
    g = np.tanh(x @ w["Wg"] + h @ w["Ug"] + w["bg"])
    o = sigmoid(x @ w["Wo"] + h @ w["Uo"] + w["bo"])
    c = (1 - i) * c + i * g
    return o * np.tanh(c), c


def lstm_writes_what_it_forgets(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """A coupled LSTM with a forget gate and i = 1 - f, and peepholes."""
    f = sigmoid(x @ w["Wf"] + h @ w["Uf"] + w["pf"] * c + w["bf"])
    g = np.tanh(x @ w["Wg"] + h @ w["Ug"] + w["bg"])
    c = f * c + (1 - f) * g
    o = sigmoid(x @ w["Wo"] + h @ w["Uo"] + w["po"] * c + w["bo"])
    return o * np.tanh(c), c


def gru_inverted(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """A GRU whose update gate u lets in the new: h = u * h~ + (1 - u) * h; the reset stands before the product."""
    u = sigmoid(x @ w["Wu"] + h @ w["Uu"] + w["bu"])
    r = sigmoid(x @ w["Wr"] + h @ w["Ur"] + w["br"])
    candidate = np.tanh(x @ w["Wh"] + (r * h) @ w["Uh"] + w["bh"])
    return u * candidate + (1 - u) * h, c


def gru_after(w: W, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """A GRU with two biases for each gate, one of the candidate's inside the reset, which stands after the product."""
    r = sigmoid(x @ w["Wr"] + w["br"] + h @ w["Ur"] + w["cr"])
    z = sigmoid(x @ w["Wz"] + w["bz"] + h @ w["Uz"] + w["cz"])
    n = np.tanh(x @ w["Wn"] + w["bn"] + r * (h @ w["Un"] + w["cn"]))
    return (1 - z) * n + z * h, c
