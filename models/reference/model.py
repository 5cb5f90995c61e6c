"""A whole model: embedding, a stack of layers with one or two directions each, a head.

Owns how layers stand on each other and the order of their states. States are one list: bottom layer first, in a layer
the forward direction first; each entry is ``(h,)`` or ``(h, c)`` with arrays [N, H]. Must not know torch or ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.reference.cells import State
from models.reference.sequence import run_sequence, valid_steps
from models.spec import PREFIXES, Layer, ModelSpec
from models.weights import Array, Weights, check_shapes, select


def run_model(
    spec: ModelSpec,
    weights: Weights,
    x: Array,
    lengths: Array | None = None,
    states: Sequence[State] | None = None,
) -> tuple[Array, list[State]]:
    """Run a whole model over whole sequences.

    Args:
        spec: the model.
        weights: every weight under its full name, as ``models.spec`` lists them.
        x: vectors [N, T, I], floating point; or token ids [N, T], integers, where the model has an embedding.
        lengths: how many steps of each row are valid, integers [N] from 0 to T; None for all.
        states: the states before the first step; None for the learned ones, or zeros where none are learned.

    Returns:
        The outputs [N, T, O], 0 past a row's length; or [N, O] of each row's last valid step where ``spec.head_on`` is
        "last". And the states after each row's last step.

    Raises:
        ValueError: weights are missing, unknown or of the wrong shape; x, lengths or states do not fit; a row has no
            step where the last one is asked for.
    """
    check_shapes(weights, spec.weight_shapes)
    x = _embed(spec, weights, np.asarray(x))
    N, T, _ = x.shape
    valid = valid_steps(lengths, N, T)
    states = initial_states(spec, weights, N) if states is None else list(states)
    if len(states) != (expected := sum(layer.directions for layer in spec.layers)):
        raise ValueError(f"got {len(states)} states, expected {expected}: one for each direction of each layer")

    final_states: list[State] = []
    for index, layer in enumerate(spec.layers):
        here = states[len(final_states) : len(final_states) + layer.directions]
        x, after = run_layer(layer, select(weights, f"layers.{index}."), x, lengths, here)
        final_states += after

    if spec.head_on == "last":
        steps = valid.sum(axis=1)
        if N and steps.min() == 0:
            raise ValueError("a row has no valid step, but the model gives the output of the last one")
        x, valid = x[np.arange(N), steps - 1], np.ones(N, bool)
    if spec.head_size is not None:
        x = np.where(valid[..., None], x @ weights["head.W"].T + weights["head.b"], 0)
    return x, final_states


def run_layer(
    layer: Layer, weights: Weights, x: Array, lengths: Array | None, states: Sequence[State | None]
) -> tuple[Array, list[State]]:
    """Run all directions of one layer: outputs [N, T, directions * H], forward first, and a final state for each."""
    runs = [
        run_sequence(layer, select(weights, prefix) if prefix else weights, x, lengths, state, reverse=bool(prefix))
        for prefix, state in zip(PREFIXES[: layer.directions], states, strict=True)
    ]
    return np.concatenate([outputs for outputs, _ in runs], axis=-1), [state for _, state in runs]


def initial_states(spec: ModelSpec, weights: Weights, N: int) -> list[State]:
    """The states that N rows start from: the learned ones, or zeros in the weights' dtype."""
    states: list[State] = []
    for index, layer in enumerate(spec.layers):
        for prefix in PREFIXES[: layer.directions]:
            here = select(weights, f"layers.{index}.{prefix}")
            zeros = np.zeros(layer.hidden_size, here["W_h"].dtype)
            names = ("h0", "c0") if layer.has_cell_state else ("h0",)
            states.append(tuple(np.tile(here.get(name, zeros), (N, 1)) for name in names))
    return states


def stack_states(states: Sequence[State]) -> State:
    """Stack the states of a model whose ``spec.uniform`` holds: ``(h,)`` or ``(h, c)``, each [L * directions, N, H]."""
    return tuple(np.stack(parts) for parts in zip(*states, strict=True))


def unstack_states(stacked: State) -> list[State]:
    """The other way round."""
    return list(zip(*stacked, strict=True))


def _embed(spec: ModelSpec, weights: Weights, x: Array) -> Array:
    I = spec.layers[0].input_size
    if spec.vocabulary_size is None:
        if x.ndim != 3 or x.shape[2] != I or x.dtype.kind != "f":
            raise ValueError(f"x is {x.dtype} of shape {x.shape}, expected floating point [N, T, {I}]")
        return x
    if x.ndim != 2 or x.dtype.kind not in "iu":
        raise ValueError(f"x is {x.dtype} of shape {x.shape}, expected integer token ids [N, T]")
    if x.size and not (x.min() >= 0 and x.max() < spec.vocabulary_size):
        raise ValueError(f"token ids lie between {x.min()} and {x.max()}, expected 0 to {spec.vocabulary_size - 1}")
    embedded: Array = weights["embedding"][x]
    return embedded
