"""How an onnxruntime session is started on a device: with which options, and why not where it is not.

Owns the execution providers, their options and libraries. Must not know what the graph is served as, sessions or grpc.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import onnxruntime

from service.errors import LoadError
from service.graphs.placement import Device
from service.graphs.recurrent_path import Assigned, RecurrentPath, told

VERSION: str = onnxruntime.__version__
"""Of onnxruntime: another one may be faster or slower."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_NOTHING: Mapping[str, str] = MappingProxyType({})
_RECORD = "session.record_ep_graph_assignment_info"
_DRIVER = "libcuda.so.1"
_CUDNN = "libcudnn.so.9"
_INSTALL = "run sh scripts/gpu.sh in the checkout, or install the extra gpu in an environment of its own"
_FAILED = "Failed to load "
_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE (CUDA driver API)."""
_LEAST_DRIVER = 13000
"""1000 times the major version of CUDA and 10 times the minor (CUDA driver API, cuDriverGetVersion). A driver has to be
of the libraries' major version at least (CUDA Compatibility, minor version compatibility)."""


class NotOnCuda(LoadError):
    """CUDA does not run a model, or does not start at all.

    Attributes:
        reason: why.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"CUDA was asked for and does not run {what}: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What an operator can choose of CUDA.

    Attributes:
        gpu_id: which device, from 0.
        memory_limit_bytes: most that the arena of a session takes; None for what the device has.
        arena_extend: by how much the arena grows: ``same``: by what is asked for; ``double``: to twice as much.
        tf32: whether products may round their factors to 10 bits behind the point, which tensor cores are quicker at.
    """

    gpu_id: int = 0
    memory_limit_bytes: int | None = None
    arena_extend: Literal["same", "double"] = "double"
    tf32: bool = False

    def for_onnxruntime(self) -> dict[str, str]:
        """The same as options of its CUDA execution provider."""
        options = {
            "device_id": str(self.gpu_id),
            "arena_extend_strategy": "kSameAsRequested" if self.arena_extend == "same" else "kNextPowerOfTwo",
            # onnxruntime has it on by default.
            "use_tf32": str(int(self.tf32)),
        }
        if self.memory_limit_bytes is not None:
            options["gpu_mem_limit"] = str(self.memory_limit_bytes)
        return options


def start(
    model: Path | bytes,
    device: Device,
    threads: int,
    cuda: CudaOptions = CudaOptions(),
    path: RecurrentPath | None = None,
    provider_options: Mapping[str, str] = _NOTHING,
    config: Mapping[str, str] = _NOTHING,
) -> onnxruntime.InferenceSession:
    """Start an onnxruntime session.

    Args:
        model: the .onnx file, or what one holds.
        device: that runs it. What CUDA does not run of the recurrent path is refused.
        threads: inside one run.
        cuda: what was chosen of CUDA.
        path: the model's recurrent path; without it, CUDA has to run every node.
        provider_options: more options of the execution provider.
        config: more entries of the session's configuration.

    Raises:
        NotOnCuda: if CUDA does not start, or would leave some of it to the CPU.
        LoadError: if onnxruntime cannot load the file.
    """
    name = model.name if isinstance(model, Path) else "the model"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # What fails is raised, and said once by whoever asked for it.
    options.log_severity_level = 4
    # Threads that spin between ticks take the cores from the event loop and from other models.
    entries = {"session.intra_op.allow_spinning": "0", **config}
    providers: list[Any] = [CPU]
    if device == "cuda":
        if reason := why_no_cuda(cuda.gpu_id):
            raise NotOnCuda(name, reason)
        entries[_RECORD] = "1"
        providers = [(CUDA, {**cuda.for_onnxruntime(), **provider_options}), CPU]
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        # Without fallback: where a session does not start, it is not tried again on the CPU.
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's errors share no base below Exception
        if device == "cuda":
            raise NotOnCuda(name, str(error)) from error
        raise LoadError(f"onnxruntime cannot load {name}: {error}") from error
    if device == "cuda":
        _check_assignment(session, name, path)
    return session


