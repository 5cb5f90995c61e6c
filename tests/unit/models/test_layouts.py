"""Weight layouts: which can hold what, that nothing is lost on the way, and that the numbers mean the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from models.layouts import LAYOUTS, LayoutName, array_shapes, convert
from models.reference import run_layer
from models.spec import Layer
from models.weights import Array, Weights
from tests.unit.models.drawn import LAYERS, draw, draw_weights

LIBRARIES: dict[str, list[LayoutName]] = {
    "rnn": ["torch", "keras", "onnx"],
    "rnn, relu": ["torch", "keras", "onnx"],
    "lstm": ["torch", "keras", "onnx"],
    "lstm, relu": ["onnx"],
    "lstm_peephole": ["onnx"],
    "lstm_coupled": ["torch", "keras", "onnx"],
    "lstm_coupled, peepholes": ["onnx"],
    "gru, reset before": ["keras", "onnx"],
    "gru, reset before, relu": ["keras", "onnx"],
    "gru, reset after": ["torch", "keras", "onnx"],
    "gru, reset after, relu": ["keras", "onnx"],
}
"""The libraries whose layers can hold each kind of layer."""

HOLDS: dict[str, list[LayoutName]] = {
    **{name: ["fused", *libraries] for name, libraries in LIBRARIES.items()},
    **{f"{name}, no bias": ["fused", "matrices", *libraries] for name, libraries in LIBRARIES.items()},
}
PAIRS = {
    f"{name}, {source} to {target}" + ", both ways" * both_ways: (
        replace(LAYERS[name], bidirectional=both_ways),
        source,
        target,
    )
    for name, both_ways in product(LAYERS, (False, True))
    for source, target in product(HOLDS[name], repeat=2)
}
# Not every array of a layout without a coupled cell is a coupled LSTM, so none can be drawn there.
FREE_PAIRS = {
    name: (layer, source, target)
    for name, (layer, source, target) in PAIRS.items()
    if layer.cell != "lstm_coupled" or source in ("fused", "matrices")
}
N, T, LENGTHS = 4, 6, np.array([6, 1, 4, 3])


def _held_by(layout: LayoutName) -> list[object]:
    """Every kind of layer that a layout holds, one and both ways, as parameters of a test."""
    return [
        pytest.param(replace(LAYERS[name], bidirectional=bidirectional), id=name + ", both ways" * bidirectional)
        for name, bidirectional in product(LAYERS, (False, True))
        if layout in HOLDS[name]
    ]


def _draw_with_signed_zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    weights = draw_weights(shapes, dtype=np.float32)
    for array in weights.values():
        array.flat[:2] = 0.0, -0.0
    return weights


def _bits(arrays: Weights) -> dict[str, tuple[object, ...]]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def _run(layer: Layer, weights: Weights, x: Array) -> tuple[Array, Array]:
    """The reference's outputs [N, T, D * H], and its final states [parts, D, N, H]."""
    outputs, states = run_layer(layer, weights, x, LENGTHS, [None] * layer.directions)
    return outputs, np.stack([np.stack(parts) for parts in zip(*states, strict=True)])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cannot_be_held_is_refused(name: str, layout: LayoutName) -> None:
    """Each layout takes the layers that its library has, and refuses every other by name."""
    weights = draw_weights(LAYERS[name].weight_shapes)
    if layout in HOLDS[name]:
        assert convert(weights, LAYERS[name], source="fused", target=layout)
    else:
        with pytest.raises(ValueError, match=f"layout '{layout}' cannot hold"):
            convert(weights, LAYERS[name], source="fused", target=layout)


@pytest.mark.parametrize(("layer", "source", "target"), PAIRS.values(), ids=PAIRS)
def test_round_trips_are_bit_exact(layer: Layer, source: LayoutName, target: LayoutName) -> None:
    """From fused to any layout, to any other, and back to fused: every bit returns, signs of zeros included."""
    weights = _draw_with_signed_zeros(layer.weight_shapes)
    there = convert(weights, layer, source="fused", target=source)
    beyond = convert(there, layer, source=source, target=target)
    assert {name: array.shape for name, array in beyond.items()} == array_shapes(layer, target)
    assert _bits(convert(beyond, layer, source=target, target="fused")) == _bits(weights)


