"""Weights and states stand in the file and the graph so that they can be found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.describe import describe, initial_state
from export.signature import pack_states, state_tensors, unpack_states
from export.stored import Lowering, canonical_weights, stored_weights
from models.reference import initial_states
from models.spec import Layer, ModelSpec
from models.weights import digest
from service.manifest import Manifest
from tests.unit.models.drawn import LAYERS, draw, draw_weights

UNIFORM = ModelSpec((Layer("lstm", 3, 4, bidirectional=True), Layer("lstm_coupled", 8, 4, bidirectional=True)))
MIXED = ModelSpec((Layer("gru", 3, 4, bidirectional=True), Layer("lstm", 8, 5)), head_size=2)


@pytest.mark.parametrize(
    ("spec", "names", "shapes"),
    [
        (ModelSpec((Layer("gru", 3, 4),)), ["h h0 hT"], [(1, None, 4)]),
        (UNIFORM, ["h h0 hT", "c c0 cT"], [(4, None, 4)] * 2),
        (
            MIXED,
            ["h_1 h0_1 hT_1", "h_1_reverse h0_1_reverse hT_1_reverse", "h_2 h0_2 hT_2", "c_2 c0_2 cT_2"],
            [(None, 4), (None, 4), (None, 5), (None, 5)],
        ),
    ],
    ids=["one layer", "uniform", "mixed"],
)
def test_names_and_shapes_of_states(spec: ModelSpec, names: list[str], shapes: list[tuple[int | None, ...]]) -> None:
    """States of one shape are stacked; others have one tensor for each direction of each layer."""
    tensors = state_tensors(spec)
    assert [f"{tensor.name} {tensor.input} {tensor.output}" for tensor in tensors] == names
    assert [tensor.shape for tensor in tensors] == shapes


@pytest.mark.parametrize("spec", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_states_there_and_back(spec: ModelSpec) -> None:
    """Packing into the graph's tensors and back gives every state its own place again."""
    N = 6
    states = [
        tuple(draw(N, layer.hidden_size, seed=100 * place + part) for part in range(1 + layer.has_cell_state))
        for place, layer in enumerate(layer for layer in spec.layers for _ in range(layer.directions))
    ]
    packed = pack_states(state_tensors(spec), states)
    assert [array.shape for array in packed] == [
        tuple(N if size is None else size for size in tensor.shape) for tensor in state_tensors(spec)
    ]
    back = unpack_states(state_tensors(spec), packed)
    for state, again in zip(states, back, strict=True):
        np.testing.assert_array_equal(np.stack(state), np.stack(again))


@pytest.mark.parametrize("lowering", ["operator", "scan"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_weights_there_and_back(layer: Layer, lowering: Lowering) -> None:
    """Weights come back from the file's layout bit for bit; biases that there are none of come back as zeros."""
    both = replace(layer, bidirectional=True)
    spec = ModelSpec((both, replace(both, input_size=8)), vocabulary_size=5, head_size=2)
    weights = draw_weights(spec.weight_shapes)
    back = canonical_weights(spec, stored_weights(spec, weights, [lowering] * 2), [lowering] * 2)
    for name, array in weights.items():
        np.testing.assert_array_equal(back.pop(name), array)
    assert all(name.rsplit(".", 1)[1] in ("b", "b_h") and not array.any() for name, array in back.items())
    assert not back or not layer.bias


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_either_form_holds_the_same_weights(layer: Layer) -> None:
    """A model's weights have one digest, in whichever form its layers are written."""
    spec = ModelSpec((replace(layer, bidirectional=True),))
    weights = draw_weights(spec.weight_shapes)
    forms: list[list[Lowering]] = [["operator"], ["scan"]]
    digests = {digest(canonical_weights(spec, stored_weights(spec, weights, form), form)) for form in forms}
    assert len(digests) == 1


def test_parts_that_do_not_fit_are_told() -> None:
    """A Scan can do without biases and without nothing else; no part is stretched to the shape that it should have."""
    spec = ModelSpec((Layer("lstm_peephole", 3, 4),))
    arrays = stored_weights(spec, draw_weights(spec.weight_shapes), ["scan"])
    for name in ("layers.0.W_h_transposed", "layers.0.V_f"):
        for wrong in ({}, {name: arrays[name][:1]}):
            with pytest.raises(ValueError, match=name.removeprefix("layers.0.")):
                canonical_weights(spec, {key: arrays[key] for key in arrays if key != name} | wrong, ["scan"])
    with pytest.raises(ValueError, match="V_c"):
        canonical_weights(spec, {**arrays, "layers.0.V_c": arrays["layers.0.V_f"]}, ["scan"])


def test_the_manifest_of_a_model() -> None:
    """Everything that the server asks for is there, and comes back from JSON."""
    spec = ModelSpec(
        (Layer("gru", 3, 4, learned_initial_state=True), Layer("lstm_peephole", 4, 5)),
        vocabulary_size=9,
        head_size=2,
        head_on="last",
    )
    weights = draw_weights(spec.weight_shapes, dtype=np.float32)
    manifest = describe(spec, weights, ["scan", "operator"], "float32")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    (x,), (y,) = manifest.inputs, manifest.outputs
    assert (x.dtype, x.shape, x.below, x.batch_axis, x.time_axis) == ("int64", (None, None), 9, 1, 0)
    assert (y.dtype, y.shape, y.batch_axis, y.time_axis) == ("float32", (None, 2), 0, None)
    assert (manifest.lengths, manifest.streamable, manifest.head_on) == ("lengths", True, "last")
    assert [layer.lowering for layer in manifest.layers] == ["scan", "operator"]
    for state, exact in zip(
        manifest.states, pack_states(state_tensors(spec), initial_states(spec, weights, 3)), strict=True
    ):
        np.testing.assert_array_equal(initial_state(state, 3), exact)
    assert not describe(UNIFORM, draw_weights(UNIFORM.weight_shapes), ["operator"] * 2, "float32").streamable