def _check_assignment(session: onnxruntime.InferenceSession, name: str, path: RecurrentPath | None) -> None:
    # A provider that cannot be made is left out with a warning.
    if CUDA not in session.get_providers():
        raise NotOnCuda(name, "onnxruntime could not make its CUDA provider; standard error has its own words")
    everything = RecurrentPath({}, frozenset())
    if elsewhere := (path or everything).elsewhere(assignment(session), CUDA):
        raise NotOnCuda(name, told(elsewhere))


def assignment(session: onnxruntime.InferenceSession) -> list[Assigned]:
    """Where each node of a session runs, by its own record, which has to have been asked for when it was started."""
    return [
        Assigned(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


@cache
def why_no_cuda(gpu_id: int = 0) -> str | None:
    """Tell what CUDA lacks on this machine, and what to do; None where it should start.

    Looked at once: libraries stay as they were when they were first asked for.

    Args:
        gpu_id: the device that is meant.
    """
    # The machine first: where it has no device, nothing that is installed helps.
    return (
        _why_no_device(gpu_id, ctypes.CDLL)
        or _why_no_build(onnxruntime.get_available_providers())
        or _why_no_libraries(onnxruntime.preload_dlls, ctypes.CDLL)
        or _why_no_cupy()
    )


def headline(reason: str) -> str:
    """What comes first in a reason why CUDA does not start: without details, and without what to do."""
    return re.split(r" \(|: |; ", reason, maxsplit=1)[0]


def _why_no_device(gpu_id: int, load: Callable[[str], Any]) -> str | None:
    try:
        driver = load(_DRIVER)
    except OSError as error:
        return (
            f"no NVIDIA driver ({error}): a machine needs one, and a container to be given the device "
            "(docker run --gpus all; compose: the profile gpu)"
        )
    version = ctypes.c_int()
    if not driver.cuDriverGetVersion(ctypes.byref(version)) and version.value < _LEAST_DRIVER:
        major, minor = divmod(version.value // 10, 100)
        return f"the NVIDIA driver is for CUDA {major}.{minor}; the libraries want one for CUDA 13 (580 or later)"
    if status := driver.cuInit(0):
        what = "there is no CUDA device" if status == _NO_DEVICE else "the NVIDIA driver does not start"
        return f"{what} (cuInit gives {status}): see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"
    count = ctypes.c_int()
    if status := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not tell its devices (cuDeviceGetCount gives {status})"
    if gpu_id >= count.value:
        return f"there is no CUDA device {gpu_id} (--gpu-id); there are {count.value}, counted from 0"
    return None


def _why_no_build(providers: Sequence[str]) -> str | None:
    return None if CUDA in providers else f"onnxruntime {VERSION} is built without CUDA: {_INSTALL}"


def gpu_name(gpu_id: int, load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """What a CUDA device calls itself; empty where there is none.

    Args:
        gpu_id: which, from 0.
        load: loads a library by its name.
    """
    try:
        driver = load(_DRIVER)
    except OSError:
        return ""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), gpu_id):
        return ""
    return "" if driver.cuDeviceGetName(name, len(name), device) else name.value.decode(errors="replace")


def _why_no_libraries(preload: Callable[[], None], load: Callable[[str], Any]) -> str | None:
    said = io.StringIO()
    try:
        # It prints what it does not find, and of cuDNN says nothing at all.
        with contextlib.redirect_stdout(said):
            preload()
        failed = [_which(line) for line in said.getvalue().splitlines() if line.startswith(_FAILED)]
    except Exception as error:  # whatever a loader raises
        failed = [str(error)]
    try:
        load(_CUDNN)
    except OSError as error:
        failed.append(_which(f"{_FAILED}{_CUDNN}: {error}"))
    return f"CUDA's libraries do not load: {'; '.join(failed)}: {_INSTALL}" if failed else None


def _why_no_cupy(name: str = "cupy") -> str | None:
    if importlib.util.find_spec(name) is not None:
        return None
    return f"CuPy, which keeps the states on the device, is not installed: {_INSTALL}"


def _which(line: str) -> str:
    """The library and why, of a line that names it once or, where the loader does so too, twice."""
    name, _, error = line.removeprefix(_FAILED).partition(": ")
    return error if error.startswith(name) else f"{name}: {error}"
