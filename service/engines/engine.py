"""One onnxruntime session: a graph, loaded and ready to run.

Owns the session and the way between the manifest's axes and the graph's own. Must not know sessions or grpc. Whoever
calls ``run`` does so from one thread at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import ValidationError

from service.engines.provider import CPU, CudaOptions, start
from service.errors import LoadError
from service.graphs.graph import Port, Signature, StatePool
from service.graphs.placement import Device
from service.graphs.workspace import BoundWorkspaces, FedWorkspace, Results, Workspace, bindable
from service.manifest import METADATA_KEY, Manifest, StateSpec, TensorSpec
from service.states.pool import Pool
from service.values import from_text

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


class NoManifest(LoadError):
    """Neither the file nor whoever loads it says what its inputs and outputs are."""


class Engine:
    """A loaded graph. It takes as many rows and steps a run as its manifest says, and no other number.

    Attributes:
        manifest: what the file says of itself, or was said of it.
        digest: SHA-256 of the file, in hexadecimal; of a described graph, of all that makes its results.
        provider: the onnxruntime execution provider that runs it.
        file_digests: SHA-256 of the file and of those beside it, in hexadecimal.

    Args:
        path: the .onnx file.
        device: that runs it; ``cuda`` fails where CUDA does not start, or would leave some of it to the CPU.
        threads: inside one run.
        describe: gives the manifest of a graph that has none inside, from its signature.
        external: files beside it that hold its data.
        file_digests: where they are known already.
        cuda: what was chosen of CUDA; None for what it is by default.

    Raises:
        LoadError: if the file cannot be read, is no model, has no manifest, disagrees with it, or the device does not
            start.
    """

    def __init__(
        self,
        path: Path,
        device: Device = "cpu",
        threads: int = 1,
        describe: Callable[[Signature], Manifest] | None = None,
        external: Sequence[Path] = (),
        file_digests: Sequence[str] = (),
        cuda: CudaOptions | None = None,
    ) -> None:
        self.file_digests = tuple(file_digests) or tuple(digest(file) for file in (path, *external))
        self._session = start(path, device, threads, cuda or CudaOptions())
        self.provider: str = self._session.get_providers()[0]
        signature = Signature(
            _ports(self._session.get_inputs()),
            _ports(self._session.get_outputs()),
            _ports(self._session.get_overridable_initializers()),
        )
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.manifest, self.digest = identify(metadata, signature, describe, self.file_digests)
        signature.check(self.manifest)
        manifest = self.manifest
        self._results: list[TensorSpec | StateSpec] = [*manifest.outputs, *manifest.states]
        results = [spec.name for spec in manifest.outputs] + [spec.output for spec in manifest.states]
        # A state that is served as an output too is fetched once.
        self._outputs = list(dict.fromkeys(results))
        self._places = None if results == self._outputs else [self._outputs.index(name) for name in results]
        self._options = run_options()
        self._constants = {one.name: from_text(one.value, one.dtype, one.shape) for one in manifest.constants}
        self._absent = {spec.name: spec.absent for spec in manifest.inputs if spec.absent}
        self._absent |= {spec.input: spec.absent for spec in manifest.states if spec.absent}
        self._absent_after = [(index, spec.absent) for index, spec in enumerate(self._results) if spec.absent]
        self._wide_lengths = manifest.lengths if manifest.lengths_dtype == "int64" else None
        self._bound = None
        # On other devices what is bound is copied there once, when it is bound.
        if self.provider == CPU and bindable(manifest) and signature.leaves_sizes_open(manifest):
            bind = partial(_bind, self._session, self._options, self._constants)
            self._bound = BoundWorkspaces(manifest, bind)

    def workspace(self, rows: int, steps: int) -> Workspace:
        """Return the arrays of a run of so many rows and steps; valid until the next call."""
        bound = self._bound.get(rows, steps) if self._bound is not None else None
        return bound or FedWorkspace(self.manifest, rows, steps, self.run)

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> StatePool:
        """Return a pool in this machine's memory; see ``Graph``. Nothing is ever copied to a device from there."""
        return Pool(self.manifest.states, slots)

    def run(self, feeds: Mapping[str, Array]) -> Results:
        """Run the graph once.

        Args:
            feeds: every input by name, in the axes of the manifest; no constants.

        Returns:
            The outputs and the states after the run, each in the manifest's order and axes.

        Raises:
            Exception: whatever onnxruntime raises; a result of another shape than the manifest says.
        """
        given = {**feeds, **self._constants}
        for name, absent in self._absent.items():
            given[name] = given[name].squeeze(absent)
        if self._wide_lengths is not None:
            given[self._wide_lengths] = given[self._wide_lengths].astype(np.int64)
        arrays = self._session.run(self._outputs, given, self._options)
        if self._places is not None:
            arrays = [arrays[place] for place in self._places]
        for index, absent in self._absent_after:
            arrays[index] = np.expand_dims(arrays[index], absent)
        x = self.manifest.inputs[0]
        sizes = feeds[x.name].shape
        for spec, array in zip(self._results, arrays, strict=True):
            _check_result(spec, array, sizes[x.batch_axis], 1 if x.time_axis is None else sizes[x.time_axis])
        split = len(self.manifest.outputs)
        return arrays[:split], arrays[split:]

    def interrupt(self) -> None:
        """End the run that is under way, from another thread; it raises, and so does every later one."""
        self._options.terminate = True


