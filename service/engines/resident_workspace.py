"""The memory of ticks on a device: what goes up before a run and what comes down after it, in one copy each way.

Owns where the tensors of a tick lie, here and on the device, how the graph is tied to them, and the order of copies and
runs. Must not know sessions, slots, or what onnxruntime is beyond a session that runs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from service.graphs.resident import AFTER, BEFORE, pool_input, pool_output
from service.graphs.workspace import Results, Workspace, sizes
from service.manifest import Manifest, StateSpec, TensorSpec
from service.states.device import Buffer, Device, Mark, Stream, all_done
from service.states.resident_pool import UNWANTED, Moves

Array = NDArray[Any]
Shape = tuple[int, ...]
log = structlog.get_logger()

_ALIGNMENT = 256
"""Bytes, as CUDA's own allocations have it."""
_KEPT_BYTES = 64 << 20
"""Larger memory than this is not kept from one tick to the next."""
_MOST_SHAPES = 128
_RUNS_UNTIL_ONE_WAITS = 64


class Options:
    """Options of runs that go on in their stream, and now and then of one that waits.

    What a kernel has copied from the host, as a recurrent operator does with the lengths in each run, onnxruntime frees
    at the end of a run that waits, and never otherwise.

    Args:
        usual: onnxruntime's options of most runs.
        waiting: those of one that waits; None where each does.
    """

    def __init__(self, usual: Any, waiting: Any = None) -> None:
        self._usual = usual
        self._waiting = waiting
        self._runs = 0

    def next(self) -> Any:
        """The options of the next run."""
        self._runs += 1
        wait = self._waiting is not None and self._runs % _RUNS_UNTIL_ONE_WAITS == 0
        return self._waiting if wait else self._usual

    def interrupt(self) -> None:
        """End the run that is under way, from another thread; it raises, and so does every later one."""
        for options in (self._usual, self._waiting):
            if options is not None:
                options.terminate = True


