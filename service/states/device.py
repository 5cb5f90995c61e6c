"""The memory in which a model's states live, and the way there and back: a device, as the engine sees it.

Owns the protocol, and the device that is this machine's own memory, which goes the same ways as any other. Must not
know what lies in a buffer, sessions or onnxruntime.

Everything that is asked of a device happens in the order in which it was asked for, in one stream; it may go on after
the call has returned. ``mark`` says when what was asked for before it has been done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.states.memory import Reserved

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of a device's memory.

    Attributes:
        pointer: its address there.
        shape: of what it holds, row-major.
        dtype: of what it holds.
        memory: what keeps it.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    memory: object

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def row(self, index: int) -> Buffer:
        """The part at an index of the first axis."""
        size = self.nbytes // self.shape[0]
        return Buffer(self.pointer + index * size, self.shape[1:], self.dtype, self.memory)

    def part(self, start: int, shape: Sequence[int], dtype: str) -> Buffer:
        """Something that lies in it, from a byte on."""
        return Buffer(self.pointer + start, tuple(shape), dtype, self.memory)


_NO_MEMORY = (
    "failed to allocate memory",
    "is smaller than requested bytes",  # of a limit
    "out of memory",
    "alloc_failed",
    "bfc_arena",
)
"""In the texts of onnxruntime, CUDA, cuDNN, cuBLAS and CuPy."""


def out_of_memory(error: Exception) -> bool:
    """Whether a run failed because there was no memory for it, told from what is said: they share no kind of error."""
    text = str(error).lower()
    return any(sign in text for sign in _NO_MEMORY)


class Mark(Protocol):
    """A moment in a device's stream."""

    @property
    def done(self) -> bool:
        """Whether it has been reached. Where the device has failed it may never be: ``wait`` says so."""

    def wait(self) -> None:
        """Return once it has been reached. Others may run meanwhile.

        Raises:
            Exception: if the device failed before.
        """


class Device(Protocol):
    """Memory that a model's runs read and write.

    Attributes:
        kind: as onnxruntime calls it: ``cpu`` or ``cuda``.
        number: which of its kind.
        stream: address of the stream in which it works, for onnxruntime to work in too; None where it has none.
    """

    kind: str
    number: int
    stream: int | None

    def enter(self) -> None:
        """Have this thread work on it; every other call does that too. For threads in which others use it directly."""

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Take memory there. It goes back when nobody holds the buffer any more.

        Raises:
            MemoryError: if there is not enough.
        """

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Take memory here from which, and to which, copying is quick.

        Raises:
            MemoryError: if there is not enough.
        """

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy an array of the buffer's size there. What lies in ``staging`` must stay as it is until a mark."""

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy a buffer here. The array may be read after a mark."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer to another of its size, both there."""

    def end_capture(self) -> None:
        """Have its stream work again after something failed while it was being captured."""

    def mark(self) -> Mark:
        """Mark this moment."""

    def memory(self) -> tuple[int, int]:
        """How many bytes are free, and how many there are."""


class _Now:
    """A mark in a stream that is never behind."""

    done = True

    def wait(self) -> None:
        pass


class HostDevice:
    """This machine's memory as a device: every copy is made at once.

    Attributes:
        kind: ``cpu``.
        number: 0.
        stream: None.
    """

    def __init__(self) -> None:
        self.kind = "cpu"
        self.number = 0
        self.stream: int | None = None

    def enter(self) -> None:
        """There is nothing to do."""

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Take memory; see ``Device``."""
        memory = Reserved(max(1, math.prod(shape) * np.dtype(dtype).itemsize))
        return Buffer(memory.bytes.ctypes.data, tuple(shape), dtype, memory)

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Take memory; see ``Device``."""
        return Reserved(max(1, size)).bytes

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy; see ``Device``."""
        _bytes_of(buffer)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy; see ``Device``."""
        array.reshape(-1).view(np.uint8)[:] = _bytes_of(buffer)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy; see ``Device``."""
        _bytes_of(target)[:] = _bytes_of(source)

    def end_capture(self) -> None:
        """Nothing is ever captured here."""

    def mark(self) -> Mark:
        """Everything has been done already."""
        return _Now()

    def memory(self) -> tuple[int, int]:
        """Address space: nobody counts it here."""
        return 1 << 62, 1 << 62


def _bytes_of(buffer: Buffer) -> NDArray[np.uint8]:
    memory = buffer.memory
    assert isinstance(memory, Reserved)
    start = buffer.pointer - memory.bytes.ctypes.data
    return memory.bytes[start : start + buffer.nbytes]