@pytest.mark.parametrize(("layer", "source", "target"), FREE_PAIRS.values(), ids=FREE_PAIRS)
def test_round_trips_from_any_layout(layer: Layer, source: LayoutName, target: LayoutName) -> None:
    """From X to Y and back is bit-exact where X has one bias or Y has two; otherwise the sum of the two is kept."""
    arrays = _draw_with_signed_zeros(array_shapes(layer, source))
    back = convert(convert(arrays, layer, source=source, target=target), layer, source=target, target=source)
    both_in_full = {"torch", "onnx"} | ({"keras"} if layer.reset == "after" else set())
    if layer.bias and source in both_in_full and target not in both_in_full:
        assert _bits(back) != _bits(arrays)
        arrays, back = (convert(each, layer, source=source, target="fused") for each in (arrays, back))
    assert _bits(back) == _bits(arrays)


@pytest.mark.parametrize("layer", _held_by("torch"))
def test_torch_computes_the_same(layer: Layer) -> None:
    """A torch module that loads the converted arrays gives the reference's outputs and states."""
    weights, x = draw_weights(layer.weight_shapes), draw(N, T, 3)
    kind = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "lstm_coupled": torch.nn.LSTM, "gru": torch.nn.GRU}[layer.cell]
    extra = {"nonlinearity": layer.activation} if layer.cell == "rnn" else {}
    module = kind(
        3, 4, bias=layer.bias, bidirectional=layer.bidirectional, batch_first=True, dtype=torch.float64, **extra
    )
    arrays = convert(weights, layer, source="fused", target="torch")
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), torch.from_numpy(LENGTHS), batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        packed_outputs, final = module(packed)
    theirs, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_outputs, batch_first=True)

    outputs, states = _run(layer, weights, x)
    np.testing.assert_allclose(theirs.numpy(), outputs, rtol=0, atol=1e-12)
    their_states = final if isinstance(final, tuple) else (final,)
    np.testing.assert_allclose(np.stack([part.numpy() for part in their_states]), states, rtol=0, atol=1e-12)


def _keras(layer: Layer, arrays: Weights, x: Array) -> Array:
    """One row's outputs [T, H], forward, by the equations in the documentation of Keras."""

    def sigmoid(a: Array) -> Array:
        return np.asarray(1 / (1 + np.exp(-a)))

    def g(a: Array) -> Array:
        return np.tanh(a) if layer.activation == "tanh" else np.maximum(a, 0)

    gates = arrays["kernel"].shape[1] // 4
    K, R = np.split(arrays["kernel"], gates, axis=1), np.split(arrays["recurrent_kernel"], gates, axis=1)
    bias = arrays.get("bias", np.zeros(4 * gates))
    b, d = (each.reshape(gates, 4) for each in (bias if bias.ndim == 2 else (bias, np.zeros_like(bias))))
    h, c, outputs = np.zeros(4), np.zeros(4), []
    for x_t in x:
        if layer.cell == "rnn":
            h = g(x_t @ K[0] + b[0] + h @ R[0])
        elif layer.cell == "gru":  # z, r, h
            z = sigmoid(x_t @ K[0] + b[0] + h @ R[0] + d[0])
            r = sigmoid(x_t @ K[1] + b[1] + h @ R[1] + d[1])
            inner = r * (h @ R[2] + d[2]) if layer.reset == "after" else (r * h) @ R[2]
            h = z * h + (1 - z) * g(x_t @ K[2] + b[2] + inner)
        else:  # i, f, c, o
            i, f, c_in, o = (x_t @ K[gate] + h @ R[gate] + b[gate] for gate in range(4))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(c_in)
            h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("layer", _held_by("keras"))
def test_keras_computes_the_same(layer: Layer) -> None:
    """Keras's documented equations on arrays in its layout give the reference's outputs, written and read."""
    weights = draw_weights(layer.weight_shapes)
    pairs = [(convert(weights, layer, source="fused", target="keras"), weights)]
    if layer.cell != "lstm_coupled":
        drawn = draw_weights(array_shapes(layer, "keras"), seed=5)
        pairs.append((drawn, convert(drawn, layer, source="keras", target="fused")))
    x = draw(N, T, 3)
    for arrays, fused in pairs:
        outputs, _ = _run(layer, fused, x)
        backward = {name.removeprefix("reverse."): array for name, array in arrays.items() if "reverse." in name}
        for n, length in enumerate(LENGTHS):
            sides = [_keras(layer, arrays, x[n, :length])]
            if layer.bidirectional:
                sides.append(_keras(layer, backward, x[n, :length][::-1])[::-1])
            np.testing.assert_allclose(np.concatenate(sides, 1), outputs[n, :length], rtol=0, atol=1e-14)