@dataclass(frozen=True, slots=True)
class ResidentGraph:
    """A session whose graph has its states in pools, and what there is to know for tying it to memory.

    Attributes:
        manifest: of the graph that it was before.
        session: the onnxruntime session.
        options: of its runs.
        device: where it runs.
        constants: by the graph's inputs.
        on_host: the inputs that it reads in this machine's memory.
        lengths: its input for the rows' lengths; None if it has none.
    """

    manifest: Manifest
    session: Any
    options: Options
    device: Device
    constants: Mapping[str, Array]
    on_host: frozenset[str]
    lengths: str | None

    @property
    def stepped(self) -> bool:
        """Whether a run takes one step, so that a tick is as many runs."""
        return self.manifest.steps_per_run == 1


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a tick, here and there.

    Attributes:
        here: in this machine's memory, as it lies: of a tick of several runs each run's part behind the other.
        there: on the device.
        shape: as the graph sees it, in one run.
    """

    here: Array
    there: Buffer
    shape: Shape

    def part(self, run: int) -> tuple[int, int]:
        """Its addresses here and there for one run of a tick."""
        start = run * math.prod(self.shape) * self.here.itemsize
        return self.here.ctypes.data + start, self.there.pointer + start


class Lane:
    """The memory of one tick under way at a time. Ticks of all sizes lie in the same, as far as it is kept.

    Args:
        graph: that runs.
        pools: the buffers that its states live in.
    """

    def __init__(self, graph: ResidentGraph, pools: Sequence[Buffer]) -> None:
        self._graph = graph
        self._pools = pools
        self._up = _Area(graph.device, 0)
        self._down = _Area(graph.device, 0)
        self._kept: OrderedDict[tuple[int, int], ResidentWorkspace] = OrderedDict()

    def workspace(self, rows: int, steps: int, release: Callable[[Lane], None]) -> ResidentWorkspace:
        """Return the arrays of a tick; nobody may ask for others before it is released.

        Args:
            rows: side by side.
            steps: size of the time axis.
            release: called with this lane when the tick has ended.

        Raises:
            MemoryError: if the device has no memory for it.
        """
        kept = self._kept.get((rows, steps))
        if kept is None:
            kept = self._make(rows, steps)
        else:
            self._kept.move_to_end((rows, steps))
        kept.begin(rows, lambda: release(self))
        return kept

    def own(self, graph: ResidentGraph, rows: int, options: Options) -> ResidentWorkspace:
        """Return arrays for runs of one step that no other tick has, and that stay where they are: to be captured.

        Args:
            graph: that runs, on the same pools.
            rows: side by side; ticks may have fewer.
            options: of its runs.
        """
        up, down = _layout(graph, rows, 1)
        areas = [_Area(graph.device, _bytes(layout)) for layout in (up, down)]
        return ResidentWorkspace(
            replace(graph, options=options), self._pools, rows, 1, areas[0].cut(up), areas[1].cut(down), areas
        )

    def _make(self, rows: int, steps: int) -> ResidentWorkspace:
        up, down = _layout(self._graph, rows, steps)
        wanted = _bytes(up), _bytes(down)
        if max(wanted) > _KEPT_BYTES:
            areas = [_Area(self._graph.device, size) for size in wanted]
            return ResidentWorkspace(self._graph, self._pools, rows, steps, areas[0].cut(up), areas[1].cut(down), areas)
        if wanted[0] > self._up.size or wanted[1] > self._down.size:
            # Those that are kept lie in the old memory, and hold it.
            self._kept.clear()
            self._up, self._down = (
                area if size <= area.size else _Area(self._graph.device, 1 << (size - 1).bit_length())
                for area, size in zip((self._up, self._down), wanted, strict=True)
            )
        areas = [self._up, self._down]
        made = ResidentWorkspace(self._graph, self._pools, rows, steps, self._up.cut(up), self._down.cut(down), areas)
        self._kept[rows, steps] = made
        if len(self._kept) > _MOST_SHAPES:
            self._kept.popitem(last=False)
        return made


class ResidentWorkspace(Workspace):
    """The arrays of a tick whose states stay on the device. ``states`` is a ``Moves``.

    Attributes:
        device: where it runs.

    Args:
        graph: that runs.
        pools: the buffers that its states live in.
        rows: side by side.
        steps: size of the time axis.
        up: the tensors that go up, by the graph's inputs.
        down: those that come down.
        areas: in which they lie: up, down.
    """

    def __init__(
        self,
        graph: ResidentGraph,
        pools: Sequence[Buffer],
        rows: int,
        steps: int,
        up: Mapping[str, _Tensor],
        down: Mapping[str, _Tensor],
        areas: Sequence[_Area],
    ) -> None:
        manifest = graph.manifest
        self.rows = rows
        self.device = graph.device
        self._graph = graph
        self._steps = steps
        self._up, self._down = up, down
        self._areas = areas
        self._sizes = [_end(tensors.values(), area) for tensors, area in zip((up, down), areas, strict=True)]
        self._room = [_presented(up[spec.name].here, spec, graph) for spec in manifest.inputs]
        self._results = [_presented(down[spec.name].here, spec, graph) for spec in manifest.outputs]
        self._lengths = None if graph.lengths is None else up[graph.lengths].here
        self._of_rows = np.empty(rows, np.int32) if graph.stepped else self._lengths
        self.inputs = list(self._room)
        self._outputs = self._results
        self.lengths = self._of_rows
        if graph.stepped or not manifest.states:
            self.states = Moves(*(np.zeros(rows, np.int32) for _ in range(3 if graph.stepped else 2)))
        else:
            self.states = Moves(up[BEFORE].here, up[AFTER].here.reshape(rows))
        self._binding = graph.session.io_binding()
        self._tie(pools)
        self._busy = False
        self._release: Callable[[], None] = _nothing
        self._mark: Mark | None = None
        self._started = False

    def begin(self, rows: int, release: Callable[[], None]) -> None:
        """Be the arrays of another tick.

        Args:
            rows: of it; what there is room for beside them is padding.
            release: called when it has ended.
        """
        manifest = self._graph.manifest
        self.inputs = [_first(array, spec, rows) for array, spec in zip(self._room, manifest.inputs, strict=True)]
        self._outputs = [_first(array, spec, rows) for array, spec in zip(self._results, manifest.outputs, strict=True)]
        if self._lengths is not None and (self._graph.stepped or rows < self.rows):
            self._lengths[:] = 1
        self.lengths = None if self._of_rows is None else self._of_rows[:rows]
        self._release = release
        self._mark = None
        self._started = False

    def start(self) -> Mark:
        """Copy up, run, copy down: all of it goes on by itself, and beside the runs and copies of other ticks."""
        device = self.device
        self._started = self._busy = True
        if self._graph.stepped and self._graph.manifest.states:
            self._fill_tables()
        up, down = self._areas
        up.upload(device.ahead, self._sizes[0])
        device.runs.follow(device.ahead)
        self.compute()
        device.behind.follow(device.runs)
        down.download(device.behind, self._sizes[1])
        self._mark = device.behind.mark()
        return self._mark

    def compute(self) -> None:
        """Run on what lies on the device, and leave there what comes of it; ``start`` does that between its copies."""
        for run in self._runs():
            if run:
                self._tie_run(run)
            self._graph.session.run_with_iobinding(self._binding, self._graph.options.next())
        if self._steps > 1 and self._graph.stepped:
            self._tie_run(0)

    def run(self) -> Results:
        """Wait for the outputs; of the states, say where they have gone."""
        if not self._started:
            self.start()
        assert self._mark is not None
        self._mark.wait()
        self._busy = False
        return self._outputs, self.states

    def release(self) -> None:
        """Let another tick have the memory, when nothing works on it any more; none, where that cannot be known."""
        if self._busy:
            # What it had begun before it failed, or was not waited for.
            try:
                all_done(self.device).wait()
            except Exception:
                log.exception("the memory of a tick is not used again: the device failed, and may work on it still")
                return
            self._busy = False
        release, self._release = self._release, _nothing
        release()

    def _runs(self) -> Iterator[int]:
        return iter(range(self._steps if self._graph.stepped else 1))

    def _tie(self, pools: Sequence[Buffer]) -> None:
        """Tie the graph to the memory of the first run, which for most is the only one."""
        graph, binding = self._graph, self._binding
        for name, value in graph.constants.items():
            binding.bind_cpu_input(name, value)
        for index, pool in enumerate(pools):
            at = graph.device.kind, graph.device.number, np.dtype(pool.dtype), pool.shape, pool.pointer
            binding.bind_input(pool_input(index), *at)
            binding.bind_output(pool_output(index), *at)
        self._tie_run(0)

    def _tie_run(self, run: int) -> None:
        graph, binding = self._graph, self._binding
        for name, tensor in self._up.items():
            here, there = tensor.part(0 if name == graph.lengths else run)
            kind, number, pointer = (
                ("cpu", 0, here) if name in graph.on_host else (graph.device.kind, graph.device.number, there)
            )
            binding.bind_input(name, kind, number, tensor.here.dtype, tensor.shape, pointer)
        for name, tensor in self._down.items():
            pointer = tensor.part(run)[1]
            device = graph.device
            binding.bind_output(name, device.kind, device.number, tensor.here.dtype, tensor.shape, pointer)

    def _fill_tables(self) -> None:
        """Say for each run of a tick where its rows read and write, so that the last of each row writes to ``after``.

        No run reads where it writes. Rows that are at their end write what nobody keeps.
        """
        assert self.lengths is not None
        moves: Moves = self.states
        assert moves.between is not None
        before, after = self._up[BEFORE].here, self._up[AFTER].here
        reads = moves.before
        for run in range(self._steps):
            left = self.lengths.astype(np.int32) - 1 - run
            writes = np.where(left % 2 == 0, moves.after, moves.between)
            before[run] = reads
            after[run] = np.where(left >= 0, writes, UNWANTED)
            reads = writes


class _Area:
    """Memory here, and as much on the device; what is copied goes to the same place."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self._here = device.staging(size)
        self._there = device.empty((size,), "uint8")

    def cut(self, layout: Mapping[str, tuple[Shape, Shape, str]]) -> dict[str, _Tensor]:
        """Lay tensors into it, one behind the other."""
        tensors = {}
        start = 0
        for name, (lying, shape, dtype) in layout.items():
            size = math.prod(lying) * np.dtype(dtype).itemsize
            here = self._here[start : start + size].view(dtype).reshape(lying)
            here[:] = 0
            tensors[name] = _Tensor(here, self._there.part(start, lying, dtype), shape)
            start += _aligned(size)
        return tensors

    def end(self, tensor: _Tensor) -> int:
        """The byte behind a tensor."""
        return tensor.there.pointer - self._there.pointer + tensor.there.nbytes

    def upload(self, stream: Stream, size: int) -> None:
        """Copy as many bytes there."""
        stream.upload(self._here[:size], self._there.part(0, (size,), "uint8"))

    def download(self, stream: Stream, size: int) -> None:
        """Copy as many bytes here."""
        stream.download(self._there.part(0, (size,), "uint8"), self._here[:size])


