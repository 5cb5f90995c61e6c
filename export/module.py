"""The module that is exported: what it is made of, and whether that is all that it computes.

Owns reading a torch module, and running it. Must not know ONNX.

What is exported is read off a module's weights. A subclass with a ``forward`` of its own, or a module with hooks, has
the same weights and computes something else. So the module itself is run, in float64, and held against the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.runtime import Result
from export.verify import compare
from models.fused import SequenceModel
from models.reference import run_model
from models.spec import ModelSpec
from models.weights import Array, Weights, check_shapes
from service.manifest import ParityRow

Recurrent = TypeVar("Recurrent", bound=nn.Module)

STEPS = 7
LENGTHS = (7, 1, 4)
"""The steps of the batch, and those of each row where a module takes lengths.

Few, so that even a model which enlarges rounding errors step by step agrees with the reference in float64.
"""


def read_module(model: nn.Module) -> tuple[ModelSpec, dict[str, Array]]:
    """What a module is made of, and its canonical weights. Tensors that are no weights of such a model are left alone.

    Raises:
        ExportError: it is of another kind or dtype than can be exported, or its weights are not those of such a model.
    """
    if not isinstance(model, SequenceModel | nn.LSTM | nn.GRU | nn.RNN):
        raise ExportError(
            f"got a {type(model).__name__}, expected a SequenceModel or a torch.nn.LSTM, GRU or RNN; "
            "a recurrent module with a linear head is SequenceModel.from_torch(recurrent, head)"
        )
    try:
        if not isinstance(model, SequenceModel):
            _check_dtypes({name: t for name, t in model.state_dict().items() if name.startswith(("weight_", "bias_"))})
            model = SequenceModel.from_torch(_exact(model))  # whose two biases become one, in float16 with a loss
        tensors = {name: t for name, t in model.state_dict().items() if name in model.spec.weight_shapes}
        _check_dtypes(tensors)
        weights: dict[str, Array] = {name: t.detach().cpu().numpy().copy() for name, t in tensors.items()}
        check_shapes(weights, model.spec.weight_shapes)
    except (RuntimeError, ValueError) as error:
        raise ExportError(str(error)) from error
    return model.spec, weights


def verify_module(model: nn.Module, spec: ModelSpec, weights: Weights, bound: float) -> ParityRow:
    """Run a module over a random batch, ragged if it takes lengths, and hold it against the reference.

    Args:
        model: a ``SequenceModel``, or a torch.nn.LSTM, GRU or RNN; a copy of it is run, with dropout off.
        spec: what ``read_module`` took it for.
        weights: the canonical weights, in float64.
        bound: what both errors must stay under.

    Raises:
        ExportError: it cannot be run as such a module, or gives something of another form.
    """
    random, N = np.random.default_rng(0), len(LENGTHS)
    if spec.vocabulary_size is None:
        x: Array = random.standard_normal((N, STEPS, spec.layers[0].input_size))
    else:
        x = random.integers(0, spec.vocabulary_size, (N, STEPS))
    lengths = np.array(LENGTHS) if isinstance(model, SequenceModel) else np.full(N, STEPS)
    expected = Result(*run_model(spec, weights, x, lengths))
    try:
        with torch.no_grad():
            got = _run(_exact(model).eval(), torch.from_numpy(x), torch.from_numpy(lengths))
        return compare("the module itself", spec, x, got, expected, bound)
    except Exception as error:  # whatever a module of the user's raises
        raise ExportError(f"the module cannot be held against the reference: {error}") from error


def _exact(model: Recurrent) -> Recurrent:
    """A copy in float64."""
    return copy.deepcopy(model).cpu().double()


def _run(model: nn.Module, x: Tensor, lengths: Tensor) -> Result:
    states: Sequence[Sequence[Tensor]]
    if isinstance(model, SequenceModel):
        y, states = model(x, lengths)
    else:
        batch_first = bool(model.batch_first)
        y, final = model(x if batch_first else x.transpose(0, 1))
        y = y if batch_first else y.transpose(0, 1)
        states = list(zip(*(final if isinstance(final, tuple) else (final,)), strict=True))
    return Result(y.numpy(), [tuple(part.numpy() for part in state) for state in states])


def _check_dtypes(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            raise ValueError(f"weight {name} is {tensor.dtype}, expected float16, float32 or float64")
