"""A caller's arrays as a model's tensors, and back. Must not know channels or sessions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from conveyor.errors import InvalidRequest, ProtocolError
from conveyor.model import Model, TensorSpec
from conveyor.tensors import Array, decode_tensor, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb

Inputs: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
"""One array where the model has one input; otherwise arrays by name."""

Outputs: TypeAlias = Any
"""One array where the model has one output; otherwise a dict of arrays by name. They are read-only: copy to write."""

States: TypeAlias = Mapping[str, ArrayLike]
"""States by name."""


def encode_inputs(model: Model, x: Inputs) -> list[pb.Tensor]:
    """Writes a batch's inputs, each [N, T, ...], in the model's dtypes.

    Raises:
        InvalidRequest: an input is missing or unknown, or its values do not go into the model's dtype.
    """
    return [encode_tensor(spec.name, array) for spec, array in _arrays(model, x)]


def encode_chunk(model: Model, x: Inputs) -> tuple[list[pb.Tensor], bool]:
    """Writes a chunk's inputs, each [T, ...], or [...] for a single step.

    Returns:
        The tensors, each [T, ...], and whether x was a single step without a time axis.

    Raises:
        InvalidRequest: an input is missing or unknown, has the wrong number of axes, or does not go into the
            model's dtype.
    """
    tensors = []
    single_step = set()
    for spec, array in _arrays(model, x):
        axes = len(spec.shape) - 1
        if array.ndim not in (axes - 1, axes):
            raise InvalidRequest(
                f"input {spec.name!r} has shape {array.shape}; expected [{', '.join(spec.axes[1:])}], "
                f"or [{', '.join(spec.axes[2:])}] for a single step"
            )
        single_step.add(array.ndim == axes - 1)
        tensors.append(encode_tensor(spec.name, array if array.ndim == axes else array[np.newaxis]))
    if len(single_step) != 1:
        raise InvalidRequest("some inputs have a time axis and some have not")
    return tensors, single_step.pop()


def encode_states(model: Model, states: States) -> list[pb.Tensor]:
    """Writes states in the model's dtypes.

    Raises:
        InvalidRequest: a state is missing or unknown, or its values do not go into the model's dtype.
    """
    _check_names("states", model.states, states)
    return [encode_tensor(spec.name, _cast(states[spec.name], spec)) for spec in model.states]


def decode_outputs(model: Model, tensors: Iterable[pb.Tensor], *, single_step: bool = False) -> Outputs:
    """Reads a reply's outputs.

    Args:
        model: that gave them.
        tensors: each [T, ...], or [...] where the output has no time axis; with the batch axis before it for a batch.
        single_step: drops the time axis, which is then the first and of size 1.

    Raises:
        ProtocolError: an output is missing, or its bytes do not fit its shape.
    """
    arrays = decode_named(tensors)
    if missing := [spec.name for spec in model.outputs if spec.name not in arrays]:
        raise ProtocolError(f"the reply lacks the outputs {', '.join(missing)}")
    if single_step:
        for spec in model.outputs:
            if "time" in spec.axes:
                arrays[spec.name] = arrays[spec.name][0]
    return arrays[model.outputs[0].name] if len(model.outputs) == 1 else arrays


def decode_named(tensors: Iterable[pb.Tensor]) -> dict[str, Array]:
    """Reads tensors into a dict by name.

    Raises:
        ProtocolError: the bytes of one do not fit its shape.
    """
    return {tensor.name: decode_tensor(tensor) for tensor in tensors}


def pad(model: Model, sequences: list[Array]) -> tuple[Array, list[int]]:
    """Brings ragged sequences [T_i, ...] into one batch [N, T, ...] with zeros behind each.

    Returns:
        The batch and each row's length.

    Raises:
        InvalidRequest: the model has several inputs, there are no sequences, or they differ in more than their length.
    """
    if len(model.inputs) != 1:
        raise InvalidRequest(f"model {model.name!r} has several inputs; a list of sequences needs a model with one")
    arrays = [_cast(sequence, model.inputs[0]) for sequence in sequences]
    features = {array.shape[1:] for array in arrays}
    if len(features) != 1 or any(array.ndim == 0 for array in arrays):
        raise InvalidRequest(f"sequences must agree in all axes but the first; got {[array.shape for array in arrays]}")
    lengths = [len(array) for array in arrays]
    batch = np.zeros((len(arrays), max(lengths), *features.pop()), arrays[0].dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[: len(array)] = array
    return batch, lengths


def unpad(model: Model, outputs: Outputs, lengths: list[int]) -> Outputs:
    """Cuts a batch's outputs back into rows, each of its own length: a list [T_i, ...] for each output."""
    named = outputs if isinstance(outputs, dict) else {model.outputs[0].name: outputs}
    rows = {
        spec.name: [
            row[:length] if "time" in spec.axes else row
            for row, length in zip(named[spec.name], lengths, strict=True)
        ]
        for spec in model.outputs
    }  # fmt: skip
    return rows if isinstance(outputs, dict) else rows[model.outputs[0].name]


def _arrays(model: Model, x: Inputs) -> list[tuple[TensorSpec, Array]]:
    if not isinstance(x, Mapping):
        if len(model.inputs) != 1:
            names = ", ".join(spec.name for spec in model.inputs)
            raise InvalidRequest(f"model {model.name!r} has the inputs {names}; expected a dict of arrays by name")
        x = {model.inputs[0].name: x}
    _check_names("inputs", model.inputs, x)
    return [(spec, _cast(x[spec.name], spec)) for spec in model.inputs]


def _check_names(kind: str, specs: tuple[TensorSpec, ...], given: Mapping[str, ArrayLike]) -> None:
    expected = {spec.name for spec in specs}
    if given.keys() != expected:
        raise InvalidRequest(f"got the {kind} {sorted(given)}; expected {sorted(expected)}")


def _cast(values: ArrayLike, spec: TensorSpec) -> Array:
    """The values in the model's dtype; refuses what would lose more than precision."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidRequest(f"{spec.name!r} is not an array: {error}") from error
    if array.dtype == spec.dtype:
        return array
    if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise InvalidRequest(f"{spec.name!r} has dtype {array.dtype}; expected {spec.dtype.name}")
    result = array.astype(spec.dtype)
    if result.dtype.kind == "i" and not np.array_equal(result, array):
        raise InvalidRequest(f"{spec.name!r} holds values that do not fit into {spec.dtype.name}")
    return result
