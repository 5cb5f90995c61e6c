"""The tensors of conveyor.v1: its messages to what the codec reads, and arrays to messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conveyor.v1 import conveyor_pb2 as pb
from service.errors import InvalidRequest
from service.wire.assembly import Joined, Part, field
from service.wire.codec import MOST_AXES, MOST_TENSORS, Array, Tensor, to_bytes

DATA_TYPES: dict[str, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "float64": pb.DATA_TYPE_FLOAT64,
    "int64": pb.DATA_TYPE_INT64,
    "int32": pb.DATA_TYPE_INT32,
    "int8": pb.DATA_TYPE_INT8,
    "bool": pb.DATA_TYPE_BOOL,
}
_BY_DTYPE = {np.dtype(name): value for name, value in DATA_TYPES.items()}
"""For arrays: to ask a dtype for its name takes longer than all else that is done to a small one."""
_NAMES = {value: name for name, value in DATA_TYPES.items()}


def decode(messages: Sequence[pb.Tensor]) -> list[Tensor]:
    """Return messages as the codec reads them.

    Raises:
        InvalidRequest: if they are too many.
    """
    if len(messages) > MOST_TENSORS:
        raise InvalidRequest(f"there are {len(messages)} tensors; a request has up to {MOST_TENSORS}")
    return [
        Tensor(message.name, _NAMES.get(message.data_type, ""), tuple(message.shape[: MOST_AXES + 1]), message.data)
        for message in messages
    ]


def steps_of(messages: Sequence[pb.Tensor]) -> int:
    """Return how many steps the inputs of a chunk have, as the first says, before anything is checked; 0 for none."""
    shape = messages[0].shape if messages else ()
    return shape[0] if shape else 0


def encode(name: str, array: Array) -> pb.Tensor:
    """Return an array as a message."""
    return pb.Tensor(name=name, data_type=_BY_DTYPE[array.dtype], shape=array.shape, data=to_bytes(array))


def parts(number: int, name: str, joined: Joined) -> list[Part]:
    """Return a tensor as a field of a message, to be put together with the others."""
    head = pb.Tensor(name=name, data_type=_BY_DTYPE[joined.dtype], shape=joined.shape).SerializeToString()
    return field(number, [head, *field(pb.Tensor.DATA_FIELD_NUMBER, [joined])])
