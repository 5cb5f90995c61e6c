"""The LSTM from eight bias-free matrices, one ``U`` for the input and one ``W`` for the state in each gate.

Owns this one way in; the equations stand in ``cells``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.layouts import convert
from models.reference.sequence import run_sequence
from models.spec import Layer
from models.weights import Array


def run_matrices(
    matrices: Sequence[Array],
    x: Array,
    lengths: Array | None = None,
    h: Array | None = None,
    c: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Run an LSTM that is given as eight matrices.

    Args:
        matrices: ``(U_f, W_f, U_i, W_i, U_c, W_c, U_o, W_o)``, with ``U[I, H]`` and ``W[H, H]``; a gate is
            ``x @ U + h @ W``, without bias.
        x: the inputs [B, T, I], floating point.
        lengths: how many steps of each row are valid, integers [B]; None for all.
        h: the hidden state before the first step [B, H]; None for zeros.
        c: the cell state before the first step [B, H]; None for zeros.

    Returns:
        The outputs [B, T, H], and the final h and c, each [B, H].

    Raises:
        ValueError: there are not eight matrices, or a shape does not fit.
    """
    names = ("U_f", "W_f", "U_i", "W_i", "U_c", "W_c", "U_o", "W_o")
    if len(matrices) != 8 or matrices[0].ndim != 2:
        raise ValueError(f"got arrays of shapes {[array.shape for array in matrices]}, expected {', '.join(names)}")
    I, H = matrices[0].shape
    layer = Layer("lstm", I, H, bias=False)
    named = dict(zip(names, matrices, strict=True))
    weights = convert(named, layer, source="matrices", target="fused")

    zeros = np.zeros((len(x), H), np.result_type(x, matrices[0]))
    state = (zeros if h is None else h, zeros if c is None else c)
    outputs, (h, c) = run_sequence(layer, weights, x, lengths, state)
    return outputs, h, c
