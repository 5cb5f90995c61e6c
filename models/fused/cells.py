"""One step of each cell with fused gates: what is left of a recurrence once the input product is out of the time loop.

Owns the equations in torch. Must not know time, lengths or layers. The equations and their sources stand at length in
``models/reference/cells.py``; here they are written for speed, and the tests hold the one against the other.

Every function takes ``a[N, G*H]``, the input product ``x_t W_x^T + b`` of all gates, the state before the step and the
direction's weights, and returns the state after it. The gates are stacked as ``models.spec.GATES`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.spec import Activation, Layer

State = tuple[Tensor, ...]
"""``(h,)`` or ``(h, c)``, each ``[N, H]``."""

Step = Callable[[Layer, Mapping[str, Tensor], Tensor, State], State]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def rnn(layer: Layer, weights: Mapping[str, Tensor], a: Tensor, state: State) -> State:
    """The simple recurrence: ``h = tanh(a + W_h h)``."""
    (h,) = state
    return (ACTIVATIONS[layer.activation](a + h @ weights["W_h"].T),)


def lstm(layer: Layer, weights: Mapping[str, Tensor], a: Tensor, state: State) -> State:
    """The LSTM with input, forget and output gate, with or without peepholes."""
    h, c = state
    i, f, candidate, o = (a + h @ weights["W_h"].T).chunk(4, dim=1)
    if layer.has_peepholes:
        V_i, V_f, V_o = weights["V"].chunk(3)
        i, f = i + V_i * c, f + V_f * c
    c = f.sigmoid() * c + i.sigmoid() * ACTIVATIONS[layer.activation](candidate)
    if layer.has_peepholes:
        o = o + V_o * c
    return o.sigmoid() * c.tanh(), c


def lstm_coupled(layer: Layer, weights: Mapping[str, Tensor], a: Tensor, state: State) -> State:
    """The LSTM whose input gate is ``1 - f``, with or without peepholes."""
    h, c = state
    f, candidate, o = (a + h @ weights["W_h"].T).chunk(3, dim=1)
    if layer.has_peepholes:
        V_f, V_o = weights["V"].chunk(2)
        f = f + V_f * c
    f = f.sigmoid()
    c = f * c + (1 - f) * ACTIVATIONS[layer.activation](candidate)
    if layer.has_peepholes:
        o = o + V_o * c
    return o.sigmoid() * c.tanh(), c


def gru(layer: Layer, weights: Mapping[str, Tensor], a: Tensor, state: State) -> State:
    """The GRU. With the reset after the recurrent product all gates share it; before it the candidate needs its own."""
    (h,) = state
    W_h, H = weights["W_h"], layer.hidden_size
    if layer.reset == "after":
        U = h @ W_h.T
        r, z = (a[:, : 2 * H] + U[:, : 2 * H]).sigmoid().chunk(2, dim=1)
        recurrent = U[:, 2 * H :] + weights["b_h"] if "b_h" in weights else U[:, 2 * H :]
        candidate = a[:, 2 * H :] + r * recurrent
    else:
        r, z = (a[:, : 2 * H] + h @ W_h[: 2 * H].T).sigmoid().chunk(2, dim=1)
        candidate = a[:, 2 * H :] + (r * h) @ W_h[2 * H :].T
    return (z * h + (1 - z) * ACTIVATIONS[layer.activation](candidate),)


STEPS: dict[str, Step] = {"rnn": rnn, "lstm": lstm, "lstm_peephole": lstm, "lstm_coupled": lstm_coupled, "gru": gru}
