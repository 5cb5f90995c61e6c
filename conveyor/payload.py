"""A caller's arrays as a model's tensors, and back. Must not know channels or sessions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from conveyor.errors import InvalidRequest, ProtocolError
from conveyor.model import Model, TensorSpec
from conveyor.tensors import Array, decode_tensor, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb

Inputs: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
"""One array where the model has one input; otherwise arrays by name."""

Sequences: TypeAlias = Sequence[Array] | Mapping[str, Sequence[Array]]
"""Sequences of different lengths, each [T_n, ...]: a list where the model has one input, otherwise lists by name."""

Outputs: TypeAlias = Any
"""One array where the model has one output; otherwise a dict of arrays by name. They are read-only: copy to write."""

States: TypeAlias = Mapping[str, ArrayLike]
"""States by name."""


def encode_inputs(model: Model, x: Inputs) -> list[pb.Tensor]:
    """Writes a batch's inputs, each [N, T, ...], in the model's dtypes.

    Raises:
        InvalidRequest: an input is missing or unknown, has another shape, or does not go into the model's dtype.
    """
    tensors = []
    for spec, values in _by_name(model, x):
        array = _cast(repr(spec.name), _whole(spec, values), spec.dtype)
        _check_shape(f"input {spec.name!r}", array, _sizes(spec))
        tensors.append(encode_tensor(spec.name, array))
    return tensors


def encode_lengths(lengths: ArrayLike, rows: int) -> list[int]:
    """Writes how many steps of each of a batch's rows are valid.

    Raises:
        InvalidRequest: they are not whole numbers, one for each row.
    """
    array = _array("'lengths'", lengths)
    if array.shape != (rows,):
        raise InvalidRequest(f"'lengths' has shape {list(array.shape)}; expected [{rows}], one for each row")
    whole: list[int] = _cast("'lengths'", array, np.dtype(np.int64)).tolist()
    return whole


def read_chunk(model: Model, x: Inputs) -> list[Array]:
    """A chunk's inputs as arrays in the model's order, as they are; or those of many chunks, side by side.

    Raises:
        InvalidRequest: an input is missing or unknown, or is not an array.
    """
    if isinstance(x, np.ndarray) and len(model.inputs) == 1:
        return [x]
    return [_array(repr(spec.name), values) for spec, values in _by_name(model, x)]


def cast_chunks(model: Model, inputs: Iterable[Array], of: str = "") -> tuple[list[Array], bool]:
    """Brings the inputs of N chunks into the model's dtypes.

    Args:
        model: that is to run them.
        inputs: in the model's order, each [N, T, ...], or [N, ...] for single steps.
        of: what an error is to say before the name of an input, if it tells of one row of it.

    Returns:
        The arrays, each [N, T, ...], and whether the chunks were single steps without a time axis.

    Raises:
        InvalidRequest: an input has another shape, or does not go into the model's dtype.
    """
    arrays = []
    single_step = set()
    for spec, given in zip(model.inputs, inputs, strict=True):
        array = _cast(repr(spec.name), given, spec.dtype)
        sizes = _sizes(spec)
        chunk = sizes[1:]
        single = array.ndim == len(chunk)
        if not _fits(array, [sizes[0], *(chunk[1:] if single else chunk)]):
            raise InvalidRequest(
                f"{of}input {spec.name!r} has shape {list(array.shape[1:])}; "
                f"expected {_show(chunk)}, or {_show(chunk[1:])} for a single step"
            )
        single_step.add(single)
        arrays.append(array[:, np.newaxis] if single else array)
    if len(single_step) != 1:
        raise InvalidRequest("some inputs have a time axis and some have not")
    return arrays, single_step.pop()


def encode_states(model: Model, states: States, *, batch: bool) -> list[pb.Tensor]:
    """Writes states in the model's dtypes, each [N, ...] where ``batch``, without the batch axis otherwise.

    Raises:
        InvalidRequest: a state is missing or unknown, has another shape, or does not go into the model's dtype.
    """
    _check_names("states", model.states, states)
    tensors = []
    for spec in model.states:
        array = _cast(repr(spec.name), states[spec.name], spec.dtype)
        _check_shape(f"state {spec.name!r}", array, _sizes(spec)[0 if batch else 1 :])
        tensors.append(encode_tensor(spec.name, array))
    return tensors


def decode_outputs(model: Model, tensors: Iterable[pb.Tensor]) -> Outputs:
    """Reads a batch's outputs, each [N, T, ...], or [N, ...] where the output has no time axis.

    Raises:
        ProtocolError: an output is missing, or its bytes do not fit its shape.
    """
    arrays = decode_complete(model, tensors)
    return arrays[model.outputs[0].name] if len(model.outputs) == 1 else arrays


def decode_complete(model: Model, tensors: Iterable[pb.Tensor]) -> dict[str, Array]:
    """Reads all of a model's outputs into a dict by name.

    Raises:
        ProtocolError: an output is missing, or its bytes do not fit its shape.
    """
    arrays = decode_named(tensors)
    if missing := [spec.name for spec in model.outputs if spec.name not in arrays]:
        raise ProtocolError(f"the reply lacks the outputs {', '.join(missing)}")
    return arrays


def decode_named(tensors: Iterable[pb.Tensor]) -> dict[str, Array]:
    """Reads tensors into a dict by name.

    Raises:
        ProtocolError: the bytes of one do not fit its shape.
    """
    return {tensor.name: decode_tensor(tensor) for tensor in tensors}


def are_ragged(x: Inputs | Sequences) -> bool:
    """Whether inputs are lists of arrays, and not arrays."""
    given = list(x.values()) if isinstance(x, Mapping) else [x]
    return bool(given) and all(
        isinstance(each, list | tuple) and len(each) > 0 and all(isinstance(row, np.ndarray) for row in each)
        for each in given
    )


def encode_ragged(model: Model, x: Sequences) -> tuple[list[pb.Tensor], list[int]]:
    """Writes sequences of different lengths, each [T_n, ...], one behind the other, in the model's dtypes.

    Returns:
        The tensors, each [sum of T_n, ...], and the lengths T_n.

    Raises:
        InvalidRequest: an input is missing or unknown, a sequence has another shape or does not go into the model's
            dtype, or sequences differ in what they must not.
    """
    tensors: list[pb.Tensor] = []
    lengths: list[int] = []
    for spec, sequences in _by_name(model, x):
        name = repr(spec.name)
        arrays = [_cast(name, sequence, spec.dtype) for sequence in sequences]
        for n, array in enumerate(arrays):
            _check_shape(f"sequence {n} of input {name}", array, _sizes(spec)[1:])
        if len({array.shape[1:] for array in arrays}) > 1:
            shapes = [list(array.shape) for array in arrays]
            raise InvalidRequest(f"the sequences of input {name} must agree in all axes but the first; got {shapes}")
        steps = [len(array) for array in arrays]
        if tensors and steps != lengths:
            raise InvalidRequest(
                f"the sequences of input {name} are as long as {steps}; "
                f"expected {lengths}, as those of input {model.inputs[0].name!r}"
            )
        lengths = steps
        tensors.append(encode_tensor(spec.name, np.concatenate(arrays)))
    return tensors, lengths


def split(model: Model, outputs: Outputs, lengths: list[int]) -> Outputs:
    """Takes the outputs of sequences that stand one behind the other apart: a list for each output.

    Args:
        model: that gave them.
        outputs: as ``decode_outputs`` gives them, each [sum of T_n, ...], or [N, ...] where it has no time axis.
        lengths: T_n, of each sequence.

    Raises:
        ProtocolError: an output is not as long as it must be.
    """
    named = outputs if isinstance(outputs, dict) else {model.outputs[0].name: outputs}
    rows = {}
    for spec in model.outputs:
        array, expected = named[spec.name], sum(lengths) if "time" in spec.axes else len(lengths)
        if array.shape[:1] != (expected,):
            raise ProtocolError(f"output {spec.name!r} came with shape {list(array.shape)}; expected [{expected}, ...]")
        rows[spec.name] = np.split(array, np.cumsum(lengths)[:-1]) if "time" in spec.axes else list(array)
    return rows if isinstance(outputs, dict) else rows[model.outputs[0].name]


def _whole(spec: TensorSpec, values: ArrayLike) -> Array:
    """A batch's input as one array; what is refused may have been meant as sequences of different lengths."""
    if isinstance(values, list | tuple) and not values:
        raise InvalidRequest(f"input {spec.name!r} is an empty list; expected at least one sequence")
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InvalidRequest(
            f"input {spec.name!r} is not an array: {error}; expected one, or for sequences of different lengths a list "
            f"of NumPy arrays, each {_show(_sizes(spec)[1:])}"
        ) from error


