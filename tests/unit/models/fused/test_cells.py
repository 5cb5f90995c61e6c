"""The fused-gate modules compute what the reference computes, in float64, and can be trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.fused import SequenceModel
from models.reference import run_model
from models.spec import Layer, ModelSpec
from models.weights import Array
from tests.unit.models.drawn import LAYERS, draw, draw_weights

N, T = 4, 6
LENGTHS = np.array([6, 2, 5, 1])


def stack(layer: Layer, bidirectional: bool) -> ModelSpec:
    """Two layers of one cell, of different sizes, with a learned initial state."""
    first = replace(layer, bidirectional=bidirectional, learned_initial_state=True)
    return ModelSpec((first, replace(first, input_size=first.output_size, hidden_size=2)), head_size=3)


def check(spec: ModelSpec, x: Array, lengths: Array | None, states: list[tuple[Array, ...]] | None) -> None:
    """Hold a model against the reference, outputs and final states."""
    weights = draw_weights(spec.weight_shapes)
    model = SequenceModel.from_weights(spec, weights)
    given = None if states is None else [tuple(torch.from_numpy(part) for part in state) for state in states]
    y, final = model(torch.from_numpy(x), None if lengths is None else torch.from_numpy(lengths), given)
    expected, expected_final = run_model(spec, weights, x, lengths, states)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-12, atol=1e-13)
    for state, exact in zip(final, expected_final, strict=True):
        assert len(state) == len(exact)
        for part, exact_part in zip(state, exact, strict=True):
            np.testing.assert_allclose(part.detach().numpy(), exact_part, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_equals_the_reference(layer: Layer, bidirectional: bool) -> None:
    """Whole and ragged sequences, from the learned state and from a given one: outputs and final states agree."""
    spec = stack(layer, bidirectional)
    x = draw(N, T, layer.input_size)
    states = [
        tuple(draw(N, part.hidden_size, seed=seed) for seed in range(1 + part.has_cell_state))
        for part in spec.layers
        for _ in range(part.directions)
    ]
    check(spec, x, None, None)
    check(spec, x, LENGTHS, states)


@pytest.mark.parametrize("head_size", [None, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_tokens_in_and_the_last_step_out(head_size: int | None, lengths: Array | None) -> None:
    """Token ids go through the embedding; a head on the last step sees each row's last valid one."""
    layers = (Layer("gru", 3, 4, bidirectional=True), Layer("lstm", 8, 5))
    tokens = np.random.default_rng(0).integers(0, 11, (N, T))
    check(ModelSpec(layers, vocabulary_size=11, head_size=head_size, head_on="last"), tokens, lengths, None)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_gradients(layer: Layer) -> None:
    """What autograd gives for every weight is the slope that small differences show, ragged rows among them."""
    spec = ModelSpec((replace(layer, hidden_size=2, bidirectional=True, learned_initial_state=True),), head_size=2)
    model = SequenceModel.from_weights(spec, draw_weights(spec.weight_shapes))
    names = list(spec.weight_shapes)
    x, lengths = torch.from_numpy(draw(2, 3, 3)), torch.tensor([3, 1])

    def outputs(*weights: torch.Tensor) -> torch.Tensor:
        y, _ = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x, lengths))
        return torch.as_tensor(y)

    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(outputs, weights)


def test_padding_does_not_reach_the_gradients() -> None:
    """Padding that is not a number leaves outputs and gradients as padding with zeros does."""
    spec = ModelSpec((Layer("lstm", 3, 4, bidirectional=True),), head_size=2)
    x, lengths = torch.from_numpy(draw(2, 3, 3)), torch.tensor([3, 1])
    gradients = []
    for padding in (0.0, torch.nan):
        model = SequenceModel.from_weights(spec, draw_weights(spec.weight_shapes))
        padded = x.clone()
        padded[1, 1:] = padding
        model(padded, lengths)[0].square().sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_it_learns() -> None:
    """A hundred steps of training teach an LSTM to give back what it saw two steps ago."""
    torch.manual_seed(0)
    model = SequenceModel(ModelSpec((Layer("lstm", 1, 16),), head_size=1))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.rand(32, 8, 1)
    losses = []
    for _ in range(100):
        loss = (model(x)[0][:, 2:] - x[:, :-2]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