def _bind(
    session: onnxruntime.InferenceSession,
    options: onnxruntime.RunOptions,
    constants: Mapping[str, Array],
    feeds: Mapping[str, Array],
    results: Mapping[str, Array],
) -> Callable[[], None]:
    """Tie the graph to arrays in this machine's memory: it reads and fills them in place."""
    binding = session.io_binding()
    for name, array in {**feeds, **constants}.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, array in results.items():
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return partial(session.run_with_iobinding, binding, options)


def _check_result(spec: TensorSpec | StateSpec, array: Array, rows: int, steps: int) -> None:
    """Refuse what would be handed to the wrong rows. A graph may leave its sizes unsaid, or say what is not so."""
    expected = list(spec.shape)
    expected[spec.batch_axis] = rows
    if isinstance(spec, TensorSpec) and spec.time_axis is not None:
        expected[spec.time_axis] = steps
    have = list(array.shape)
    if have != expected and (
        len(have) != len(expected) or any(b is not None and a != b for a, b in zip(have, expected, strict=True))
    ):
        raise ValueError(f"{spec.name!r} came out as {have} for {rows} rows and {steps} steps; expected {expected}")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        LoadError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"cannot read {path.name}: {error.strerror}") from error


def identify(
    metadata: Mapping[str, str],
    signature: Signature,
    describe: Callable[[Signature], Manifest] | None,
    file_digests: Sequence[str],
) -> tuple[Manifest, str]:
    """Tell what a graph is served as, and its digest.

    Args:
        metadata: of its file, by key.
        signature: its inputs and outputs.
        describe: gives the manifest of a graph that has none inside.
        file_digests: of the file and of those beside it.

    Raises:
        NoManifest: if neither the file nor ``describe`` gives one.
        LoadError: if it is not valid.
    """
    digests = list(file_digests)
    if describe is None:
        manifest = _manifest(metadata.get(METADATA_KEY))
    else:
        manifest = describe(signature)
        # Without defaults, so that a field that is added to manifests some day changes no digest.
        digests.append(manifest.model_dump_json(exclude_defaults=True))
    return manifest, digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def run_options(waits: bool = True, graph_id: int = -1) -> onnxruntime.RunOptions:
    """Options of runs.

    Args:
        waits: whether a run is over when it returns; elsewhere it goes on in its stream.
        graph_id: of the CUDA graph that is captured in the first of them and run in later ones; -1 for none.
    """
    options = onnxruntime.RunOptions()
    # Said also where there is none, which onnxruntime would find out anew at each bound run, from an error: 50 us.
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    if not waits:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _manifest(text: str | None) -> Manifest:
    if text is None:
        raise NoManifest(
            f"the file has no manifest (metadata entry {METADATA_KEY!r}), and no model.yaml beside its versions "
            "describes it; export it with python -m export, or let python -m export inspect FILE propose a model.yaml"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise LoadError(f"the file's manifest is not valid: {wrong}") from error


def _ports(nodes: Sequence[Any]) -> dict[str, Port]:
    return {
        node.name: Port(
            _DTYPES.get(node.type, node.type), tuple(size if isinstance(size, int) else None for size in node.shape)
        )
        for node in nodes
    }
