"""The memory in which a model's states live, and the way there and back: a device, as the engine sees it.

Owns the protocol, and the device that is this machine's own memory, which goes the same ways as any other. Must not
know what lies in a buffer, sessions or onnxruntime.

What is asked of a stream happens in the order in which it was asked for, and may go on after the call has returned.
Between the streams of a device there is no order but where one is told to follow another. ``mark`` says when what was
asked for before it has been done.
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
    """A moment in a stream."""

    @property
    def done(self) -> bool:
        """Whether it has been reached. Where the device has failed it may never be: ``wait`` says so."""

    def wait(self) -> None:
        """Return once it has been reached. Others may run meanwhile.

        Raises:
            Exception: if the device failed before.
        """


class Stream(Protocol):
    """What a device does one after the other, beside what it does in other streams.

    Attributes:
        address: for onnxruntime to work in it too; None where it has none.
    """

    address: int | None

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy an array of the buffer's size there. What lies in ``staging`` must stay as it is until a mark."""

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy a buffer here. The array may be read after a mark."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a buffer to another of its size, both there."""

    def follow(self, other: Stream) -> None:
        """Do what is asked for from now on after what another stream of the device has been asked for until now."""

    def mark(self) -> Mark:
        """Mark this moment."""


class Device(Protocol):
    """Memory that a model's runs read and write.

    Attributes:
        kind: as onnxruntime calls it: ``cpu`` or ``cuda``.
        number: which of its kind.
        ahead: the stream of what waits for no run: what goes up for the next one, and states that come and go.
        runs: that of the runs.
        behind: that of what comes down after them.
    """

    kind: str
    number: int
    ahead: Stream
    runs: Stream
    behind: Stream

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

    def end_capture(self) -> None:
        """Have its runs go on after something failed while one was being captured."""

    def memory(self) -> tuple[int, int]:
        """How many bytes are free, and how many there are."""


def all_done(device: Device) -> Mark:
    """Mark the moment when all is done that a device has been asked for until now."""
    device.runs.follow(device.ahead)
    device.behind.follow(device.runs)
    return device.behind.mark()


class _Now:
    """A mark in a stream that is never behind."""

    done = True

    def wait(self) -> None:
        pass


class HostStream:
    """A stream of this machine's memory: every copy is made at once.

    Attributes:
        address: None.
    """

    address: int | None = None

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy; see ``Stream``."""
        _bytes_of(buffer)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy; see ``Stream``."""
        array.reshape(-1).view(np.uint8)[:] = _bytes_of(buffer)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy; see ``Stream``."""
        _bytes_of(target)[:] = _bytes_of(source)

    def follow(self, other: Stream) -> None:
        """Everything has been done already."""

    def mark(self) -> Mark:
        """Everything has been done already."""
        return _Now()


class HostDevice:
    """This machine's memory as a device.

    Attributes:
        kind: ``cpu``.
        number: 0.
        ahead: a stream that is never behind; it is that of everything.
        runs: the same.
        behind: the same.
    """

    def __init__(self) -> None:
        self.kind = "cpu"
        self.number = 0
        stream: Stream = HostStream()
        self.ahead = self.runs = self.behind = stream

    def enter(self) -> None:
        """There is nothing to do."""

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Take memory; see ``Device``."""
        memory = Reserved(max(1, math.prod(shape) * np.dtype(dtype).itemsize))
        return Buffer(memory.bytes.ctypes.data, tuple(shape), dtype, memory)

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Take memory; see ``Device``."""
        return Reserved(max(1, size)).bytes

    def end_capture(self) -> None:
        """Nothing is ever captured here."""

    def memory(self) -> tuple[int, int]:
        """Address space: nobody counts it here."""
        return 1 << 62, 1 << 62


def _bytes_of(buffer: Buffer) -> NDArray[np.uint8]:
    memory = buffer.memory
    assert isinstance(memory, Reserved)
    start = buffer.pointer - memory.bytes.ctypes.data
    return memory.bytes[start : start + buffer.nbytes]
