"""The tensors of conveyor.v1: its messages to what the codec reads, and arrays to messages."""

from __future__ import annotations

from collections.abc import Iterable

from conveyor.v1 import conveyor_pb2 as pb
from service.wire.codec import Array, Tensor, to_bytes

DATA_TYPES: dict[str, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "float64": pb.DATA_TYPE_FLOAT64,
    "int64": pb.DATA_TYPE_INT64,
    "int32": pb.DATA_TYPE_INT32,
    "int8": pb.DATA_TYPE_INT8,
    "bool": pb.DATA_TYPE_BOOL,
}
_NAMES = {value: name for name, value in DATA_TYPES.items()}


def decode(messages: Iterable[pb.Tensor]) -> list[Tensor]:
    """Return messages as the codec reads them."""
    return [
        Tensor(message.name, _NAMES.get(message.data_type, ""), tuple(message.shape), message.data)
        for message in messages
    ]


def encode(name: str, array: Array) -> pb.Tensor:
    """Return an array as a message."""
    return pb.Tensor(name=name, data_type=DATA_TYPES[array.dtype.name], shape=array.shape, data=to_bytes(array))
