"""A sequence model's weights: how they begin, how they come in and go out, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.fused import SequenceModel
from models.fused.recurrence import Recurrence
from models.spec import GATES, Layer, ModelSpec
from tests.unit.models.drawn import LAYERS, draw_weights

EVERYTHING = ModelSpec(
    (Layer("gru", 3, 4, bidirectional=True, learned_initial_state=True), Layer("lstm_peephole", 8, 5)),
    vocabulary_size=7,
    head_size=2,
)


def test_names_and_shapes_are_the_canonical_ones() -> None:
    """The state dict is the table of weights in the spec, so that torch's own files load by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in SequenceModel(EVERYTHING).state_dict().items()}
    assert shapes == EVERYTHING.weight_shapes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_there_and_back(dtype: Any) -> None:
    """Weights come out as they went in, bit for bit and in their dtype, and are copies."""
    weights = draw_weights(EVERYTHING.weight_shapes, dtype=dtype)
    model = SequenceModel.from_weights(EVERYTHING, weights)
    back = model.weights()
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        assert back[name].dtype == dtype
        np.testing.assert_array_equal(back[name], array)
    back["head.b"][:] = 9
    assert not (model.weights()["head.b"] == 9).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head.b": None}, "missing .*head.b"),
        ({"head.c": np.zeros(2)}, "unknown .*head.c"),
        ({"head.b": np.zeros(3)}, "head.b.* has shape"),
        ({"head.b": np.zeros(2, np.float32)}, "one dtype, got float32, float64"),
        ({name: np.zeros(shape, np.int64) for name, shape in EVERYTHING.weight_shapes.items()}, "weights are int64"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    """Missing, unknown, misshapen or mixed weights are refused by name."""
    weights = {**draw_weights(EVERYTHING.weight_shapes), **change}
    with pytest.raises(ValueError, match=says):
        SequenceModel.from_weights(EVERYTHING, {name: array for name, array in weights.items() if array is not None})


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_initialisation(layer: Layer) -> None:
    """Each gate's recurrent kernel is orthogonal, the forget gate's bias 1, every other bias 0."""
    recurrence = Recurrence(layer)
    gates = GATES[layer.cell]
    for kernel in recurrence.W_h.detach().chunk(len(gates)):
        torch.testing.assert_close(kernel @ kernel.T, torch.eye(layer.hidden_size))
    assert recurrence.W_x.detach().std() > 0.1
    if layer.bias:
        expected = torch.tensor([1.0 if gate == "f" else 0.0 for gate in gates]).repeat_interleave(layer.hidden_size)
        torch.testing.assert_close(recurrence.b.detach(), expected)


def test_states_of_the_wrong_number() -> None:
    """States for other layers than there are get an error that says how many were expected."""
    model = SequenceModel(ModelSpec((Layer("gru", 3, 4, bidirectional=True),)))
    with pytest.raises(ValueError, match="got 1 states, expected 2"):
        model(torch.zeros(2, 3, 3), states=[(torch.zeros(2, 4),)])


@pytest.mark.parametrize(
    ("T", "lengths", "says"),
    [
        (0, None, "no steps"),
        (0, [0, 0], "no steps"),
        (3, [3, 0], "lengths lie between 0 and 3, expected 1 to T = 3"),
        (3, [4, 1], "lengths lie between 1 and 4, expected 1 to T = 3"),
        (3, [3], r"lengths are torch.int64 of shape \[1\], expected integers \[2\]"),
        (3, [3.0, 1.0], "lengths are torch.float32"),
    ],
)
def test_lengths_that_do_not_fit(T: int, lengths: list[float] | None, says: str) -> None:
    """Without a step, or a last one where its output is asked for, there is an error and not an index out of range."""
    model = SequenceModel(ModelSpec((Layer("gru", 3, 4),), head_on="last"))
    with pytest.raises(ValueError, match=says):
        model(torch.zeros(2, T, 3), None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize(
    "recurrent",
    [
        lambda **options: nn.LSTM(3, 4, 2, **options),
        lambda **options: nn.GRU(3, 4, 2, **options),
        lambda **options: nn.RNN(3, 4, 2, **options),
        lambda **options: nn.RNN(3, 4, 1, nonlinearity="relu", bias=False, **options),
    ],
    ids=["LSTM", "GRU", "RNN", "RNN, relu, no bias"],
)
@pytest.mark.parametrize("head_bias", [None, False, True], ids=["no head", "head without bias", "head"])
def test_from_torch(recurrent: Any, bidirectional: bool, head_bias: bool | None) -> None:
    """A model made from a torch module gives that module's outputs and final states."""
    torch.manual_seed(0)
    module = recurrent(bidirectional=bidirectional, batch_first=True).double()
    head = None if head_bias is None else nn.Linear(8 if bidirectional else 4, 2, bias=head_bias).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)

    y, states = SequenceModel.from_torch(module, head)(x)

    expected, final = module(x)
    torch.testing.assert_close(y, expected if head is None else head(expected))
    final = final if isinstance(final, tuple) else (final,)
    for part, exact in zip(zip(*states, strict=True), final, strict=True):
        torch.testing.assert_close(torch.stack(part), exact)


def test_from_torch_refusals() -> None:
    """A projection has no counterpart, and a head must fit."""
    with pytest.raises(ValueError, match="projection"):
        SequenceModel.from_torch(nn.LSTM(3, 4, proj_size=2))
    with pytest.raises(ValueError, match=r"head.W.* has shape \(2, 5\)"):
        SequenceModel.from_torch(nn.LSTM(3, 4), nn.Linear(5, 2))
