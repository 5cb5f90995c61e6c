"""The tensors of the Open Inference Protocol: its messages to what the codec reads, and arrays to messages.

Owns datatypes, raw and typed elements, and the tensors that hold one value a row: ids, flags, positions, lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np

from service.errors import InvalidRequest, Unsupported
from service.wire.assembly import Joined, Part, field
from service.wire.codec import MOST_AXES, MOST_TENSORS, Tensor, to_bytes
from service.wire.inference_stubs import inference_pb2 as pb

DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "float64": "FP64",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}
"""Of what models take, by NumPy's names."""

_BY_DTYPE = {np.dtype(name): datatype for name, datatype in DATATYPES.items()}
_NAMES = {datatype: name for name, datatype in DATATYPES.items()} | {
    "UINT64": "uint64",
    "UINT32": "uint32",
    "UINT16": "uint16",
    "UINT8": "uint8",
    "INT16": "int16",
    "BYTES": "bytes",
}
_CONTENTS = {
    "bool": "bool_contents",
    "int8": "int_contents",
    "int16": "int_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "uint8": "uint_contents",
    "uint16": "uint_contents",
    "uint32": "uint_contents",
    "uint64": "uint64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
    "bytes": "bytes_contents",
}
_AS_RAW = ("bool_contents", "fp32_contents", "fp64_contents")
"""Fields whose elements stand in the message as they do in raw contents."""
_LENGTH_BYTES = 4
"""Before each element of a BYTES tensor stands its length. Source: the protocol's binary tensor data extension."""


def check_counts(request: pb.ModelInferRequest) -> None:
    """Refuse a request of more tensors or parameters than any has.

    Raises:
        InvalidRequest: if it has.
    """
    for what in ("inputs", "outputs", "parameters"):
        if (count := len(getattr(request, what))) > MOST_TENSORS:
            raise InvalidRequest(f"there are {count} {what}; a request has up to {MOST_TENSORS}")


def tensor(request: pb.ModelInferRequest, index: int, control: bool = False) -> Tensor:
    """Return one of a request's inputs as the codec reads it.

    Args:
        request: the message; nothing of it is held by an input that is no control.
        index: of the input.
        control: whether it may hold texts, which no model takes.

    Raises:
        InvalidRequest: if its elements are not where they should be.
        Unsupported: if they are in shared memory.
    """
    message, raw = request.inputs[index], request.raw_input_contents
    refuse_shared_memory(message.parameters)
    dtype, shape = _NAMES.get(message.datatype, ""), tuple(message.shape[: MOST_AXES + 1])
    if dtype == "bytes" and not control:
        raise InvalidRequest(f"input {message.name[:64]!r} is BYTES; no model takes texts")
    if not raw:
        return Tensor(message.name, dtype, shape, _typed(message, dtype, shape))
    if len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; expected one an input"
        )
    if message.HasField("contents") and message.contents.ByteSize():
        raise InvalidRequest(
            f"input {message.name[:64]!r} has contents beside raw_input_contents; expected one or the other"
        )
    return Tensor(message.name, dtype, shape, raw[index])


def take_size(request: pb.ModelInferRequest) -> int:
    """Return about how many bytes a request has, and take its raw contents out: to tell, it would write them."""
    raw = sum(map(len, request.raw_input_contents))
    request.ClearField("raw_input_contents")
    return raw + request.ByteSize()


def refuse_shared_memory(parameters: Mapping[str, pb.InferParameter]) -> None:
    """Refuse tensors that are to be read from or written to shared memory.

    Raises:
        Unsupported: if one is.
    """
    if "shared_memory_region" in parameters:
        raise Unsupported("this server shares no memory with its clients; send tensors in the request")


def written(response: pb.ModelInferResponse, outputs: Mapping[str, Joined]) -> list[Part]:
    """Return a reply with its outputs, to be put together.

    Args:
        response: the reply as far as it goes; it gets what is told of the outputs.
        outputs: by name, in their order.
    """
    for name, output in outputs.items():
        response.outputs.add(name=name, datatype=_BY_DTYPE[output.dtype], shape=output.shape)
    parts: list[Part] = [response.SerializeToString()]
    for output in outputs.values():
        parts += field(pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER, [output])
    return parts


def integers(tensor: Tensor, most: int, dtypes: Collection[str] = ("int64", "int32")) -> list[int]:
    """Read one integer a row, from [N] or [N, 1].

    Raises:
        InvalidRequest: if it is something else.
    """
    _check_rows(tensor, most, dtypes)
    values: list[int] = tensor.array(f"input {tensor.name!r}").ravel().tolist()
    return values


