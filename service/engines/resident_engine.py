"""A graph whose states stay on a device: loaded, rewritten and ready to run.

Owns the onnxruntime session of the rewritten graph, the pool that its states live in, and the memory of the ticks under
way. Must not know sessions or grpc. Whoever calls it does so from one thread at a time, but for ``interrupt``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.capture_trial import compare
from service.engines.engine import digest, identify, run_options
from service.engines.lane import Lane
from service.engines.provider import CudaOptions, NotOnCuda, start
from service.engines.resident_graph import Options, ResidentGraph
from service.engines.resident_workspace import ResidentWorkspace
from service.errors import LoadError
from service.graphs.capture import TOLERANCES, Choice, Trial, buckets, make_one_step, worst_of
from service.graphs.graph import Signature
from service.graphs.onnx_file import OnnxFile
from service.graphs.recurrent_path import name_nodes, recurrent_path
from service.graphs.resident import content, make_resident, row_size, sources
from service.graphs.workspace import Results
from service.manifest import Manifest, StateSpec
from service.states.device import Buffer, Device, all_done
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
        self._one_step: Callable[[], ResidentGraph] | None = None
        if capture:
            one_step = type(file.model)()
            one_step.CopyFrom(file.model)
            self._one_step = partial(_one_step, self._start, one_step, inside)
        try:
            self.manifest = _as_served(inside)
            self._graph = self._start(file.model, inside)
        except NotOnCuda:
            raise
        except LoadError as error:
            raise NotOnCuda(path.name, str(error)) from error
        self.provider: str = self._graph.session.get_providers()[0]
        self._lanes: list[Lane] = []
        self._captured: dict[tuple[Lane, int], ResidentWorkspace] = {}
        self._choice = Choice()

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
            room = self._choice.rows(rows) if steps == 1 else None
            if room is None:
                return lane.workspace(rows, steps, self._lanes.append)
            captured = self._captured[lane, room]
            captured.begin(rows, lambda: self._lanes.append(lane))
            return captured
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
        workspace, pools = self._prepare(feeds)
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
        """Return a tick to be run any number of times: its states stay on the device, as those of sessions do.

        Args:
            feeds: as for ``run``; each tick begins with these states.
        """
        workspace, pools = self._prepare(feeds)
        # Nobody else ever has its memory; until then it would hold itself, in a circle.
        workspace.release()

        def tick(pools: object = pools) -> Results:
            workspace.start()
            return workspace.run()

        return tick

    def _prepare(self, feeds: Mapping[str, Array]) -> tuple[ResidentWorkspace, Sequence[Buffer]]:
        """Fill the arrays of a tick, with memory of its own: states before it, after it, and between its runs."""
        manifest, device = self.manifest, self._device
        x = manifest.inputs[0]
        rows = feeds[x.name].shape[x.batch_axis]
        steps = 1 if x.time_axis is None else feeds[x.name].shape[x.time_axis]
        first = _SCRATCH
        pools = [device.empty((first + 3 * rows, row_size(state)), state.dtype) for state in manifest.states]
        for state, pool in zip(manifest.states, pools, strict=True):
            given = _rows_first(feeds[state.input], state)
            device.ahead.upload(given, pool.part(pool.row(first).pointer - pool.pointer, given.shape, state.dtype))
        lane = Lane(self._graph, pools)
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
        """Capture ticks of one step, hold them against plain ones, and use them where they are quicker.

        On states that nobody uses, and in the thread that runs the ticks: what is captured there is known there alone.

        Args:
            tick_rows: most rows of a tick.
            pool: of this graph.

        Returns:
            What has come of it, for people; empty where capturing is not tried.
        """
        one_step, self._one_step = self._one_step, None
        if one_step is None:
            return ""
        # A session takes memory of it when it is started, maybe while another model is captured.
        self._device.enter()
        try:
            graph = one_step()
            trials = [self._try(graph, pool, rows) for rows in buckets(tick_rows) if 2 * rows <= pool.limit]
        except Exception as error:
            # Without it the model runs as well as it did before.
            self._captured.clear()
            self._device.end_capture()
            # What it had begun, on memory that ticks are to have. If the device has failed, they will say so.
            with suppress(Exception):
                all_done(self._device).wait()
            return f"ticks of one step are not captured: {error}"
        self._choice = Choice(trials, TOLERANCES[self.manifest.precision])
        self._captured = {at: one for at, one in self._captured.items() if at[1] in self._choice.graphs}
        refused = "".join(f"; not for {trial}" for trial in trials if trial.rows not in self._choice.graphs)
        return f"ticks of one step are captured with room for {sorted(self._choice.graphs)} rows{refused}"

    def _try(self, graph: ResidentGraph, pool: ResidentPool, rows: int) -> Trial:
        """Capture a number of rows in the memory of each lane, and hold them against plain runs there."""
        trials = []
        for lane in self._lanes:
            # None of its runs waits: what kernels had copied from the host is freed then, and the captured graph reads
            # it again in each run.
            options = Options(run_options(self._device.runs.address is None, graph_id=len(self._captured)))
            self._captured[lane, rows] = captured = lane.own(graph, rows, options)
            plain = lane.workspace(rows, 1, lambda lane: None)
            trials.append(compare(pool, self.manifest.inputs, plain, captured))
        return worst_of(trials)

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
    served = make_one_step(model, inside)
    graph = start(model, served, {"enable_cuda_graph": "1"})
    if on_host := sorted(graph.on_host - graph.constants.keys()):
        # A captured graph would read it again from wherever it lay when it was captured.
        raise LoadError(f"inputs {on_host} are read on the host")
    return graph


def _as_served(inside: Manifest) -> Manifest:
    """What a graph is that takes one step a run, once it is run for each."""
    if inside.steps_per_run is None:
        return inside
    if without := [spec.name for spec in (*inside.inputs, *inside.outputs) if spec.time_axis is None]:
        raise LoadError(f"{without} have no time axis, and a run takes one step: run the model on the CPU")
    return inside.model_copy(update={"lengths": inside.lengths or _LENGTHS, "lengths_dtype": "int32"})
