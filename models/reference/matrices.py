"""The LSTM from eight bias-free matrices, one ``U`` for the input and one ``W`` for the state in each gate.

Owns this one way in; the equations stand in ``cells``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.reference.cells import Array
from models.reference.sequence import run_sequence
from models.spec import GATES, Layer


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
    if len(matrices) != 8:
        raise ValueError(f"got {len(matrices)} matrices, expected U_f, W_f, U_i, W_i, U_c, W_c, U_o, W_o")
    U, W = dict(zip("fico", matrices[::2], strict=True)), dict(zip("fico", matrices[1::2], strict=True))
    I, H = U["f"].shape
    for gate in "fico":
        if U[gate].shape != (I, H) or W[gate].shape != (H, H):
            raise ValueError(
                f"gate {gate} has U of shape {U[gate].shape} and W of shape {W[gate].shape}, "
                f"expected {(I, H)} and {(H, H)}"
            )
    weights = {
        "W_x": np.concatenate([U[gate].T for gate in GATES["lstm"]]),
        "W_h": np.concatenate([W[gate].T for gate in GATES["lstm"]]),
    }
    N = len(x)
    zeros = np.zeros((N, H), np.result_type(x, W["f"]))
    state = (zeros if h is None else h, zeros if c is None else c)
    outputs, (h, c) = run_sequence(Layer("lstm", I, H, bias=False), weights, x, lengths, state)
    return outputs, h, c