def flags(tensor: Tensor, most: int) -> list[bool]:
    """Read one truth value a row, from [N] or [N, 1].

    Raises:
        InvalidRequest: if it is something else.
    """
    _check_rows(tensor, most, ("bool",))
    return [value != 0 for value in tensor.array(f"input {tensor.name!r}").ravel().view(np.uint8).tolist()]


def texts_or_integers(tensor: Tensor, most: int) -> list[str | int]:
    """Read one text or integer a row, from [N] or [N, 1].

    Raises:
        InvalidRequest: if it is something else.
    """
    _check_rows(tensor, most, ("int64", "uint64", "int32", "uint32", "bytes"))
    if tensor.dtype != "bytes":
        return [*integers(tensor, most, (tensor.dtype,))]
    texts: list[str | int] = []
    at, data = 0, tensor.data if isinstance(tensor.data, bytes) else tensor.data()
    while at < len(data) and len(texts) <= tensor.shape[0]:
        length = int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
        at += _LENGTH_BYTES + length
        if at > len(data):
            raise InvalidRequest(f"input {tensor.name!r} ends within an element; expected a length before each")
        try:
            texts.append(data[at - length : at].decode())
        except UnicodeDecodeError:
            raise InvalidRequest(f"input {tensor.name!r} holds an element that is not UTF-8") from None
    if len(texts) != tensor.shape[0]:
        raise InvalidRequest(f"input {tensor.name!r} does not hold the {tensor.shape[0]} elements that its shape says")
    return texts


def _check_rows(tensor: Tensor, most: int, dtypes: Collection[str]) -> None:
    if tensor.dtype not in dtypes:
        raise InvalidRequest(
            f"input {tensor.name!r} is {tensor.dtype or 'of no known dtype'}; expected {' or '.join(dtypes)}"
        )
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ((), (1,)) or tensor.shape[0] < 0:
        raise InvalidRequest(f"input {tensor.name!r} has shape {[*tensor.shape[:8]]}; expected [N], a value each row")
    if tensor.shape[0] > most:
        raise InvalidRequest(f"input {tensor.name!r} has {tensor.shape[0]} rows; this server takes up to {most}")


def _typed(
    message: pb.ModelInferRequest.InferInputTensor, dtype: str, shape: tuple[int, ...]
) -> bytes | Callable[[], bytes]:
    """Return elements that stand in the field of their type as the bytes that they would be in raw_input_contents.

    There may be millions, sent to no model at all: none of them becomes a Python object here.
    """
    name = message.name[:64]
    if not dtype and not message.contents.ByteSize():
        # Whoever reads it knows what the input should have been, and says so.
        return b""
    field = _CONTENTS.get(dtype)
    if field is None:
        raise InvalidRequest(f"input {name!r} is {message.datatype[:32]!r}, which has no typed contents; send it raw")
    if others := [other.name for other, _ in message.contents.ListFields() if other.name != field]:
        raise InvalidRequest(f"input {name!r} is {message.datatype} and holds {others[0]}; expected {field} alone")
    if (count := len(getattr(message.contents, field))) != (expected := math.prod(shape)):
        raise InvalidRequest(f"input {name!r} holds {count} elements in {field}; expected {expected} for its shape")
    if not count:
        return b""
    if dtype == "bytes":
        return partial(_bytes, message.contents)
    message.contents.DiscardUnknownFields()
    packed = message.contents.SerializeToString()
    if field in _AS_RAW:
        # Behind the field's number and length stand the elements. Source: Protocol Buffers, "Encoding".
        return packed[len(packed) - count * np.dtype(dtype).itemsize :]
    return partial(_integers, packed, field, dtype, name)


def _bytes(contents: pb.InferTensorContents) -> bytes:
    return b"".join(len(value).to_bytes(_LENGTH_BYTES, "little") + value for value in contents.bytes_contents)


def _integers(packed: bytes, field: str, dtype: str, name: str) -> bytes:
    values = getattr(pb.InferTensorContents.FromString(packed), field)
    wide = np.fromiter(values, {"int_contents": "int32", "uint_contents": "uint32"}.get(field, dtype), len(values))
    if wide.dtype.itemsize > np.dtype(dtype).itemsize:
        bounds = np.iinfo(dtype)
        if wide.min() < bounds.min or wide.max() > bounds.max:
            raise InvalidRequest(
                f"input {name!r} holds a value beyond {DATATYPES.get(dtype, dtype.upper())}; "
                f"expected {bounds.min} to {bounds.max}"
            )
    return to_bytes(wide.astype(dtype))
