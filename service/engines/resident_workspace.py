"""A tick on a device: one copy up, the runs, one copy down.

Owns how the graph is tied to a tick's memory, and the order of copies and runs. Must not know sessions, slots, or what
onnxruntime is beyond a session that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from service.engines.resident_graph import ResidentGraph
from service.engines.tick_memory import Area, bytes_of, layouts, presented
from service.graphs.resident import AFTER, BEFORE, pool_input, pool_output
from service.graphs.workspace import Results, Workspace
from service.manifest import TensorSpec
from service.states.device import Buffer, Mark, all_done
from service.states.resident_pool import UNWANTED, Moves

Array = NDArray[Any]
log = structlog.get_logger()


class ResidentWorkspace(Workspace):
    """The arrays of a tick whose states stay on the device. ``states`` is a ``Moves``.

    Attributes:
        device: where it runs.

    Args:
        graph: that runs.
        pools: the buffers that its states live in.
        rows: side by side.
        steps: size of the time axis.
        areas: in which lies what goes up, and what comes down; large enough.
    """

    def __init__(
        self,
        graph: ResidentGraph,
        pools: Sequence[Buffer],
        rows: int,
        steps: int,
        areas: Sequence[Area],
    ) -> None:
        manifest = graph.manifest
        both = layouts(graph, rows, steps)
        up, down = (area.cut(layout) for area, layout in zip(areas, both, strict=True))
        self.rows = rows
        self.device = graph.device
        self._graph = graph
        self._steps = steps
        self._up, self._down = up, down
        self._areas = areas
        self._sizes = [bytes_of(layout) for layout in both]
        self._room = [presented(up[spec.name].here, spec, graph) for spec in manifest.inputs]
        self._results = [presented(down[spec.name].here, spec, graph) for spec in manifest.outputs]
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


def _first(array: Array, spec: TensorSpec, rows: int) -> Array:
    """The first rows of a tensor."""
    return array if rows == array.shape[spec.batch_axis] else array[(slice(None),) * spec.batch_axis + (slice(rows),)]


def _nothing() -> None:
    pass