Layout = dict[str, tuple[Shape, Shape, str]]
"""How each tensor lies in memory, how the graph sees it in one run, and its dtype."""


def _layout(graph: ResidentGraph, rows: int, steps: int) -> tuple[Layout, Layout]:
    manifest = graph.manifest
    # As the graph's own sizes are told from its first input.
    output_steps = 1 if manifest.inputs[0].time_axis is None else steps
    up = {spec.name: _lying(spec, rows, steps, graph) for spec in manifest.inputs}
    if graph.lengths is not None:
        up[graph.lengths] = (rows,), (rows,), manifest.lengths_dtype
    if manifest.states:
        for name, shape in ((BEFORE, (rows,)), (AFTER, (rows, 1))):
            up[name] = (steps, rows) if graph.stepped else shape, shape, "int32"
    return up, {spec.name: _lying(spec, rows, output_steps, graph) for spec in manifest.outputs}


def _lying(spec: TensorSpec, rows: int, steps: int, graph: ResidentGraph) -> tuple[Shape, Shape, str]:
    shape = sizes(spec, rows, 1 if graph.stepped else steps)
    lying = list(shape)
    if graph.stepped and spec.time_axis is not None:
        # A run's part has to lie together.
        del lying[spec.time_axis]
        lying.insert(0, steps)
    return tuple(lying), tuple(size for axis, size in enumerate(shape) if axis not in spec.absent), spec.dtype


def _presented(lying: Array, spec: TensorSpec, graph: ResidentGraph) -> Array:
    """A tensor in the manifest's axes."""
    return np.moveaxis(lying, 0, spec.time_axis) if graph.stepped and spec.time_axis is not None else lying


def _first(array: Array, spec: TensorSpec, rows: int) -> Array:
    """The first rows of a tensor."""
    return array if rows == array.shape[spec.batch_axis] else array[(slice(None),) * spec.batch_axis + (slice(rows),)]


def state_rows_first(array: Array, state: StateSpec) -> Array:
    """A state's rows one behind the other, as they lie in a pool: [N, R]."""
    rows = np.moveaxis(array, state.batch_axis, 0)
    return np.ascontiguousarray(rows).reshape(len(rows), -1)


def _bytes(layout: Layout) -> int:
    return sum(_aligned(math.prod(lying) * np.dtype(dtype).itemsize) for lying, _, dtype in layout.values())


def _end(tensors: Any, area: _Area) -> int:
    return max((area.end(tensor) for tensor in tensors), default=0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _nothing() -> None:
    pass
