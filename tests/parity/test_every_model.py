"""Every cell x depth x direction x lowering, exported and held against the reference in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import onnx
import pytest

from export.model_file import make_model_file
from export.recurrence import OPERATORS
from export.restore import restore
from export.stored import Lowering
from export.verify import BATCHES, STEPS
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec
from tests.unit.models.drawn import LAYERS, draw_weights

CELLS = {name: layer for name, layer in LAYERS.items() if layer.bias}
DEPTHS = {"one layer": (4,), "two layers": (4, 4), "mixed sizes": (4, 2)}
MODELS = {
    f"{name}; {depth}": (layer, sizes)
    for name, layer in CELLS.items()
    for depth, sizes in DEPTHS.items()
    # relu changes one activation in the node, and how deep the stack is makes no difference to that.
    if layer.activation == "tanh" or depth == "two layers"
}
# Biases and initial states are handled alike in every cell: a few cells stand for all.
MODELS |= {
    "lstm; mixed sizes, learned": (replace(CELLS["lstm"], learned_initial_state=True), (4, 2)),
    "gru, reset after; no bias, learned": (
        Layer("gru", 3, 4, reset="after", bias=False, learned_initial_state=True),
        (4, 4),
    ),
    "lstm_coupled, peepholes; no bias": (Layer("lstm_coupled", 3, 4, peepholes=True, bias=False), (4, 4)),
}


def stack(layer: Layer, sizes: tuple[int, ...], bidirectional: bool) -> ModelSpec:
    """Layers of one cell on each other, of these sizes."""
    layers: list[Layer] = []
    for size in sizes:
        below = layers[-1].output_size if layers else layer.input_size
        layers.append(replace(layer, input_size=below, hidden_size=size, bidirectional=bidirectional))
    return ModelSpec(tuple(layers))


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those in the bodies of others among them."""
    inner = (nodes(attribute.g) for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return [*graph.node, *chain.from_iterable(inner)]


@pytest.mark.parametrize("lowering", ["operator", "scan"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize(("layer", "sizes"), MODELS.values(), ids=MODELS.keys())
def test_parity(layer: Layer, sizes: tuple[int, ...], bidirectional: bool, lowering: Lowering) -> None:
    """The export verifies within 2e-6, in every case there is; it is lowered as asked; its weights are in the file."""
    spec = stack(layer, sizes, bidirectional)
    weights = draw_weights(spec.weight_shapes, dtype=np.float32)

    made = make_model_file(SequenceModel.from_weights(spec, weights), lowering)

    assert made.manifest.parity is not None
    module, *rows = made.manifest.parity.rows
    assert module.case == "the module itself"
    assert max(module.outputs, module.states) < 1e-12
    assert {row.bound for row in rows} == {2e-6}
    assert all(row.outputs <= 2e-6 and row.states <= 2e-6 for row in rows)
    whole = {(row.batch, row.steps) for row in rows if row.case == "random"}
    assert whole == {(N, T) for N in BATCHES for T in STEPS}
    cases = {"random", "random, from a state", "random, ragged", "alone against batched"}
    assert {row.case for row in rows} == cases | ({"whole against chunked"} if not bidirectional else set())

    model = onnx.load_from_string(made.content)
    kinds = Counter(node.op_type for node in nodes(model.graph))
    if lowering == "operator":
        constants = {tensor.name for tensor in model.graph.initializer}
        recurrent = [node for node in model.graph.node if node.op_type == OPERATORS[layer.cell]]
        assert len(recurrent) == len(sizes)
        assert kinds["Scan"] == 0
        for node in recurrent:
            assert set(node.input[1:4]) | ({node.input[7]} if layer.has_peepholes else set()) <= constants
    else:
        assert kinds["Scan"] == sum(part.directions for part in spec.layers)
        assert not kinds.keys() & set(OPERATORS.values())

    restored, kept = restore(model, made.manifest)
    assert restored.layers[0].cell == layer.cell
    for name, array in weights.items():
        np.testing.assert_array_equal(kept[name], array.astype(np.float64))
