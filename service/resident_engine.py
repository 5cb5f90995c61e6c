"""A graph whose states stay on a device: loaded, rewritten and ready to run.

Owns the onnxruntime session of the rewritten graph, the pool that its states live in, and the memory of the ticks under
way. Must not know sessions or grpc. Whoever calls it does so from one thread at a time, but for ``interrupt``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.device import Device
from service.engine import digest, identify, run_options
from service.errors import LoadError
from service.graph import Signature
from service.manifest import Manifest
from service.onnx_file import OnnxFile
from service.provider import CudaOptions, NotOnCuda, start
from service.recurrent_path import name_nodes, recurrent_path
from service.resident import content, make_resident, row_size, sources
from service.resident_pool import INITIAL, Moves, ResidentPool
from service.resident_workspace import Lane, ResidentGraph, ResidentWorkspace, state_rows_first
from service.values import from_text
from service.workspace import Results

Array = NDArray[Any]

IN_FLIGHT = 2
"""How many ticks are under way at once: while one runs the next is filled, and the results of the last are told."""
_LENGTHS = "conveyor.lengths"
"""The input for the rows' lengths, of a graph that takes one step a run and has none."""


class ResidentEngine:
    """A loaded graph whose states stay on a device. It takes any number of rows and steps a run.

    Attributes:
        manifest: what the file says of itself, or was said of it.
        digest: as an ``Engine`` of the same file has it.
        provider: the onnxruntime execution provider that runs it.
        file_digests: SHA-256 of the file and of those beside it, in hexadecimal.

    Args:
        path: the .onnx file.
        device: where the states live.
        threads: inside one run.
        describe: gives the manifest of a graph that has none inside, from its signature.
        external: files beside it that hold its data.
        file_digests: where they are known already.
        cuda: what was chosen of CUDA; None for what it is by default.

    Raises:
        NotOnCuda: if its states cannot be kept on a device, or that does not run it.
        LoadError: if the file cannot be read, is no model, has no manifest, or disagrees with it.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        threads: int = 1,
        describe: Callable[[Signature], Manifest] | None = None,
        external: Sequence[Path] = (),
        file_digests: Sequence[str] = (),
        cuda: CudaOptions | None = None,
    ) -> None:
        self.file_digests = tuple(file_digests) or tuple(digest(part) for part in (path, *external))
        file = OnnxFile(path)
        signature = file.signature
        inside, self.digest = identify(file.metadata, signature, describe, self.file_digests)
        signature.check(inside)
        try:
            self.manifest = _as_served(inside)
            make_resident(file.model, inside)
        except LoadError as error:
            raise NotOnCuda(path.name, str(error)) from error
        name_nodes(file.model)
        self._device = device
        session = start(
            content(file.model, path.parent),
            "cuda" if device.kind == "cuda" else "cpu",
            threads,
            cuda or CudaOptions(),
            recurrent_path(file.model, sources(inside)),
            {} if device.stream is None else {"user_compute_stream": str(device.stream)},
            {"session.model_external_initializers_file_folder_path": str(path.parent)},
        )
        self.provider: str = session.get_providers()[0]
        self._options = run_options(waits=device.stream is None)
        where = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self._graph = ResidentGraph(
            inside,
            session,
            self._options,
            device,
            {one.name: from_text(one.value, one.dtype, one.shape) for one in inside.constants},
            frozenset(value.name for value, info in where if info.name.lower() == "cpu"),
            inside.lengths,
        )
        self._lanes: list[Lane] = []

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> ResidentPool:
        """Take the memory that its states live in; runs before this, and with ``run``, have memory of their own.

        Args:
            slots: most that may be taken at once.
            tick_rows: most rows of a tick.
            count: told of each copy of states, with its direction and its bytes.

        Raises:
            LoadError: if the device has no memory for so many.
        """
        moving = IN_FLIGHT * tick_rows * (2 if self._graph.stepped else 1)
        pool = ResidentPool(self.manifest.states, slots, moving, self._device, IN_FLIGHT, count)
        self._lanes = [Lane(self._graph, pool.buffers) for _ in range(IN_FLIGHT)]
        return pool

    def workspace(self, rows: int, steps: int) -> ResidentWorkspace:
        """Return the arrays of a tick, which are valid until they are released; as many as ticks may be under way.

        Raises:
            MemoryError: if the device has no memory for it.
        """
        lane = self._lanes.pop()
        try:
            return lane.workspace(rows, steps, self._lanes.append)
        except BaseException:
            self._lanes.append(lane)
            raise

    def run(self, feeds: Mapping[str, Array]) -> Results:
        """Run the graph once, on states that come and go with it: as a tick runs, with memory of its own.

        Args:
            feeds: every input by name, in the axes of the manifest; no constants.

        Returns:
            The outputs and the states after the run, each in the manifest's order and axes.

        Raises:
            Exception: whatever onnxruntime raises.
        """
        manifest, device = self.manifest, self._device
        x = manifest.inputs[0]
        rows = feeds[x.name].shape[x.batch_axis]
        steps = 1 if x.time_axis is None else feeds[x.name].shape[x.time_axis]
        first = INITIAL + 2
        pools = [device.empty((first + 3 * rows, row_size(state)), state.dtype) for state in manifest.states]
        for state, pool in zip(manifest.states, pools, strict=True):
            given = state_rows_first(feeds[state.input], state)
            device.upload(given, pool.part(pool.row(first).pointer - pool.pointer, given.shape, state.dtype))
        workspace = Lane(self._graph, pools).workspace(rows, steps, lambda lane: None)
        for spec, array in zip(manifest.inputs, workspace.inputs, strict=True):
            assert array is not None
            array[...] = feeds[spec.name]
        if workspace.lengths is not None and manifest.lengths is not None:
            workspace.lengths[:] = feeds[manifest.lengths]
        moves: Moves = workspace.states
        for places, begin in zip((moves.before, moves.after, moves.between), (0, rows, 2 * rows), strict=True):
            if places is not None:
                places[:] = np.arange(first + begin, first + begin + rows)
        try:
            outputs, _ = workspace.run()
            states = [np.empty((rows, row_size(state)), state.dtype) for state in manifest.states]
            for pool, array in zip(pools, states, strict=True):
                start = pool.row(first + rows).pointer - pool.pointer
                device.download(pool.part(start, array.shape, pool.dtype), array)
            device.mark().wait()
        finally:
            workspace.release()
        return outputs, [
            np.moveaxis(array.reshape(rows, *state.tail), 0, state.batch_axis)
            for state, array in zip(manifest.states, states, strict=True)
        ]

    def interrupt(self) -> None:
        """End the run that is under way, from another thread; it raises, and so does every later one."""
        self._options.terminate = True


def _as_served(inside: Manifest) -> Manifest:
    """What a graph is that takes one step a run, once it is run for each."""
    if inside.steps_per_run is None:
        return inside
    if without := [spec.name for spec in (*inside.inputs, *inside.outputs) if spec.time_axis is None]:
        raise LoadError(f"{without} have no time axis, and a run takes one step: run the model on the CPU")
    return inside.model_copy(update={"lengths": inside.lengths or _LENGTHS, "lengths_dtype": "int32"})