def _onnxruntime(layer: Layer, arrays: Weights, x: Array) -> tuple[Array, Array]:
    """The ONNX operator's outputs [N, T, D * H] and final states [parts, D, N, H], float32, in onnxruntime on CPU."""
    operator = layer.cell.partition("_")[0].upper()
    candidate = layer.activation.capitalize()
    activations = {"RNN": [candidate], "LSTM": ["Sigmoid", candidate, "Tanh"], "GRU": ["Sigmoid", candidate]}[operator]
    attributes: dict[str, Any] = {"linear_before_reset": int(layer.reset == "after")} if operator == "GRU" else {}
    states = ["Y_h", "Y_c"][: 1 + layer.has_cell_state]
    initializers = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    present = ["X", "W", "R", "B" if layer.bias else "", "lengths", "", "", "P"]
    node = helper.make_node(
        operator,
        present if layer.has_peepholes else present[:5],
        ["Y", *states],
        hidden_size=4,
        direction="bidirectional" if layer.bidirectional else "forward",
        activations=activations * layer.directions,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one layer",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, [T, N, 3]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, [N]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", *states)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {"X": x.swapaxes(0, 1).astype(np.float32), "lengths": LENGTHS.astype(np.int32)}
    outputs, *final = session.run(None, inputs)
    return outputs.transpose(2, 0, 1, 3).reshape(N, T, -1), np.stack(final)


@pytest.mark.parametrize("layer", _held_by("onnx"))
def test_onnxruntime_computes_the_same(layer: Layer) -> None:
    """The ONNX operator on arrays in its layout gives the reference's outputs and states, written and read."""
    weights = draw_weights(layer.weight_shapes)
    pairs = [(convert(weights, layer, source="fused", target="onnx"), weights)]
    if layer.cell != "lstm_coupled":
        drawn = draw_weights(array_shapes(layer, "onnx"), seed=5)
        pairs.append((drawn, convert(drawn, layer, source="onnx", target="fused")))
    x = draw(N, T, 3)
    for arrays, fused in pairs:
        for theirs, ours in zip(_onnxruntime(layer, arrays, x), _run(layer, fused, x), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-6)


def test_eight_matrices_by_name() -> None:
    """The eight matrices are the LSTM's gates, each transposed."""
    layer = LAYERS["lstm, no bias"]
    weights = draw_weights(layer.weight_shapes)
    matrices = convert(weights, layer, source="fused", target="matrices")
    assert set(matrices) == {"U_i", "W_i", "U_f", "W_f", "U_c", "W_c", "U_o", "W_o"}
    np.testing.assert_array_equal(matrices["U_c"], weights["W_x"][8:12].T)
    np.testing.assert_array_equal(matrices["W_f"], weights["W_h"][4:8].T)


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        (LAYERS["lstm"], {"bias_hh_l0": None}, r"missing \['bias_hh_l0'\]"),
        (LAYERS["lstm"], {"weight_hr_l0": np.zeros((2, 4))}, r"unknown \['weight_hr_l0'\]"),
        (LAYERS["lstm"], {"bias_hh_l0": np.zeros(15)}, r"'bias_hh_l0' has shape \(15,\), expected \(16,\)"),
        (LAYERS["lstm_coupled"], {}, "not a coupled LSTM"),
    ],
)
def test_arrays_that_do_not_fit(layer: Layer, change: dict[str, Array | None], message: str) -> None:
    """Missing, unknown and misshapen arrays are refused by name, and a plain LSTM that is given as a coupled one."""
    arrays = {**draw_weights(array_shapes(layer, "torch")), **change}
    with pytest.raises(ValueError, match=message):
        convert({name: a for name, a in arrays.items() if a is not None}, layer, source="torch", target="fused")


def test_other_refusals() -> None:
    """An unknown layout, and a learned initial state where there is no place for it."""
    with pytest.raises(ValueError, match="unknown layout 'caffe'; expected one of fused, matrices, torch"):
        array_shapes(LAYERS["lstm"], "caffe")  # type: ignore[arg-type]
    learned = replace(LAYERS["lstm"], learned_initial_state=True)
    with pytest.raises(ValueError, match="cannot hold a learned initial state"):
        convert(draw_weights(learned.weight_shapes), learned, source="fused", target="onnx")
