"""This machine's memory as a device: copies, parts of buffers, and errors that mean that memory has run out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from service.engines.cuda import CudaDevice, Event
from service.engines.provider import NotOnCuda
from service.states.device import HostDevice, out_of_memory


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "bool"])
def test_what_goes_up_comes_down(dtype: str) -> None:
    """The same bits, whole and row by row, from memory for copying and from any other."""
    device = HostDevice()
    values = np.random.default_rng(0).integers(0, 2, (5, 3)).astype(dtype)
    buffer = device.empty(values.shape, dtype)
    assert buffer.nbytes == values.nbytes
    device.upload(values, buffer)
    down = device.staging(values.nbytes).view(dtype).reshape(values.shape)
    device.download(buffer, down)
    device.mark().wait()
    assert down.tobytes() == values.tobytes()
    device.upload(values[4], buffer.row(1))
    row = np.empty(3, dtype)
    device.download(buffer.row(1), row)
    assert row.tobytes() == values[4].tobytes()
    device.download(buffer.row(2), row)
    assert row.tobytes() == values[2].tobytes()


def test_an_array_that_does_not_lie_together() -> None:
    """It goes up as it reads, row by row."""
    device = HostDevice()
    buffer = device.empty((2, 3), "float32")
    turned = np.arange(6, dtype=np.float32).reshape(3, 2).T
    device.upload(turned, buffer)
    down = np.empty((2, 3), np.float32)
    device.download(buffer, down)
    assert down.tolist() == turned.tolist()


def test_a_part_begins_at_a_byte() -> None:
    """With a shape and a dtype of its own."""
    device = HostDevice()
    buffer = device.empty((16,), "uint8")
    device.upload(np.array([7, 9], np.int32), buffer.part(8, (2,), "int32"))
    down = np.empty(16, np.uint8)
    device.download(buffer, down)
    assert down.view(np.int32).tolist() == [0, 0, 7, 9]


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
    """cudaErrorNotReady alone (600) says that there is something to wait for."""
    event = Event(SimpleNamespace(ptr=7), SimpleNamespace(eventQuery={7: status}.get))
    assert event.done is done


def test_a_cuda_device_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said, and what brings it."""
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(NotOnCuda, match=r"CuPy.*does not load.*the extra gpu"):
        CudaDevice()
