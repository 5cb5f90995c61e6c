"""A cell over time: whole sequences of rows that may differ in length, forward or backward.

Owns the time axis of one direction. Must not know layers above or below, nor where weights come from.
"""

from __future__ import annotations

import numpy as np

from models.reference.cells import CELLS, State, from_input
from models.spec import Layer
from models.weights import Array, Weights


def run_sequence(
    layer: Layer,
    weights: Weights,
    x: Array,
    lengths: Array | None = None,
    state: State | None = None,
    reverse: bool = False,
) -> tuple[Array, State]:
    """Run one direction of a layer over whole sequences.

    Args:
        layer: the cell and its sizes.
        weights: this direction's weights: ``W_x``, ``W_h`` and, as the cell has them, ``b``, ``b_h``, ``V``.
        x: the inputs [N, T, I], floating point.
        lengths: how many steps of each row are valid, integers [N] from 0 to T; None for all.
        state: the state before the first step, ``(h,)`` or ``(h, c)``, each [N, H]; None for zeros.
        reverse: read each row's valid steps from the last to the first. Outputs stay where their input stands.

    Returns:
        The outputs [N, T, H], 0 past a row's length, and the state after each row's last step that was read.

    Raises:
        ValueError: a shape or a length does not fit.
    """
    if x.ndim != 3 or x.shape[2] != layer.input_size:
        raise ValueError(f"x has shape {x.shape}, expected [N, T, {layer.input_size}]")
    N, T, _ = x.shape
    valid = valid_steps(lengths, N, T)
    state = _checked_state(layer, state, N, x, weights)
    if reverse:
        x = _reverse_valid(x, valid)

    a = from_input(weights, x)
    cell = CELLS[layer.cell]
    outputs = np.zeros((N, T, layer.hidden_size), np.result_type(a, *state))
    for t in range(T):
        still_running = valid[:, t, None]
        after = cell(layer, weights, a[:, t], state)
        state = tuple(np.where(still_running, new, old) for new, old in zip(after, state, strict=True))
        outputs[:, t] = np.where(still_running, state[0], 0)

    return (_reverse_valid(outputs, valid) if reverse else outputs), state


def valid_steps(lengths: Array | None, N: int, T: int) -> Array:
    """Which steps of which rows count: bool [N, T], from the rows' lengths.

    Raises:
        ValueError: the lengths are not N integers from 0 to T.
    """
    if lengths is None:
        return np.ones((N, T), bool)
    lengths = np.asarray(lengths)
    if lengths.shape != (N,) or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths are {lengths.dtype} of shape {lengths.shape}, expected integers of shape ({N},)")
    if N and not (lengths.min() >= 0 and lengths.max() <= T):
        raise ValueError(f"lengths lie between {lengths.min()} and {lengths.max()}, expected 0 to T = {T}")
    return np.arange(T) < lengths[:, None]


def _reverse_valid(x: Array, valid: Array) -> Array:
    """Turn each row's valid steps round and leave the rest: x[N, T, *], valid[N, T]. Twice is the identity."""
    t = np.arange(x.shape[1])
    mirrored = valid.sum(axis=1, keepdims=True) - 1 - t
    return np.take_along_axis(x, np.where(valid, mirrored, t)[:, :, None], axis=1)


def _checked_state(layer: Layer, state: State | None, N: int, x: Array, weights: Weights) -> State:
    shape, count = (N, layer.hidden_size), 2 if layer.has_cell_state else 1
    if state is None:
        return (np.zeros(shape, np.result_type(x, weights["W_h"])),) * count
    shapes = [part.shape for part in state]
    if shapes != [shape] * count:
        kind = "(h, c)" if count == 2 else "(h,)"
        raise ValueError(f"the state of cell {layer.cell!r} has shapes {shapes}, expected {kind}, each {shape}")
    return state
