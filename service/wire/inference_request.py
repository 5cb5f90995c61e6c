"""What a ModelInferRequest asks: its parameters and control tensors, each read and checked.

Owns the names of the parameters, and what they mean together. What the model itself takes is the codec's to check.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, Unsupported
from service.manifest import ConstantSpec, Manifest
from service.ticks.row import USUAL
from service.values import from_text
from service.wire import inference_parameters as parameters
from service.wire import inference_tensors
from service.wire.codec import Tensor
from service.wire.inference_stubs import inference_pb2 as pb

T = TypeVar("T")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_LAST_PRIORITY = 3
_LARGEST = (1 << 63) - 1
_PER_ROW = ("sequence_ids", "sequence_start", "sequence_end", "sequence_positions", "sequence_epochs")
_OF_SEQUENCES = ("sequence_id", *_PER_ROW, "sequence_position", "sequence_epoch")
LENGTHS = "sequence_lengths"


@dataclass(frozen=True, slots=True)
class SequenceRow:
    """One row of a request, for a sequence whose state the server keeps.

    Attributes:
        identity: the sequence's id as text.
        start: whether it begins with this row.
        end: whether it ends with it.
        position: where the row begins; None for where the sequence then is.
        epoch: the life of the sequence; 0 for whichever there is.
    """

    identity: str
    start: bool
    end: bool
    position: int | None
    epoch: int


@dataclass(frozen=True, slots=True)
class Request:
    """A request, read; of the message it holds nothing more.

    Attributes:
        model: its name.
        version: of it; 0 for the newest.
        rows: for sequences, one a row; empty for a batch.
        tensors: the inputs that are no controls.
        wanted: names of outputs; empty for all of the model's.
        timeout_s: seconds from now until it must be applied; None for no limit.
        priority: 1 first, 2 as usual, 3 last.
        alone: whether its one sequence was named by ``sequence_id``.
        size: bytes that it holds, with its message, which a unary call keeps until it is answered.
    """

    model: str
    version: int
    rows: tuple[SequenceRow, ...]
    tensors: tuple[Tensor, ...]
    wanted: tuple[str, ...]
    timeout_s: float | None
    priority: int
    alone: bool
    size: int


@dataclass(frozen=True, slots=True)
class Given:
    """A request's tensors, by what they are to a model.

    Attributes:
        inputs: what goes in.
        lengths: steps of each row; empty for all that there are.
        states: what to begin from.
    """

    inputs: list[Tensor]
    lengths: list[int]
    states: list[Tensor]


def version_number(text: str) -> int:
    """Read a version; empty for the newest, which is 0.

    Raises:
        InvalidRequest: if it is none.
    """
    if text and not _VERSION.fullmatch(text):
        raise InvalidRequest(f"version {text[:64]!r} is none; expected a positive integer, or nothing for the newest")
    return int(text or 0)


def identities(message: pb.ModelInferRequest, max_rows: int) -> list[str]:
    """Read which sequences a request is for, one a row; none for a batch.

    Args:
        message: the request.
        max_rows: most rows of a request.

    Raises:
        InvalidRequest: if that cannot be told.
    """
    inference_tensors.check_counts(message)
    one = parameters.identity(message.parameters, "sequence_id")
    many = _each_row(message, "sequence_ids", max_rows, inference_tensors.texts_or_integers, (str, int))
    if many is None:
        return [one] if one else []
    if one:
        raise InvalidRequest("sequence_id and sequence_ids were given; expected one or the other")
    if not many:
        raise InvalidRequest("sequence_ids holds no ids; expected one for each row")
    ids: dict[str, None] = {}
    for row, value in enumerate(many):
        identity = parameters.as_identity(value)
        if not identity:
            raise InvalidRequest(f"row {row} has no sequence id (0, or an empty text); expected one for each row")
        if identity in ids:
            raise InvalidRequest(f"sequence {identity[:64]!r} stands twice in sequence_ids; expected each once")
        ids[identity] = None
    return [*ids]


def read(message: pb.ModelInferRequest, ids: Sequence[str], max_rows: int) -> Request:
    """Read a request.

    Args:
        message: the request; its raw contents are taken out.
        ids: of its sequences, as ``identities`` gives them.
        max_rows: most rows of a request.

    Raises:
        InvalidRequest: if something in it is not as it should be.
        Unsupported: if it asks for what is not offered.
    """
    for name in message.parameters:
        # Misspelt, a position would be none, and the step be applied twice.
        if name.startswith("sequence") and name not in _OF_SEQUENCES:
            raise InvalidRequest(f"parameter {name[:64]!r} is unknown; there are: {', '.join(_OF_SEQUENCES)}")
    timeout_us = parameters.integer(message.parameters, "timeout", 0, _LARGEST) or 0
    priority = parameters.integer(message.parameters, "priority", 0, 2 * _LARGEST + 1) or USUAL
    tensors = tuple(
        inference_tensors.tensor(message, index) for index, one in enumerate(message.inputs) if one.name not in _PER_ROW
    )
    return Request(
        message.model_name,
        version_number(message.model_version),
        _rows(message, ids, max_rows),
        tensors,
        _wanted(message),
        timeout_us * 1e-6 or None,
        min(priority, _LAST_PRIORITY),
        "sequence_id" in message.parameters and len(ids) == 1,
        inference_tensors.take_size(message) + sum(tensor.size for tensor in tensors),
    )


def split(request: Request, manifest: Manifest, max_rows: int) -> Given:
    """Tell a request's tensors apart, for the model that is to take them.

    A state may be named as the manifest names it, or as the graph names its input.

    Args:
        request: the request.
        manifest: of the model.
        max_rows: most rows of a request.

    Raises:
        InvalidRequest: if lengths are not as they should be, or a constant has another value.
    """
    given = Given([], [], [])
    constants = {spec.name: spec for spec in manifest.constants}
    own = {spec.name for spec in manifest.inputs}
    states = {name: spec.name for spec in manifest.states for name in (spec.input, spec.name)}
    for tensor in request.tensors:
        if tensor.name in own:
            given.inputs.append(tensor)
        elif tensor.name in (LENGTHS, manifest.lengths):
            given.lengths.extend(inference_tensors.integers(tensor, max_rows))
        elif tensor.name in constants:
            _check_constant(tensor, constants[tensor.name], max_rows)
        elif tensor.name in states:
            given.states.append(tensor._replace(name=states[tensor.name]))
        else:
            given.inputs.append(tensor)
    return given


def _check_constant(tensor: Tensor, constant: ConstantSpec, max_rows: int) -> None:
    """Let clients send a constant that the server has anyway, once or for each row."""
    value = base64.b64decode(constant.value)
    size = math.prod(constant.shape)
    times = math.prod(tensor.shape) // max(size, 1)
    like = tensor.dtype == constant.dtype and math.prod(tensor.shape) == times * size and 0 <= times <= max_rows
    given = tensor.array(f"input {tensor.name!r}")
    if not like or given.tobytes() != value * times:
        should = from_text(constant.value, constant.dtype, constant.shape)
        raise InvalidRequest(
            f"input {tensor.name!r} is a constant of this model; leave it out, or send its value, {_abridged(should)}; "
            f"got {_abridged(given)}"
        )


def _abridged(array: NDArray[np.generic]) -> str:
    """A number, or the shape of many, with the dtype."""
    value = array.ravel()[0] if array.size == 1 else f"of shape {list(array.shape)}"
    return f"{value} ({array.dtype.name})"


def _rows(message: pb.ModelInferRequest, ids: Sequence[str], max_rows: int) -> tuple[SequenceRow, ...]:
    count = len(ids)
    starts = _flags(message, "sequence_start", count, max_rows)
    ends = _flags(message, "sequence_end", count, max_rows)
    positions = _numbers(message, "sequence_position", count, max_rows)
    epochs = _numbers(message, "sequence_epoch", count, max_rows)
    if not ids:
        numbered = any(name in message.parameters for name in ("sequence_position", "sequence_epoch"))
        if numbered or any(starts) or any(ends):
            raise InvalidRequest(
                f"inference request to model '{message.model_name[:128]}' must specify a non-zero or non-empty "
                "correlation ID: it says START, END, a position or an epoch, and no sequence_id"
            )
        return ()
    return tuple(
        SequenceRow(identity, start, end, position, epoch or 0)
        for identity, start, end, position, epoch in zip(ids, starts, ends, positions, epochs, strict=True)
    )


def _flags(message: pb.ModelInferRequest, name: str, count: int, max_rows: int) -> list[bool]:
    """Read a flag of each row: from a tensor, or from a parameter for all of them."""
    tensor = _tensor(message, name)
    if tensor is not None:
        return _as_many(name, inference_tensors.flags(tensor, max_rows), count)
    return [parameters.flag(message.parameters, name)] * (count or 1)


def _numbers(message: pb.ModelInferRequest, name: str, count: int, max_rows: int) -> Sequence[int | None]:
    """Read a number of each row: from a tensor or parameter with the plural name, or from a parameter for one row."""
    one = parameters.integer(message.parameters, name, 0, _LARGEST)
    many = _each_row(message, f"{name}s", max_rows, inference_tensors.integers, (int,))
    if many is not None:
        if one is not None:
            raise InvalidRequest(f"{name} and {name}s were given; expected one or the other")
        if any(not 0 <= number <= _LARGEST for number in many):
            raise InvalidRequest(f"{name}s holds a number beyond its range; expected 0 to {_LARGEST}")
        return _as_many(f"{name}s", many, count)
    if one is not None and count > 1:
        raise InvalidRequest(f"{name} is given for {count} rows; expected {name}s, with one for each row")
    return [one] * count


def _as_many(name: str, values: list[T], count: int) -> list[T]:
    if len(values) != count:
        raise InvalidRequest(f"{name} holds {len(values)} values for {count} sequence ids; expected one for each")
    return values


def _each_row(
    message: pb.ModelInferRequest,
    name: str,
    max_rows: int,
    from_tensor: Callable[[Tensor, int], list[Any]],
    kinds: tuple[type, ...],
) -> list[Any] | None:
    """Read one value a row, from a tensor or from a parameter that holds a JSON list; None if there is neither."""
    tensor = _tensor(message, name)
    if tensor is not None:
        if name in message.parameters:
            raise InvalidRequest(f"{name} is given as an input and as a parameter; expected one or the other")
        return from_tensor(tensor, max_rows)
    return parameters.many(message.parameters, name, kinds, max_rows)


def _tensor(message: pb.ModelInferRequest, name: str) -> Tensor | None:
    """Return the control tensor of that name."""
    found = [index for index, one in enumerate(message.inputs) if one.name == name]
    if not found:
        return None
    if len(found) > 1:
        raise InvalidRequest(f"input {name!r} stands {len(found)} times; expected it once")
    return inference_tensors.tensor(message, found[0], control=True)


def _wanted(message: pb.ModelInferRequest) -> tuple[str, ...]:
    for output in message.outputs:
        inference_tensors.refuse_shared_memory(output.parameters)
        if parameters.integer(output.parameters, "classification", 0, _LARGEST):
            raise Unsupported("this server does not turn outputs into classes; ask for the output itself")
    names = [output.name for output in message.outputs]
    if len(set(names)) != len(names):
        raise InvalidRequest("an output is asked for twice; expected each once")
    return tuple(names)
