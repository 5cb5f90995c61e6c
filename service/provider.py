"""How an onnxruntime session is started on a device: with which options, and why not where it is not.

Owns the execution providers and their options. Must not know what the graph is served as, sessions or grpc.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnxruntime

from service.errors import LoadError

VERSION: str = onnxruntime.__version__
"""Of onnxruntime: another one may be faster or slower."""


def start(path: Path, device: Literal["auto", "cpu", "cuda"], threads: int) -> onnxruntime.InferenceSession:
    """Start an onnxruntime session.

    Args:
        path: the .onnx file.
        device: ``cuda`` fails where CUDA does not start or any node would run elsewhere; ``auto`` falls to the
            CPU then.
        threads: inside one run.

    Raises:
        LoadError: if onnxruntime cannot load the file, or the device does not start.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads that spin between ticks take the cores from the event loop and from other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What fails is raised, and said once by whoever asked for it.
    options.log_severity_level = 4
    cuda = "CUDAExecutionProvider"
    failure = f"this onnxruntime ({onnxruntime.__version__}) is built without CUDA"
    if device != "cpu" and cuda in onnxruntime.get_available_providers():
        try:
            return _start_cuda(path, options)
        except Exception as error:  # onnxruntime's errors share no base below Exception
            failure = str(error)
    if device == "cuda":
        raise LoadError(f"CUDA was asked for and does not run {path.name}: {failure}")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LoadError(f"onnxruntime cannot load {path.name}: {error}") from error


def _start_cuda(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    onnxruntime.preload_dlls()
    # A node that CUDA does not have fails the load, and so does CUDA itself where it does not start: by default
    # onnxruntime would go on with the CPU and say so in a warning.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CUDAExecutionProvider"], enable_fallback=0)
    finally:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
