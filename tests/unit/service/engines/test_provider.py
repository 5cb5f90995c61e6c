"""How a session is started: the options of CUDA, and what is said where it does not start."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from service.engines import provider
from service.engines.provider import CPU, CUDA, CudaOptions, NotOnCuda, start
from service.errors import LoadError
from tests.graphs import write_lstm


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        (CudaOptions(), {"device_id": "0", "arena_extend_strategy": "kNextPowerOfTwo", "use_tf32": "0"}),
        (
            CudaOptions(gpu_id=2, memory_limit_bytes=1 << 30, arena_extend="same", tf32=True),
            {
                "device_id": "2",
                "gpu_mem_limit": "1073741824",
                "arena_extend_strategy": "kSameAsRequested",
                "use_tf32": "1",
            },
        ),
    ],
)
def test_options_of_cuda(chosen: CudaOptions, options: dict[str, str]) -> None:
    """They are those of onnxruntime's CUDA execution provider, and TF32 is off unless asked for."""
    assert chosen.for_onnxruntime() == options


def test_the_cpu(tmp_path: Path) -> None:
    """A file and what it holds both start, with the threads that are asked for and entries of the configuration."""
    path = write_lstm(tmp_path)
    for model in (path, path.read_bytes()):
        session = start(model, "cpu", threads=2, config={"session.record_ep_graph_assignment_info": "1"})
        assert session.get_providers() == [CPU]
        assert session.get_session_options().intra_op_num_threads == 2
        assert {one.operator for one in provider.assignment(session)} == {"LSTM", "Squeeze", "MatMul", "Add"}


class Driver:
    """libcuda.so.1, as far as it is asked."""

    def __init__(self, status: int = 0, devices: int = 1, version: int = 13000) -> None:
        self._status = status
        self._devices = devices
        self._version = version

    def cuDriverGetVersion(self, version: Any) -> int:
        """Write for which CUDA it is."""
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = self._version
        return 0

    def cuInit(self, flags: int) -> int:
        """Start the driver."""
        return self._status

    def cuDeviceGet(self, device: Any, number: int) -> int:
        """Find a device."""
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = number
        return 0 if number < self._devices else 101

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        """Write what a device calls itself."""
        name.value = f"GPU number {device.value}".encode()[: size - 1]
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        """Write how many devices there are."""
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self._devices
        return 0


def test_no_driver() -> None:
    """Told with what to do, on a machine and in a container."""

    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    reason = provider._why_no_device(0, load)
    assert reason is not None
    assert reason.startswith("no NVIDIA driver (libcuda.so.1: cannot open shared object file")
    assert "--gpus all" in reason


@pytest.mark.parametrize(
    ("driver", "gpu_id", "says"),
    [
        (Driver(version=12080), 0, "the NVIDIA driver is for CUDA 12.8; the libraries want one for CUDA 13"),
        (Driver(status=100), 0, "there is no CUDA device (cuInit gives 100)"),
        (Driver(status=803), 0, "the NVIDIA driver does not start (cuInit gives 803)"),
        (Driver(devices=0), 0, "there is no CUDA device 0"),
        (Driver(devices=2), 2, "there is no CUDA device 2 (--gpu-id); there are 2, counted from 0"),
        (Driver(devices=2), 1, None),
    ],
)
def test_no_device(driver: Driver, gpu_id: int, says: str | None) -> None:
    """The driver's own word, and which device was meant."""
    reason = provider._why_no_device(gpu_id, lambda name: driver)
    assert reason is None if says is None else str(reason).startswith(says)


def test_the_name_of_a_device() -> None:
    """As the driver says it; none where there is no such device, or no driver."""
    assert provider.gpu_name(1, lambda name: Driver(devices=2)) == "GPU number 1"
    assert provider.gpu_name(2, lambda name: Driver(devices=2)) == ""
    assert provider.gpu_name(0, lambda name: Driver(status=100)) == ""
    assert provider.gpu_name(0, lambda name: ctypes.CDLL("libthere-is-none.so")) == ""


def test_libraries_that_do_not_load(capsys: pytest.CaptureFixture[str]) -> None:
    """What onnxruntime prints of them is a part of the reason and printed nowhere; of cuDNN it is silent."""

    def preload() -> None:
        print("Failed to load libcublas.so.13: no such file")
        print("Failed to load libcurand.so.10: libcurand.so.10: not found")
        print("Please follow a link to install CUDA.")

    def load(name: str) -> Any:
        raise OSError("no such file either")

    assert provider._why_no_libraries(preload, load) == (
        "CUDA's libraries do not load: libcublas.so.13: no such file; libcurand.so.10: not found; "
        f"libcudnn.so.9: no such file either: {provider._INSTALL}"
    )
    assert capsys.readouterr().out == ""
    assert provider._why_no_libraries(lambda: None, lambda name: None) is None


def test_what_is_not_installed() -> None:
    """A build for the CPU, and CuPy, with one remedy, which has all of it."""
    for reason in (provider._why_no_build([CPU]), provider._why_no_cupy("there_is_no_such_package")):
        assert str(reason).endswith(
            "run sh scripts/gpu.sh in the checkout, or install the extra gpu in an environment of its own"
        )
    assert provider._why_no_build([CUDA, CPU]) is None
    assert provider._why_no_cupy("numpy") is None


def test_the_machine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no driver nobody is sent to install anything else."""
    monkeypatch.setattr(provider, "_why_no_device", lambda gpu_id, load: "no NVIDIA driver")
    assert provider.why_no_cuda.__wrapped__() == "no NVIDIA driver"
    monkeypatch.setattr(provider, "_why_no_device", lambda gpu_id, load: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert "is built without CUDA" in str(provider.why_no_cuda.__wrapped__())


@pytest.mark.parametrize(
    ("reason", "first"),
    [
        ("no NVIDIA driver (libcuda.so.1: cannot open): a machine needs one", "no NVIDIA driver"),
        ("the NVIDIA driver is for CUDA 12.8; the libraries want", "the NVIDIA driver is for CUDA 12.8"),
        ("there is no CUDA device 3 (--gpu-id); there are 1", "there is no CUDA device 3"),
        ("onnxruntime 1.31.1 is built without CUDA: run", "onnxruntime 1.31.1 is built without CUDA"),
    ],
)
def test_headline(reason: str, first: str) -> None:
    """Says what is missing, and leaves out the rest."""
    assert provider.headline(reason) == first


@pytest.mark.skipif(provider.why_no_cuda() is None, reason="CUDA starts here")
def test_no_cuda(tmp_path: Path) -> None:
    """Refused before anything is read, with the reason."""
    with pytest.raises(NotOnCuda, match=r"does not run model\.onnx: ") as refused:
        start(write_lstm(tmp_path), "cuda", threads=1)
    assert isinstance(refused.value, LoadError)
    assert refused.value.reason == provider.why_no_cuda()
