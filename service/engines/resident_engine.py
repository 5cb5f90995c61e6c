"""A graph whose states stay on a device: loaded, rewritten and ready to run.

Owns the onnxruntime session of the rewritten graph, the pool that its states live in, and the memory of the ticks under
way. Must not know sessions or grpc. Whoever calls it does so from one thread at a time, but for ``interrupt``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.captures import Captures
from service.engines.engine import digest, identify, run_options
from service.engines.lane import Lane
from service.engines.provider import CudaOptions, NotOnCuda, start
from service.engines.resident_graph import Options, ResidentGraph
from service.engines.resident_workspace import ResidentWorkspace
from service.errors import LoadError
from service.graphs.capture import make_one_step
from service.graphs.graph import Signature
from service.graphs.onnx_file import OnnxFile
from service.graphs.recurrent_path import name_nodes, recurrent_path
from service.graphs.resident import content, make_resident, row_size, sources
from service.graphs.workspace import Results
from service.manifest import Manifest, StateSpec
from service.states.device import Buffer, Device
from service.states.resident_pool import INITIAL, Moves, ResidentPool
from service.values import from_text

Array = NDArray[Any]

IN_FLIGHT = 2
"""How many ticks are under way at once: while one runs the next is filled, and the results of the last are told."""
_HOST_MEMORY = ("Cpu", "CudaPinned")
"""Names of onnxruntime's allocators (allocator.h)."""
_NOTHING: Mapping[str, str] = MappingProxyType({})
_SCRATCH = INITIAL + 2
"""The first place of those that a run with memory of its own uses."""
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
        capture: whether to try ticks of one step as captured graphs.

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
        capture: bool = False,
    ) -> None:
        self._device = device
        self.file_digests = tuple(file_digests) or tuple(digest(part) for part in (path, *external))
        file = OnnxFile(path)
        signature = file.signature
        inside, self.digest = identify(file.metadata, signature, describe, self.file_digests)
        signature.check(inside)
        waits = device.runs.address is None
        self._options = Options(run_options(waits), None if waits else run_options())
        cuda = cuda or CudaOptions()
        if capture and cuda.memory_limit_bytes is not None:
            # The graph of one step has a session of its own, whose arena would take as much again.
            cuda = replace(cuda, memory_limit_bytes=cuda.memory_limit_bytes // 2 or 1)
        self._start = partial(_started, path.parent, device, threads, cuda, self._options)
        self._captures: Captures | None = None
        try:
            self.manifest = _as_served(inside)
            if capture:
                one_step = partial(_one_step, self._start, _copy(file.model), inside)
                self._captures = Captures(one_step, self.manifest, device)
            self._graph = self._start(file.model, inside)
        except NotOnCuda:
            raise
        except LoadError as error:
            raise NotOnCuda(path.name, str(error)) from error
        self.provider: str = self._graph.session.get_providers()[0]
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
        settle_in = partial(self._settle_in, tick_rows)
        pool = ResidentPool(self.manifest.states, slots, moving, self._device, IN_FLIGHT, count, settle_in)
        if self._captures is not None:
            self._captures.end_rehearsals()
        self._lanes = [Lane(self._graph, pool.buffers) for _ in range(IN_FLIGHT)]
        return pool

    def workspace(self, rows: int, steps: int) -> ResidentWorkspace:
        """Return the arrays of a tick, which are valid until they are released; as many as ticks may be under way.

        Raises:
            MemoryError: if the device has no memory for it.
            RuntimeError: if the device has failed so often that no memory is left that it does not work on.
        """
        if not self._lanes:
            raise RuntimeError("the device has failed: no memory of ticks can be used again")
        lane = self._lanes.pop()
        try:
            captured = None
            if self._captures is not None and steps == 1:
                captured = self._captures.workspace(lane, rows, self._lanes.append)
            return captured or lane.workspace(rows, steps, self._lanes.append)
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
        workspace, pools = self._prepare(feeds, self._graph)
        first, rows = _SCRATCH, workspace.rows
        try:
            outputs, _ = workspace.run()
            states = [np.empty((rows, row_size(state)), state.dtype) for state in manifest.states]
            for pool, array in zip(pools, states, strict=True):
                start = pool.row(first + rows).pointer - pool.pointer
                device.ahead.download(pool.part(start, array.shape, pool.dtype), array)
            device.ahead.mark().wait()
        finally:
            workspace.release()
        return outputs, [
            np.moveaxis(array.reshape(rows, *state.tail), 0, state.batch_axis)
            for state, array in zip(manifest.states, states, strict=True)
        ]

    def rehearse(self, feeds: Mapping[str, Array]) -> Callable[[], Results]:
        """Return a tick to be run any number of times, in this thread: its states stay on the device, as in the server.

        Args:
            feeds: as for ``run``; each tick begins with these states.
        """
        tie = partial(self._rehearsal, feeds)
        plain = tie(self._graph)
        rows, steps = self._sizes(feeds)
        return plain if self._captures is None or steps > 1 else self._captures.rehearse(rows, plain, tie)

    def _rehearsal(self, feeds: Mapping[str, Array], graph: ResidentGraph) -> Callable[[], Results]:
        workspace, pools = self._prepare(feeds, graph)
        # Nobody else ever has its memory; until then it would hold itself, in a circle.
        workspace.release()

        def tick(pools: object = pools) -> Results:
            workspace.start()
            return workspace.run()

        return tick

    def _sizes(self, feeds: Mapping[str, Array]) -> tuple[int, int]:
        """How many rows and steps are given."""
        x = self.manifest.inputs[0]
        shape = feeds[x.name].shape
        return shape[x.batch_axis], 1 if x.time_axis is None else shape[x.time_axis]

    def _prepare(self, feeds: Mapping[str, Array], graph: ResidentGraph) -> tuple[ResidentWorkspace, Sequence[Buffer]]:
        """Fill the arrays of a tick, with memory of its own: states before it, after it, and between its runs."""
        manifest, device = self.manifest, self._device
        rows, steps = self._sizes(feeds)
        first = _SCRATCH
        pools = [device.empty((first + 3 * rows, row_size(state)), state.dtype) for state in manifest.states]
        for state, pool in zip(manifest.states, pools, strict=True):
            given = _rows_first(feeds[state.input], state)
            device.ahead.upload(given, pool.part(pool.row(first).pointer - pool.pointer, given.shape, state.dtype))
        lane = Lane(graph, pools)
        workspace = lane.workspace(rows, steps, lambda lane: None)
        for spec, array in zip(manifest.inputs, workspace.inputs, strict=True):
            assert array is not None
            array[...] = feeds[spec.name]
        if workspace.lengths is not None and manifest.lengths is not None:
            workspace.lengths[:] = feeds[manifest.lengths]
        moves: Moves = workspace.states
        for places, begin in zip((moves.before, moves.after, moves.between), (0, rows, 2 * rows), strict=True):
            if places is not None:
                places[:] = np.arange(first + begin, first + begin + rows)
        return workspace, pools

    def _settle_in(self, tick_rows: int, pool: ResidentPool) -> str:
        return "" if self._captures is None else self._captures.settle_in(self._lanes, tick_rows, pool)

    def __del__(self) -> None:
        # What goes with it, the session's memory too, is freed in this thread, maybe while another one captures.
        self._device.enter()

    def interrupt(self) -> None:
        """End the run that is under way, from another thread; it raises, and so does every later one."""
        self._options.interrupt()


def _rows_first(array: Array, state: StateSpec) -> Array:
    """A state's rows one behind the other, as they lie in a pool: [N, R]."""
    rows = np.moveaxis(array, state.batch_axis, 0)
    return np.ascontiguousarray(rows).reshape(len(rows), -1)


def _started(
    folder: Path,
    device: Device,
    threads: int,
    cuda: CudaOptions,
    options: Options,
    model: Any,
    manifest: Manifest,
    provider_options: Mapping[str, str] = _NOTHING,
) -> ResidentGraph:
    """Rewrite a graph so that its states stay, and start it."""
    make_resident(model, manifest)
    name_nodes(model)
    on_cuda = device.kind == "cuda"
    stream = {} if device.runs.address is None else {"user_compute_stream": str(device.runs.address)}
    session = start(
        content(model, folder),
        "cuda" if on_cuda else "cpu",
        threads,
        cuda,
        recurrent_path(model, sources(manifest)),
        {**stream, **provider_options} if on_cuda else _NOTHING,
        {"session.model_external_initializers_file_folder_path": str(folder)},
    )
    where = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    # On the CPU's own provider all of them are read where they are.
    on_host = frozenset(value.name for value, info in where if on_cuda and info.name in _HOST_MEMORY)
    constants = {one.name: from_text(one.value, one.dtype, one.shape) for one in manifest.constants}
    return ResidentGraph(manifest, session, options, device, constants, on_host, manifest.lengths)


def _one_step(start: Callable[..., ResidentGraph], model: Any, inside: Manifest) -> ResidentGraph:
    """Start the graph of one step that is to be captured."""
    model = _copy(model)
    served = make_one_step(model, inside)
    graph = start(model, served, {"enable_cuda_graph": "1"})
    if on_host := sorted(graph.on_host - graph.constants.keys()):
        # A captured graph would read it again from wherever it lay when it was captured.
        raise LoadError(f"inputs {on_host} are read on the host")
    return graph


def _copy(model: Any) -> Any:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


def _as_served(inside: Manifest) -> Manifest:
    """What a graph is that takes one step a run, once it is run for each."""
    if inside.steps_per_run is None:
        return inside
    if without := [spec.name for spec in (*inside.inputs, *inside.outputs) if spec.time_axis is None]:
        raise LoadError(f"{without} have no time axis, and a run takes one step: run the model on the CPU")
    return inside.model_copy(update={"lengths": inside.lengths or _LENGTHS, "lengths_dtype": "int32"})
