"""The memory and the stream of a CUDA device.

Owns what is asked of CuPy, which is imported here and nowhere else, and only when a device is wanted. Must not know
what lies in a buffer, sessions or onnxruntime.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.provider import NotOnCuda
from service.states.device import Buffer

Array = NDArray[Any]

_TO_DEVICE, _TO_HOST, _THERE = 1, 2, 3
"""cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice (CUDA runtime API, cudaMemcpyKind)."""
_NO_MEMORY, _NOT_READY = 2, 600
"""cudaErrorMemoryAllocation, cudaErrorNotReady (CUDA runtime API, cudaError_t)."""


class CudaDevice:
    """A CUDA device, and a stream of its own on it.

    Attributes:
        kind: ``cuda``.
        number: which, from 0.
        stream: address of its stream, which does not wait for the default one.

    Raises:
        NotOnCuda: if CuPy is missing, or the device does not start.
    """

    def __init__(self, number: int = 0) -> None:
        try:
            import cupy
        except (ImportError, OSError) as error:
            raise NotOnCuda(
                "a model",
                f"CuPy, which keeps the states on the device, does not load ({error}): the extra gpu has it, and it "
                "wants a folder that it may write to (CUPY_CACHE_DIR)",
            ) from error
        self.kind = "cuda"
        self.number = number
        self._cuda = cupy.cuda
        # Which device is current is a thread's own, and any thread may come here: each call says it anew.
        self._device = cupy.cuda.Device(number)
        try:
            self._device.use()
            self._stream = cupy.cuda.Stream(non_blocking=True)
        except Exception as error:  # CuPy's errors share no base below RuntimeError
            raise NotOnCuda("a model", f"device {number} does not start: {error}") from error
        self.stream: int | None = self._stream.ptr

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Take memory; see ``Device``. It goes back to the device, not into a pool of CuPy's."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            self._device.use()
            memory = self._cuda.Memory(max(1, size))
        except self._cuda.runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            raise MemoryError(f"out of memory: {size} bytes are wanted on CUDA device {self.number}") from error
        return Buffer(memory.ptr, tuple(shape), dtype, memory)

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Take pinned memory; see ``Device``."""
        self._device.use()
        memory = self._cuda.alloc_pinned_memory(max(1, size))
        return np.frombuffer(memory, np.uint8, size)

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy; see ``Device``."""
        array = np.ascontiguousarray(array)
        self._copy(buffer.pointer, array.ctypes.data, buffer.nbytes, _TO_DEVICE)

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy; see ``Device``."""
        self._copy(array.ctypes.data, buffer.pointer, buffer.nbytes, _TO_HOST)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy; see ``Device``."""
        self._copy(target.pointer, source.pointer, source.nbytes, _THERE)

    def end_capture(self) -> None:
        """End what may have been begun; see ``Device``."""
        self._device.use()
        # It fails where there was nothing to end, or what was captured is not valid: either way there is nothing after.
        with contextlib.suppress(Exception):
            self._stream.end_capture()

    def mark(self) -> Event:
        """Mark this moment of its stream."""
        self._device.use()
        event = self._cuda.Event(block=True, disable_timing=True)
        event.record(self._stream)
        return Event(event, self._cuda.runtime)

    def memory(self) -> tuple[int, int]:
        """How many bytes are free, and how many there are."""
        self._device.use()
        free, there = self._cuda.runtime.memGetInfo()
        return free, there

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        if size:
            self._device.use()
            self._cuda.runtime.memcpyAsync(to, source, size, kind, self._stream.ptr)


class Event:
    """An event in a stream."""

    def __init__(self, event: Any, runtime: Any) -> None:
        self._event = event
        self._runtime = runtime

    @property
    def done(self) -> bool:
        # CuPy's own ``done`` is false for ever once the device has failed, as though it worked still.
        return bool(self._runtime.eventQuery(self._event.ptr) != _NOT_READY)

    def wait(self) -> None:
        # Others of this process run meanwhile: CuPy lets go of the interpreter's lock here.
        self._event.synchronize()
