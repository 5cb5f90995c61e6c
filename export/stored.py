"""How a model's weights stand in an .onnx file, and the way back.

Owns the names and layouts of the file's initializers. Must not know torch or how a node is written.

============  ========================================================================================================
lowering      arrays of a layer
============  ========================================================================================================
``operator``  ``layers.0.W``, ``.R``, ``.B`` and ``.P``, both directions together, as ONNX's operator wants them
``scan``      the canonical weights, the kernels transposed for ``x @ W``: ``layers.0.W_x_transposed``, ``layers.0.b``.
              What a step takes in parts stands in parts, so that no step has to cut it: peepholes by gate, ``.V_f``;
              a GRU's gates and its candidate apart, ``.W_h_gates_transposed`` and ``.W_h_candidate_transposed``
============  ========================================================================================================

``embedding``, ``head.W`` and ``head.b`` stand as they are. Initial states are not there: they are inputs of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from models.layouts import LayoutName, array_shapes, convert
from models.spec import PEEPHOLES, Layer, ModelSpec
from models.weights import Array, Weights, check_shapes, select

Lowering = Literal["operator", "scan"]

OUTSIDE = ("embedding", "head.W", "head.b")


def stored_layer(layer: Layer, lowering: Lowering) -> Layer:
    """The layer as its node has it: without an initial state, and an operator always with biases."""
    return replace(layer, learned_initial_state=False, bias=layer.bias or lowering == "operator")


def to_stored(layer: Layer, weights: Weights, lowering: Lowering) -> dict[str, Array]:
    """One layer's arrays in the file, in the order in which its node takes them.

    Args:
        layer: the layer.
        weights: its canonical weights, all directions; biases that an operator needs and it has not become zeros.
        lowering: the form of its node.
    """
    stored = stored_layer(layer, lowering)
    kernels = weights["W_x"].dtype
    own = {name: weights.get(name, np.zeros(shape, kernels)) for name, shape in stored.weight_shapes.items()}
    if lowering == "operator":
        arrays = convert(own, stored, source="fused", target="onnx")
        return {name: arrays[name] for name in "WRBP" if name in arrays}
    return {part: own[name][rows].T for part, (name, rows) in scan_parts(layer).items()}


def from_stored(layer: Layer, arrays: Weights, lowering: Lowering) -> dict[str, Array]:
    """One layer's canonical weights, without an initial state, from its arrays in the file.

    Whatever the lowering, there are biases: those that a Scan does without are zeros. So the weights are the same, and
    have the same digest, in whichever form they were written.
    """
    full = stored_layer(layer, "operator")
    if lowering == "operator":
        return convert(arrays, full, source="onnx", target="fused")
    dtype = next((array.dtype for array in arrays.values()), np.dtype(np.float64))
    weights: dict[str, Array] = {name: np.zeros(shape, dtype) for name, shape in full.weight_shapes.items()}
    places = {
        part: weights[name][rows].T
        for part, (name, rows) in scan_parts(full).items()
        if part in arrays or not name.endswith(("b", "b_h"))
    }
    check_shapes(arrays, {part: place.shape for part, place in places.items()})
    for part, place in places.items():
        place[...] = arrays[part]
    return weights


def scan_parts(layer: Layer) -> dict[str, tuple[str, slice]]:
    """What a Scan's arrays are of the canonical ones: for each its canonical name, and which rows of it."""
    H = layer.hidden_size
    of_gru = {"_gates": slice(0, 2 * H), "_candidate": slice(2 * H, 3 * H)}
    parts: dict[str, tuple[str, slice]] = {}
    for name in stored_layer(layer, "scan").weight_shapes:
        prefix, dot, last = name.rpartition(".")
        if last == "V":
            cut = {f"_{gate}": slice(i * H, (i + 1) * H) for i, gate in enumerate(PEEPHOLES[layer.cell])}
        else:
            cut = of_gru if layer.cell == "gru" and last != "b_h" else {"": slice(None)}
        kernel = "_transposed" if last in ("W_x", "W_h") else ""
        parts |= {f"{prefix}{dot}{last}{part}{kernel}": (name, rows) for part, rows in cut.items()}
    return parts


def stored_weights(spec: ModelSpec, weights: Weights, lowerings: Sequence[Lowering]) -> dict[str, Array]:
    """All arrays of the file, from the model's canonical weights."""
    arrays = {name: weights[name] for name in OUTSIDE if name in weights}
    for index, (layer, lowering) in enumerate(zip(spec.layers, lowerings, strict=True)):
        here = f"layers.{index}."
        arrays |= {here + name: array for name, array in to_stored(layer, select(weights, here), lowering).items()}
    return arrays


def stored_size(spec: ModelSpec, lowerings: Sequence[Lowering]) -> int:
    """How many numbers all arrays of the file hold together."""
    shapes = [shape for name, shape in spec.weight_shapes.items() if name in OUTSIDE]
    for layer, lowering in zip(spec.layers, lowerings, strict=True):
        # Transposed or not, the canonical arrays are of one size.
        layout: LayoutName = "onnx" if lowering == "operator" else "fused"
        shapes += array_shapes(stored_layer(layer, lowering), layout).values()
    return sum(map(math.prod, shapes))


def canonical_weights(spec: ModelSpec, arrays: Weights, lowerings: Sequence[Lowering]) -> dict[str, Array]:
    """The model's canonical weights, without initial states, from the arrays of the file."""
    weights = {name: arrays[name] for name in OUTSIDE if name in arrays}
    for index, (layer, lowering) in enumerate(zip(spec.layers, lowerings, strict=True)):
        here = f"layers.{index}."
        weights |= {here + name: array for name, array in from_stored(layer, select(arrays, here), lowering).items()}
    return weights
