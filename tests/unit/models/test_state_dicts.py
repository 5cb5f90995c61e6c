"""State dicts of whole torch modules: read, run by the reference, and written again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.reference import run_model, stack_states, unstack_states
from models.spec import Layer, ModelSpec
from models.state_dicts import from_torch_state_dict, to_torch_state_dict

N, T, LENGTHS = 4, 9, np.array([9, 1, 4, 6])
KINDS = {
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
    "rnn": (torch.nn.RNN, {}),
    "rnn, relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_modules_equal_the_reference(kind: str, layers: int, bidirectional: bool, bias: bool) -> None:
    """Ragged rows from a given state: outputs and final states of torch and of the reference agree to 1e-12."""
    make, extra = KINDS[kind]
    torch.manual_seed(0)
    module = make(3, 5, layers, bias=bias, bidirectional=bidirectional, batch_first=True, dtype=torch.float64, **extra)
    x, h, c = torch.randn(N, T, 3).double(), *torch.randn(2, layers * (1 + bidirectional), N, 5).double()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    with torch.no_grad():
        packed_outputs, final = module(packed, (h, c) if kind == "lstm" else h)
    theirs, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_outputs, batch_first=True)

    read, weights = from_torch_state_dict(module.state_dict(), activation="relu" if "relu" in kind else "tanh")
    start = unstack_states((h.numpy(), c.numpy()) if kind == "lstm" else (h.numpy(),))
    outputs, states = run_model(ModelSpec(tuple(read)), weights, x.numpy(), LENGTHS, start)

    np.testing.assert_allclose(outputs, theirs.numpy(), rtol=0, atol=1e-12)
    for ours, their_part in zip(stack_states(states), final if kind == "lstm" else (final,), strict=True):
        np.testing.assert_allclose(ours, their_part.numpy(), rtol=0, atol=1e-12)


def test_layers_are_recognised() -> None:
    """Cell, sizes, directions and bias are read off the shapes."""
    layers, weights = from_torch_state_dict(torch.nn.GRU(3, 5, 2, bidirectional=True, bias=False).state_dict())
    assert layers == [
        Layer("gru", 3, 5, bidirectional=True, reset="after", bias=False),
        Layer("gru", 10, 5, bidirectional=True, reset="after", bias=False),
    ]
    assert {name: array.shape for name, array in weights.items()} == ModelSpec(tuple(layers)).weight_shapes


def test_written_state_dict_loads() -> None:
    """Written again, a module loads it, and read again it is the same, bit for bit."""
    torch.manual_seed(0)
    layers, weights = from_torch_state_dict(torch.nn.LSTM(3, 5, 2, bidirectional=True).state_dict())
    written = to_torch_state_dict(layers, weights, prefix="lstm.")
    model = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 5, 2, bidirectional=True)})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in written.items()})
    again, weights_again = from_torch_state_dict(model.state_dict())
    assert again == layers
    assert {name: array.tobytes() for name, array in weights_again.items()} == {
        name: array.tobytes() for name, array in weights.items()
    }


def test_prefix() -> None:
    """One recurrent module in a model is found; of two, the prefix says which; what else there is, is left alone."""
    model = torch.nn.ModuleDict({"body": torch.nn.LSTM(3, 5), "head": torch.nn.Linear(5, 2)})
    assert from_torch_state_dict(model.state_dict())[0] == [Layer("lstm", 3, 5)]
    model["second"] = torch.nn.RNN(4, 6)
    assert from_torch_state_dict(model.state_dict(), prefix="second.")[0] == [Layer("rnn", 4, 6)]
    with pytest.raises(ValueError, match=r"found \['body.', 'second.'\]; say which by its prefix"):
        from_torch_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"no third.weight_ih_l0 in the state dict"):
        from_torch_state_dict(model.state_dict(), prefix="third.")


def test_a_gap_is_no_shallower_model() -> None:
    """Three layers of which the middle one is missing are not one layer."""
    whole = torch.nn.LSTM(5, 5, 3).state_dict()
    gap = {f"body.{name}": array for name, array in whole.items() if not name.endswith("_l1")}
    with pytest.raises(ValueError, match=r"there is no body.weight_ih_l1, but .*'body.weight_ih_l2'"):
        from_torch_state_dict(gap)


def test_leftover_arrays() -> None:
    """A bias of a layer that has no matrices, and a name of no layer, are not passed over."""
    state_dict = dict(torch.nn.GRU(3, 5).state_dict())
    for name in ("bias_ih_l1", "weight_hh_l01"):
        with pytest.raises(ValueError, match=rf"no weight_ih_l1, but .*: \['{name}'\]"):
            from_torch_state_dict({**state_dict, name: torch.zeros(15)})


def test_refusals() -> None:
    """No recurrent module, projections, a missing matrix and a wrong number of gates are refused."""
    with pytest.raises(ValueError, match=r"expected one recurrent module in the state dict, found \[\]"):
        from_torch_state_dict(torch.nn.Linear(3, 2).state_dict())
    with pytest.raises(ValueError, match="projections"):
        from_torch_state_dict(torch.nn.LSTM(3, 5, proj_size=2).state_dict())
    with pytest.raises(ValueError, match="expected two matrices"):
        from_torch_state_dict({"weight_ih_l0": np.zeros((20, 3))})
    with pytest.raises(ValueError, match="10 rows for a hidden size of 5"):
        from_torch_state_dict({"weight_ih_l0": np.zeros((10, 3)), "weight_hh_l0": np.zeros((10, 5))})
