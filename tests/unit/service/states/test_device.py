"""This machine's memory as a device: copies, parts of buffers, and errors that mean that memory has run out."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, MagicMock

import numpy as np
import pytest

from service.engines.cuda import CudaDevice, CudaStream, Event, work_alongside_captures
from service.engines.provider import NotOnCuda
from service.states.device import Buffer, HostDevice, HostStream, all_done, out_of_memory
from tests.disorder import Disorder


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "bool"])
def test_what_goes_up_comes_down(dtype: str) -> None:
    """The same bits, whole and row by row, from memory for copying and from any other."""
    device, stream = HostDevice(), HostStream()
    values = np.random.default_rng(0).integers(0, 2, (5, 3)).astype(dtype)
    buffer = device.empty(values.shape, dtype)
    assert buffer.nbytes == values.nbytes
    stream.upload(values, buffer)
    down = device.staging(values.nbytes).view(dtype).reshape(values.shape)
    stream.download(buffer, down)
    stream.mark().wait()
    assert down.tobytes() == values.tobytes()
    stream.upload(values[4], buffer.row(1))
    row = np.empty(3, dtype)
    stream.download(buffer.row(1), row)
    assert row.tobytes() == values[4].tobytes()
    stream.download(buffer.row(2), row)
    assert row.tobytes() == values[2].tobytes()


def test_an_array_that_does_not_lie_together() -> None:
    """It goes up as it reads, row by row."""
    device, stream = HostDevice(), HostStream()
    buffer = device.empty((2, 3), "float32")
    turned = np.arange(6, dtype=np.float32).reshape(3, 2).T
    stream.upload(turned, buffer)
    down = np.empty((2, 3), np.float32)
    stream.download(buffer, down)
    assert down.tolist() == turned.tolist()


def test_a_part_begins_at_a_byte() -> None:
    """With a shape and a dtype of its own."""
    device, stream = HostDevice(), HostStream()
    buffer = device.empty((16,), "uint8")
    stream.upload(np.array([7, 9], np.int32), buffer.part(8, (2,), "int32"))
    down = np.empty(16, np.uint8)
    stream.download(buffer, down)
    assert down.view(np.int32).tolist() == [0, 0, 7, 9]


@pytest.mark.parametrize("held", range(3))
def test_when_all_is_done(held: int) -> None:
    """Not before each stream has done what it had been asked for."""
    device = Disorder(lazy=True)
    for queue in device.queues:
        queue.ask("something", lambda: None)
    device.let(device.queues[held], 0)
    mark = all_done(device)
    device.work(lambda: not any(queue.ready for queue in device.queues))
    assert not mark.done
    device.let(device.queues[held], None)
    mark.wait()
    assert device.idle


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:359 Available memory of 0 is smaller", True),
        ("Non-zero status code: Failed to allocate memory for requested buffer of size 1073741824", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cublas: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("Invalid dimensions", False),
        ("", False),
    ],
)
def test_which_errors_mean_that_memory_has_run_out(text: str, means: bool) -> None:
    """Told from what onnxruntime, CUDA and its libraries say."""
    assert out_of_memory(RuntimeError(text)) is means


@pytest.mark.parametrize(("status", "done"), [(0, True), (600, False), (700, True)])
def test_an_event_of_a_device_that_has_failed_is_over(status: int, done: bool) -> None:
    """Of what CUDA says, cudaErrorNotReady alone (600) means that there is something to wait for."""
    event = Event(SimpleNamespace(ptr=7), SimpleNamespace(eventQuery={7: status}.get))
    assert event.done is done


@pytest.mark.parametrize("status", [0, 3])
def test_a_thread_says_once_that_captures_of_others_are_none_of_its_own(status: int) -> None:
    """CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, by the driver; what that refuses is raised, and said anew."""
    said: list[int] = []

    def exchange(mode: Any) -> int:
        said.append(mode._obj.value)
        return status

    def load(name: str) -> SimpleNamespace:
        assert name == "libcuda.so.1"
        return SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)

    def work() -> None:
        for _ in range(2):
            with nullcontext() if status == 0 else pytest.raises(RuntimeError, match="Mode gives 3"):
                work_alongside_captures(load)
        ended.append(True)

    ended: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
    assert said == ([1] if status == 0 else [1, 1])


class OutOfMemory(RuntimeError):
    """As CuPy says that an allocation failed."""

    status = 2


def test_memory_that_cuda_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """There or pinned here, it is a MemoryError that says how much; of pinned memory no more is taken than that."""
    asked: list[int] = []

    def take(size: int) -> None:
        asked.append(size)
        raise OutOfMemory

    cuda = MagicMock(Memory=take, PinnedMemory=take)
    cuda.runtime.CUDARuntimeError = OutOfMemory
    monkeypatch.setitem(sys.modules, "cupy", MagicMock(cuda=cuda))
    monkeypatch.setattr("service.engines.cuda.work_alongside_captures", lambda: None)
    device = CudaDevice()
    with pytest.raises(MemoryError, match="12 bytes are wanted on CUDA device 0"):
        device.empty((3,), "float32")
    with pytest.raises(MemoryError, match="1025 bytes are wanted of pinned memory"):
        device.staging(1025)
    assert asked == [12, 1025]


def test_streams_of_cuda_wait_for_each_other_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy goes into its own stream; one follows another by an event, and nothing here waits."""
    cuda = MagicMock(Stream=lambda non_blocking: MagicMock(ptr=object()), Event=lambda disable_timing: MagicMock())
    monkeypatch.setitem(sys.modules, "cupy", MagicMock(cuda=cuda))
    monkeypatch.setattr("service.engines.cuda.work_alongside_captures", lambda: None)
    device = CudaDevice()
    ahead, runs, _ = streams = device.ahead, device.runs, device.behind
    assert len({stream.address for stream in streams}) == 3
    for stream in streams:
        stream.upload(np.zeros(3, np.float32), Buffer(7, (3,), "float32", None))
        cuda.runtime.memcpyAsync.assert_called_with(7, ANY, 12, 1, stream.address)
    assert isinstance(runs, CudaStream)
    assert isinstance(ahead, CudaStream)
    runs.follow(ahead)
    ahead._moment.record.assert_called_once_with(ahead._stream)
    runs._stream.wait_event.assert_called_once_with(ahead._moment)
    ahead._moment.synchronize.assert_not_called()


def test_a_cuda_device_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said, and what brings it."""
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(NotOnCuda, match=r"CuPy.*does not load.*the extra gpu"):
        CudaDevice()
