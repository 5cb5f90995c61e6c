"""The module that is exported is the one that is verified, and not merely its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import ExportError, VerificationFailed, export_model
from export.module import read_module, verify_module
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec
from tests.unit.models.drawn import LAYERS, draw_weights

SPEC = ModelSpec((Layer("gru", 3, 4),), head_size=2)


class Doubled(SequenceModel):
    """The outputs are twice what the weights say."""

    def forward(self, *inputs: Any) -> Any:
        """Run and double."""
        y, states = super().forward(*inputs)
        return 2 * y, states


class Residual(nn.LSTM):
    """The input is added to the output."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """Run and add."""
        y, final = super().forward(x, hx)
        return y + x, final


class Forgetful(SequenceModel):
    """The outputs are right, the states are not."""

    def forward(self, *inputs: Any) -> Any:
        """Run and forget."""
        y, states = super().forward(*inputs)
        return y, [tuple(torch.zeros_like(part) for part in state) for state in states]


class Padded(SequenceModel):
    """Every row is run as if it were as long as the longest."""

    def forward(self, x: Tensor, lengths: Tensor | None = None, states: Any = None) -> Any:
        """Run without lengths."""
        return super().forward(x, None, states)


def with_a_hook(module: nn.Module) -> nn.Module:
    """A hook makes every output larger by a thousandth."""
    module.register_forward_hook(lambda module, inputs, outputs: (1.001 * outputs[0], outputs[1]))
    return module


def with_another_forward(module: nn.Module) -> nn.Module:
    """The instance has a method of its own."""
    forward = module.forward
    module.forward = lambda x, lengths=None: forward(x.float().relu(), lengths)
    return module


def with_no_number(module: SequenceModel) -> nn.Module:
    """The head's bias is not a number."""
    assert module.head is not None
    nn.init.constant_(module.head.b, float("nan"))
    return module


DIFFERENT: dict[str, Callable[[], nn.Module]] = {
    "a subclass with a forward of its own": lambda: Doubled(SPEC),
    "a subclass that loses its states": lambda: Forgetful(SPEC),
    "a subclass that minds no lengths": lambda: Padded(SPEC),
    "a subclass of nn.LSTM": lambda: Residual(4, 4, batch_first=True),
    "a hook": lambda: with_a_hook(SequenceModel(SPEC)),
    "a hook on nn.GRU": lambda: with_a_hook(nn.GRU(3, 4)),
    "a forward put in its place": lambda: with_another_forward(SequenceModel(SPEC)),
    "a bias that is not a number": lambda: with_no_number(SequenceModel(SPEC)),
}


@pytest.mark.parametrize("make", DIFFERENT.values(), ids=DIFFERENT.keys())
@pytest.mark.parametrize("max_error", [None, 1.0])
def test_a_module_that_is_not_its_weights(
    make: Callable[[], nn.Module], max_error: float | None, tmp_path: Path
) -> None:
    """What computes something else than its weights say is refused, however large an error the graph is allowed."""
    torch.manual_seed(0)
    with pytest.raises(VerificationFailed, match="in 1 of 1 rows; at worst, in 'the module itself'") as failed:
        export_model(make(), tmp_path / "models", "no", max_error=max_error)
    assert failed.value.parity is not None
    assert list(tmp_path.iterdir()) == []


MODULES: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda layer=layer: SequenceModel(ModelSpec((layer,))) for name, layer in LAYERS.items() if layer.bias},  # type: ignore[misc]
    "tokens, last step": lambda: SequenceModel(
        ModelSpec(
            (Layer("gru", 3, 4, bidirectional=True), Layer("lstm", 8, 5, learned_initial_state=True)),
            vocabulary_size=7,
            head_size=2,
            head_on="last",
        )
    ),
    "nn.LSTM, two layers with dropout": lambda: nn.LSTM(3, 4, 2, dropout=0.5),
    "nn.GRU, batch first, bidirectional": lambda: nn.GRU(3, 4, 2, batch_first=True, bidirectional=True),
    "nn.RNN, relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "float16": lambda: nn.LSTM(3, 4).half(),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_module_that_is_its_weights(make: Callable[[], nn.Module]) -> None:
    """Every kind of module agrees with the reference in float64; it stays in training, and in its own dtype."""
    torch.manual_seed(0)
    module = make().train()
    dtypes = {tensor.dtype for tensor in module.state_dict().values()}
    spec, weights = read_module(module)
    row = verify_module(module, spec, {name: array.astype(np.float64) for name, array in weights.items()}, 1e-12)
    assert row.within
    assert (row.batch, row.steps) == (3, 7)
    assert module.training
    assert {tensor.dtype for tensor in module.state_dict().values()} == dtypes


@pytest.mark.parametrize("base", [SequenceModel, nn.LSTM], ids=["SequenceModel", "nn.LSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_buffers_that_are_no_weights(base: Any, dtype: torch.dtype) -> None:
    """A subclass may carry tensors that its outputs do not depend on, of any dtype."""
    module = base(SPEC) if base is SequenceModel else base(3, 4)
    module.register_buffer("seen", torch.ones(3, dtype=dtype))
    spec, weights = read_module(module)
    assert weights.keys() == spec.weight_shapes.keys()
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    assert verify_module(module, spec, exact, 1e-12).within


class WithoutStates(SequenceModel):
    """Gives its outputs alone."""

    def forward(self, *inputs: Any) -> Any:
        """Run."""
        return super().forward(*inputs)[0]


class WithoutLengths(SequenceModel):
    """Takes whole sequences alone."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """Run."""
        return super().forward(x)


class Short(SequenceModel):
    """Gives the last step where every one is expected."""

    def forward(self, *inputs: Any) -> Any:
        """Run."""
        y, states = super().forward(*inputs)
        return y[:, -1:], states


def without_a_head() -> nn.Module:
    """A module whose head was taken off by hand."""
    module = SequenceModel(SPEC)
    module.head = None
    return module


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WithoutStates(SPEC), "the module cannot be held against the reference"),
        (lambda: WithoutLengths(SPEC), "the module cannot be held against the reference: .*positional argument"),
        (lambda: Short(SPEC), r"got shape \(3, 1, 2\), expected \(3, 7, 2\)"),
        (without_a_head, r"missing \['head.W', 'head.b'\]"),
    ],
    ids=["no states", "no lengths", "another shape", "a part missing"],
)
def test_modules_of_another_form(make: Callable[[], nn.Module], says: str, tmp_path: Path) -> None:
    """What cannot be run as a model of its kind is refused in a sentence."""
    with pytest.raises(ExportError, match=says):
        export_model(make(), tmp_path / "models", "no")
    assert list(tmp_path.iterdir()) == []


def test_dropout_is_off() -> None:
    """A subclass that drops a half of its outputs in training computes what its weights say otherwise."""

    class Dropping(SequenceModel):
        def forward(self, *inputs: Any) -> Any:
            y, states = super().forward(*inputs)
            return nn.functional.dropout(y, training=self.training), states

    module = Dropping.from_weights(SPEC, draw_weights(SPEC.weight_shapes)).train()
    spec, weights = read_module(module)
    assert verify_module(module, spec, weights, 1e-12).within
