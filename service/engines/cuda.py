"""The memory and the streams of a CUDA device.

Owns what is asked of CuPy, which is imported here and nowhere else, and only when a device is wanted. Must not know
what lies in a buffer, sessions or onnxruntime.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.provider import NotOnCuda
from service.states.device import Buffer, Stream

Array = NDArray[Any]

_TO_DEVICE, _TO_HOST, _THERE = 1, 2, 3
"""cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice (CUDA runtime API, cudaMemcpyKind)."""
_NO_MEMORY, _NOT_READY = 2, 600
"""cudaErrorMemoryAllocation, cudaErrorNotReady (CUDA runtime API, cudaError_t)."""
_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL (CUDA driver API, CUstreamCaptureMode)."""
_alongside = threading.local()


def work_alongside_captures(load: Callable[[str], Any] = ctypes.CDLL) -> None:
    """Have this thread's calls succeed, and spoil nothing, while another thread captures a graph.

    onnxruntime captures in mode Global, in which an allocation of any other thread fails and makes the captured graph
    invalid, but for threads that have said that captures of others are none of theirs (CUDA driver API,
    cuThreadExchangeStreamCaptureMode).

    Args:
        load: loads a library by its name.

    Raises:
        RuntimeError: if the driver refuses.
    """
    if getattr(_alongside, "said", False):
        return
    mode = ctypes.c_int(_THREAD_LOCAL)
    if status := load("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)):
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode gives {status}")
    _alongside.said = True


class CudaDevice:
    """A CUDA device, and streams of its own on it, which do not wait for the default one.

    Attributes:
        kind: ``cuda``.
        number: which, from 0.
        ahead: see ``Device``.
        runs: see ``Device``.
        behind: see ``Device``.

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
            self.enter()
            ahead, self._runs, behind = (CudaStream(cupy.cuda, self._device) for _ in range(3))
        except Exception as error:  # CuPy's errors share no base below RuntimeError
            raise NotOnCuda("a model", f"device {number} does not start: {error}") from error
        self.ahead: Stream = ahead
        self.runs: Stream = self._runs
        self.behind: Stream = behind

    def enter(self) -> None:
        """Have this thread work on it; see ``Device``."""
        _enter(self._device)

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Take memory; see ``Device``. It goes back to the device, not into a pool of CuPy's."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._taken(self._cuda.Memory, size, f"on CUDA device {self.number}")
        return Buffer(memory.ptr, tuple(shape), dtype, memory)

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Take pinned memory; see ``Device``. It goes back too: a pool of CuPy's rounds up, and keeps what it has."""
        memory = self._taken(self._cuda.PinnedMemory, size, "of pinned memory")
        return np.frombuffer(self._cuda.PinnedMemoryPointer(memory, 0), np.uint8, size)

    def end_capture(self) -> None:
        """End what may have been begun; see ``Device``."""
        self.enter()
        # It fails where there was nothing to end, or what was captured is not valid: either way there is nothing after.
        with contextlib.suppress(Exception):
            self._runs.end_capture()

    def memory(self) -> tuple[int, int]:
        """How many bytes are free, and how many there are."""
        self.enter()
        free, there = self._cuda.runtime.memGetInfo()
        return free, there

    def _taken(self, take: Callable[[int], Any], size: int, where: str) -> Any:
        """Take memory; a size of 0 has an address too."""
        self.enter()
        try:
            return take(max(1, size))
        except self._cuda.runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            raise MemoryError(f"out of memory: {size} bytes are wanted {where}") from error


class CudaStream:
    """A stream of a CUDA device.

    Attributes:
        address: its handle.

    Args:
        cuda: CuPy's module of that name.
        device: CuPy's device, which is the current one.
    """

    def __init__(self, cuda: Any, device: Any) -> None:
        self._cuda = cuda
        self._device = device
        self._stream = cuda.Stream(non_blocking=True)
        self._moment = cuda.Event(disable_timing=True)
        self.address: int | None = self._stream.ptr

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy; see ``Stream``."""
        array = np.ascontiguousarray(array)
        self._copy(buffer.pointer, array.ctypes.data, buffer.nbytes, _TO_DEVICE)

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy; see ``Stream``."""
        self._copy(array.ctypes.data, buffer.pointer, buffer.nbytes, _TO_HOST)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy; see ``Stream``."""
        self._copy(target.pointer, source.pointer, source.nbytes, _THERE)

    def follow(self, other: Stream) -> None:
        """Wait, on the device alone, for this moment of another stream; see ``Stream``."""
        assert isinstance(other, CudaStream)
        _enter(self._device)
        # Recorded anew it does not hold up who waits for it already (CUDA runtime API, cudaEventRecord).
        other._moment.record(other._stream)
        self._stream.wait_event(other._moment)

    def mark(self) -> Event:
        """Mark this moment; see ``Stream``."""
        _enter(self._device)
        event = self._cuda.Event(block=True, disable_timing=True)
        event.record(self._stream)
        return Event(event, self._cuda.runtime)

    def end_capture(self) -> None:
        """End a capture that has been begun; what was captured goes.

        Raises:
            Exception: if there was nothing to end, or what was captured is not valid.
        """
        self._stream.end_capture()

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        if size:
            _enter(self._device)
            self._cuda.runtime.memcpyAsync(to, source, size, kind, self._stream.ptr)


def _enter(device: Any) -> None:
    device.use()
    work_alongside_captures()


class Event:
    """An event in a stream; see ``Mark``."""

    def __init__(self, event: Any, runtime: Any) -> None:
        self._event = event
        self._runtime = runtime

    @property
    def done(self) -> bool:
        """Whether it has been reached, or the device has failed."""
        # CuPy's own ``done`` is false for ever once the device has failed, as though it worked still.
        return bool(self._runtime.eventQuery(self._event.ptr) != _NOT_READY)

    def wait(self) -> None:
        """Return once it has been reached. Some threads do nothing else with the device."""
        work_alongside_captures()
        # Others of this process run meanwhile: CuPy lets go of the interpreter's lock here.
        self._event.synchronize()