def _by_name(model: Model, x: Any) -> list[tuple[TensorSpec, Any]]:
    """What is given for each of the model's inputs."""
    if not isinstance(x, Mapping):
        if len(model.inputs) != 1:
            names = ", ".join(spec.name for spec in model.inputs)
            raise InvalidRequest(f"model {model.name!r} has the inputs {names}; expected a dict of arrays by name")
        x = {model.inputs[0].name: x}
    _check_names("inputs", model.inputs, x)
    return [(spec, x[spec.name]) for spec in model.inputs]


def _check_names(kind: str, specs: tuple[TensorSpec, ...], given: Mapping[str, Any]) -> None:
    expected = {spec.name for spec in specs}
    if given.keys() != expected:
        raise InvalidRequest(f"got the {kind} {sorted(given)}; expected {sorted(expected)}")


def _sizes(spec: TensorSpec) -> list[int | str]:
    """The size of each axis; a letter where any size goes, as the wire contract has it."""
    letters = {"batch": "N", "time": "T"}
    return [letters.get(axis, axis) if size is None else size for axis, size in zip(spec.axes, spec.shape, strict=True)]


def _fits(array: Array, sizes: list[int | str]) -> bool:
    return array.ndim == len(sizes) and all(
        isinstance(expected, str) or size == expected for size, expected in zip(array.shape, sizes, strict=True)
    )


def _check_shape(what: str, array: Array, sizes: list[int | str]) -> None:
    if not _fits(array, sizes):
        raise InvalidRequest(f"{what} has shape {list(array.shape)}; expected {_show(sizes)}")


def _show(sizes: list[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _array(what: str, values: ArrayLike) -> Array:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InvalidRequest(f"{what} is not an array: {error}") from error


def _cast(what: str, values: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """The values in another dtype; refuses what would lose more than precision."""
    array = _array(what, values)
    if array.dtype == dtype:
        return array
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InvalidRequest(f"{what} has dtype {array.dtype}; expected {dtype.name}")
    try:
        with np.errstate(all="ignore", over="raise"):
            result = array.astype(dtype)
        fits = result.dtype.kind != "i" or np.array_equal(result, array)
    except FloatingPointError:
        fits = False
    if not fits:
        raise InvalidRequest(f"{what} holds values that do not fit into {dtype.name}")
    return result
