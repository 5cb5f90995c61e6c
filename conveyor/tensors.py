"""ndarray <-> Tensor: raw little-endian bytes with dtype and shape. Must not know models or sessions."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from conveyor.errors import InvalidRequest, ProtocolError
from conveyor.v1 import conveyor_pb2 as pb

Array: TypeAlias = NDArray[Any]

DTYPES: dict[pb.DataType, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT64: np.dtype("<f8"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_INT8: np.dtype("i1"),
    pb.DATA_TYPE_BOOL: np.dtype("?"),
}
"""The NumPy dtype of each element type, in the byte order of the wire."""

_DATA_TYPES = {dtype: data_type for data_type, dtype in DTYPES.items()}


def encode_tensor(name: str, array: Array) -> pb.Tensor:
    """Writes an array of any strides and byte order.

    Raises:
        InvalidRequest: the wire has no such element type.
    """
    dtype = array.dtype.newbyteorder("<")
    data_type = _DATA_TYPES.get(dtype)
    if data_type is None:
        known = ", ".join(each.name for each in DTYPES.values())
        raise InvalidRequest(f"tensor {name!r} has dtype {array.dtype}; expected one of {known}")
    return pb.Tensor(name=name, data_type=data_type, shape=array.shape, data=array.astype(dtype, copy=False).tobytes())


def decode_tensor(tensor: pb.Tensor) -> Array:
    """Reads a tensor without copying its elements; the array can be read but not written.

    Raises:
        ProtocolError: dtype, shape and byte count do not fit together.
    """
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        raise ProtocolError(f"tensor {tensor.name!r} came with element type {tensor.data_type}, which does not exist")
    shape = tuple(tensor.shape)
    data = tensor.data
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"tensor {tensor.name!r} came with {len(data)} bytes for {dtype.name} of shape {shape}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
