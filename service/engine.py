"""One onnxruntime session: a graph, loaded and ready to run.

Owns the session, its device and its threads; the only room that imports onnxruntime. Must not know sessions or grpc.
Whoever calls ``run`` does so from one thread at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import ValidationError

from service.errors import LoadError as LoadError
from service.manifest import METADATA_KEY, Manifest

Array = NDArray[np.generic]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


class Engine:
    """A loaded graph.

    Attributes:
        manifest: what the file says of itself.
        digest: SHA-256 of the file, in hexadecimal.
        provider: the onnxruntime execution provider that runs it.

    Args:
        path: the .onnx file.
        device: ``cuda`` fails where CUDA does not start or any node would run elsewhere; ``auto`` falls to the
            CPU then.
        threads: inside one run; 0 for one a core.

    Raises:
        LoadError: if the file cannot be read, is no model, has no manifest, disagrees with it, or the device does not
            start.
    """

    def __init__(self, path: Path, device: Literal["auto", "cpu", "cuda"] = "cpu", threads: int = 0) -> None:
        try:
            with path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise LoadError(f"cannot read {path.name}: {error.strerror}") from error
        self._session = _start(path, device, threads)
        self.provider: str = self._session.get_providers()[0]
        self.manifest = _manifest(self._session)
        self._outputs = [spec.name for spec in self.manifest.outputs] + [spec.output for spec in self.manifest.states]
        _check(self._session, self.manifest)

    def run(self, feeds: Mapping[str, Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Run the graph once.

        Args:
            feeds: every input of the graph by name, in the graph's own axes.

        Returns:
            The outputs and the states after the run, each in the manifest's order and the graph's own axes.
        """
        arrays = self._session.run(self._outputs, feeds)
        split = len(self.manifest.outputs)
        return arrays[:split], arrays[split:]


def _start(path: Path, device: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads that spin between ticks take the cores from the event loop and from other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
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


def _manifest(session: onnxruntime.InferenceSession) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise LoadError(f"the file has no manifest (metadata entry {METADATA_KEY!r}); export it with python -m export")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise LoadError(f"the file's manifest is not valid: {wrong}") from error


def _check(session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    """Hold the manifest against the graph's signature: same names, dtypes and fixed sizes."""
    inputs, outputs = _signature(session.get_inputs()), _signature(session.get_outputs())
    want_in: dict[str, tuple[str, tuple[int | None, ...]]] = {s.name: (s.dtype, s.shape) for s in manifest.inputs}
    want_in |= {s.input: (s.dtype, s.shape) for s in manifest.states}
    if manifest.lengths is not None:
        want_in[manifest.lengths] = ("int32", (None,))
    want_out: dict[str, tuple[str, tuple[int | None, ...]]] = {s.name: (s.dtype, s.shape) for s in manifest.outputs}
    want_out |= {s.output: (s.dtype, s.shape) for s in manifest.states}
    if missing := sorted(inputs.keys() - want_in.keys()):
        raise LoadError(f"the graph's inputs {missing} are not in its manifest")
    for kind, want, have in (("input", want_in, inputs), ("output", want_out, outputs)):
        for name, (dtype, shape) in want.items():
            if name not in have:
                raise LoadError(f"the manifest's {kind} {name!r} is not in the graph, which has {sorted(have)}")
            if have[name][0] != dtype:
                raise LoadError(f"{kind} {name!r} is {dtype} in the manifest and {have[name][0]} in the graph")
            sizes = have[name][1]
            # What the graph gives may have axes it has no size for; those the manifest fixes.
            if len(sizes) != len(shape) or any(a is not None and a != b for a, b in zip(sizes, shape, strict=True)):
                raise LoadError(f"{kind} {name!r} has shape {shape} in the manifest and {sizes} in the graph")


def _signature(nodes: Sequence[Any]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    return {
        node.name: (
            _DTYPES.get(node.type, node.type),
            tuple(size if isinstance(size, int) else None for size in node.shape),
        )
        for node in nodes
    }
