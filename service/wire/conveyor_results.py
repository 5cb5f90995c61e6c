"""The results of chunks and blocks in conveyor.v1, written by hand: the stubs take several times as long for each.

Owns how a result stands in a ``StreamResponse``. Must not know sessions or streams. Source: proto/conveyor/v1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from conveyor.v1 import conveyor_pb2 as pb
from service.errors import Full
from service.manifest import TensorSpec
from service.session import Reply
from service.wire.assembly import Written, varint
from service.wire.codec import Array, little_endian, to_bytes
from service.wire.conveyor_tensors import DATA_TYPES
from service.wire.status import detail

Bytes: TypeAlias = bytes | memoryview

_VARINT, _BYTES = 0, 2


def _tag(field: int, kind: int) -> bytes:
    return varint(field << 3 | kind)


_RESULTS = _tag(pb.StreamResponse.RESULTS_FIELD_NUMBER, _BYTES)
_BLOCK_RESULTS = _tag(pb.StreamResponse.BLOCK_RESULTS_FIELD_NUMBER, _BYTES)
_SESSION_ID = _tag(pb.ChunkResult.SESSION_ID_FIELD_NUMBER, _BYTES)
_POSITION = _tag(pb.ChunkResult.POSITION_FIELD_NUMBER, _VARINT)
_STEPS = _tag(pb.ChunkResult.STEPS_FIELD_NUMBER, _VARINT)
_ERROR = _tag(pb.ChunkResult.ERROR_FIELD_NUMBER, _BYTES)
_OUTPUTS = _tag(pb.ChunkResult.OUTPUTS_FIELD_NUMBER, _BYTES)
_BLOCK_OUTPUTS = _tag(pb.BlockResult.OUTPUTS_FIELD_NUMBER, _BYTES)
_DATA = _tag(pb.Tensor.DATA_FIELD_NUMBER, _BYTES)


def of_chunk(session_id: str, specs: Sequence[TensorSpec], reply: Reply) -> Written:
    """Write what a chunk that was applied is answered."""
    identity = session_id.encode()
    parts: list[Bytes] = [_SESSION_ID, varint(len(identity)), identity, _POSITION, varint(reply.position)]
    parts += (_STEPS, varint(reply.steps))
    for spec, output in zip(specs, reply.outputs, strict=True):
        parts += _tensor(_OUTPUTS, spec, output.shape, to_bytes(output))
    return _field(_RESULTS, parts)


def of_refused_chunk(session_id: str, position: int, error: Exception) -> Written:
    """Write what a chunk that was not applied is answered."""
    if type(error) is Full and position >= 0:
        # Over capacity nearly all are, and in the same words.
        identity, told = session_id.encode(), _full(str(error))
        parts = [_SESSION_ID, varint(len(identity)), identity, _POSITION, varint(position)]
        return _field(_RESULTS, [*parts, _ERROR, varint(len(told)), told])
    result = pb.ChunkResult(session_id=session_id, position=position, error=detail(error))
    return _field(_RESULTS, [result.SerializeToString()])


def of_block(tag: int, steps: int, specs: Sequence[TensorSpec], results: Sequence[Reply | Exception]) -> Written:
    """Write what a block is answered, of each chunk its reply or why it was not applied."""
    head = pb.BlockResult(tag=tag, steps=steps)
    failed = [(n, result) for n, result in enumerate(results) if isinstance(result, Exception)]
    for n, error in failed:
        head.errors.add(index=n, error=detail(error))
    parts: list[Bytes] = []
    if len(failed) < len(results):
        for index, spec in enumerate(specs):
            rows = _rows(results, index, zeros=bool(failed))
            parts += _tensor(_BLOCK_OUTPUTS, spec, (len(rows), *rows[0].shape), _join(spec, rows))
    return _field(_BLOCK_RESULTS, [head.SerializeToString(), *parts])


def of_whole_block(tag: int, steps: int, specs: Sequence[TensorSpec], outputs: Sequence[Array]) -> Written:
    """Write what a block is answered all of which was applied, from its outputs side by side, [N, ...] each."""
    parts: list[Bytes] = [pb.BlockResult(tag=tag, steps=steps).SerializeToString()]
    for spec, output in zip(specs, outputs, strict=True):
        little = np.ascontiguousarray(output, little_endian(spec.dtype))
        # Copied once, to where it stands in what is sent.
        parts += _tensor(_BLOCK_OUTPUTS, spec, output.shape, little.reshape(-1).view(np.uint8).data)
    return _field(_BLOCK_RESULTS, parts)


def of_refused_block(tag: int, error: Exception) -> Written:
    """Write what a block is answered that was refused as a whole."""
    return _field(_BLOCK_RESULTS, [pb.BlockResult(tag=tag, error=detail(error)).SerializeToString()])


def _rows(results: Sequence[Reply | Exception], index: int, zeros: bool) -> list[Array]:
    """One output of a block's chunks, which are of one shape, with zeros where one was not applied."""
    if not zeros:
        return [reply.outputs[index] for reply in results]  # type: ignore[union-attr]
    rows = [None if isinstance(one, Exception) else one.outputs[index] for one in results]
    nothing = np.zeros_like(next(row for row in rows if row is not None))
    return [nothing if row is None else row for row in rows]


def _join(spec: TensorSpec, rows: Sequence[Array]) -> bytes:
    if little_endian(spec.dtype).isnative:
        # Arrays are bytes to whoever asks for them, and are copied once.
        return b"".join(rows)  # type: ignore[arg-type]
    return b"".join([to_bytes(row) for row in rows])


def _tensor(field: bytes, spec: TensorSpec, shape: tuple[int, ...], data: Bytes) -> list[Bytes]:
    head, size = _head(spec.name, spec.dtype, shape), varint(len(data))
    return [field, varint(len(head) + len(_DATA) + len(size) + len(data)), head, _DATA, size, data]


@functools.lru_cache(1024)
def _head(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return pb.Tensor(name=name, data_type=DATA_TYPES[dtype], shape=shape).SerializeToString()


@functools.lru_cache(64)
def _full(message: str) -> bytes:
    return detail(Full(message)).SerializeToString()


def _field(field: bytes, parts: Sequence[Bytes]) -> Written:
    return Written(b"".join((field, varint(sum(map(len, parts))), *parts)))
