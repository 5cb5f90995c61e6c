"""Chunks of as many steps for sessions of one model, laid side by side, and what the server gave for them.

Laid so, they are checked, written and read together, which is what makes many small ones cheap. Must not know channels
or sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from conveyor.errors import InvalidRequest, ProtocolError
from conveyor.model import Model
from conveyor.payload import Outputs, cast_chunks, decode_complete
from conveyor.tensors import Array, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb

_BLOCK_SESSIONS = 1024
"""Nor does a block have more chunks than this: it is answered only when all of them have ended."""

_CHUNK_BYTES = 64
"""More than a chunk in a message adds to its tensors and its session's id."""

_TENSOR_BYTES = 32
"""More than a tensor in a message adds to its name, its shape and its elements."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """The inputs of N chunks.

    Attributes:
        model: that is to run them.
        inputs: in the model's order and dtypes, each [N, T, ...].
        single_step: whether they came without a time axis, so that their outputs go without one.
    """

    model: Model
    inputs: tuple[Array, ...]
    single_step: bool

    @cached_property
    def steps(self) -> int:
        """T."""
        return int(self.inputs[0].shape[1])

    @cached_property
    def chunk_bytes(self) -> int:
        """The most that one of them takes in a message, beside its session's id."""
        total = _CHUNK_BYTES
        for spec, array in zip(self.model.inputs, self.inputs, strict=True):
            total += array.nbytes // len(array) + len(spec.name.encode()) + 10 * array.ndim + _TENSOR_BYTES
        return total

    @cached_property
    def output_bytes(self) -> int | None:
        """How large the outputs of one of them are; None where the model leaves that open."""
        total = 0
        for spec in self.model.outputs:
            sizes = [self.steps if axis == "time" else size for axis, size in zip(spec.axes, spec.shape, strict=True)]
            elements = 1
            for size in sizes[1:]:
                if size is None:
                    return None
                elements *= size
            total += elements * spec.dtype.itemsize
        return total

    def block_size(self, limit_bytes: int) -> int:
        """How many of them may go into one block, whose inputs and outputs take up to so many bytes in a message."""
        if self.output_bytes is None:
            return 1
        return min(_BLOCK_SESSIONS, max(1, limit_bytes // max(self.chunk_bytes, self.output_bytes + _CHUNK_BYTES)))

    def tensors(self, rows: Sequence[int]) -> list[pb.Tensor]:
        """Writes the inputs of some of them, each [N, T, ...]; of a single one [T, ...]."""
        first, end = rows[0], rows[-1] + 1
        index: int | slice | Sequence[int] = rows
        if len(rows) == 1:
            index = first
        elif rows == list(range(first, end)):
            index = slice(first, end)
        return [
            encode_tensor(spec.name, array[index]) for spec, array in zip(self.model.inputs, self.inputs, strict=True)
        ]


def lay_chunks(model: Model, chunks: Sequence[Sequence[Array]]) -> Chunks:
    """Lays chunks side by side, each [T, ...] or [...] for a single step; all of the same shapes and dtypes.

    Raises:
        InvalidRequest: these do not fit the model.
    """
    arrays, single_step = cast_chunks(model, [np.array(arrays) for arrays in zip(*chunks, strict=True)])
    return Chunks(model, tuple(arrays), single_step)


def copy_chunks(model: Model, inputs: Sequence[Array], count: int) -> Chunks:
    """Takes so many chunks that lie side by side already: [N, T, ...], or [N, ...] for single steps.

    Raises:
        InvalidRequest: there are more or fewer, or they do not fit the model.
    """
    for array in inputs:
        if array.ndim == 0 or len(array) != count:
            raise InvalidRequest(f"an input has shape {list(array.shape)}; expected {count} rows, one for each session")
    arrays, single_step = cast_chunks(model, map(np.array, inputs), "each row of ")
    return Chunks(model, tuple(arrays), single_step)


class Results:
    """What the server gave for a block, or for a chunk that went alone.

    Args:
        chunks: that it gave it for.
        steps: how many each of them had, as the server says.
        tensors: the outputs, each [N, T, ...], or [N, ...] for those of the last step.
        size: N; None for a chunk alone, whose outputs have no such axis.

    Attributes:
        steps: as above.
    """

    def __init__(self, chunks: Chunks, steps: int, tensors: Iterable[pb.Tensor], size: int | None = None) -> None:
        self.steps = steps
        self._chunks = chunks
        self._tensors = tensors
        self._size = size

    def row(self, row: int) -> Outputs:
        """The outputs of one chunk, each [T, ...], without the time axis if the chunk had none.

        Raises:
            ProtocolError: an output is missing, or its shape is not the one to expect.
        """
        outputs = self._outputs
        if isinstance(outputs, dict):
            return {name: array[row] for name, array in outputs.items()}
        return outputs[row]

    @cached_property
    def _outputs(self) -> Array | dict[str, Array]:
        arrays = decode_complete(self._chunks.model, self._tensors)
        specs = self._chunks.model.outputs
        for spec in specs:
            array = arrays[spec.name] if self._size is not None else arrays[spec.name][np.newaxis]
            expected = (self._size or 1, self.steps) if "time" in spec.axes else (self._size or 1,)
            if array.shape[: len(expected)] != expected:
                raise ProtocolError(
                    f"output {spec.name!r} of {expected[0]} chunks of {self.steps} steps came with shape {array.shape}"
                )
            arrays[spec.name] = array[:, 0] if self._chunks.single_step and "time" in spec.axes else array
        return arrays[specs[0].name] if len(specs) == 1 else arrays


def stack(rows: Sequence[Outputs]) -> Outputs:
    """Lays the outputs of chunks side by side, each [N, T, ...], in arrays of their own."""
    if isinstance(rows[0], dict):
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return np.array(rows)
