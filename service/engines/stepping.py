"""Graphs that take one row or one step a run, made to take any number of both.

Owns the loops over rows and over steps. Must not know what runs inside them: what stands here is a graph, and so is
what it runs. Both stop each row at its own length, so that rows of different lengths share a tick and no padding is
computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.graphs.graph import Graph, StatePool
from service.graphs.workspace import FedWorkspace, Results, Workspace
from service.manifest import TensorSpec
from service.states.pool import Pool

Array = NDArray[np.generic]

_LENGTHS = "conveyor.lengths"
"""The input for the rows' lengths, where the graph inside has none."""


class _Loop(ABC):
    """What both loops are: a graph with lengths around one that may have none."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._inner_lengths = graph.manifest.lengths
        self._lengths = graph.manifest.lengths or _LENGTHS
        self.manifest = graph.manifest.model_copy(update={"lengths": self._lengths})
        self.digest = graph.digest

    @abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> Results:
        """Run the loop; see ``Graph``."""

    def workspace(self, rows: int, steps: int) -> Workspace:
        """Return the arrays of a run; see ``Graph``."""
        return FedWorkspace(self.manifest, rows, steps, self.run)

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> StatePool:
        """Return a pool in this machine's memory, from which every run of the loop takes its states; see ``Graph``."""
        return Pool(self.manifest.states, slots)

    def _run_inside(
        self,
        feeds: Mapping[str, Array],
        states: Sequence[Array],
        rows: NDArray[np.intp],
        steps: slice,
        lengths: NDArray[np.int32],
    ) -> Results:
        """Run the graph inside on some rows and some steps of what came in."""
        inside: dict[str, Array] = {}
        for spec in self.manifest.inputs:
            part = feeds[spec.name].take(rows, spec.batch_axis)
            inside[spec.name] = part if spec.time_axis is None else part[(slice(None),) * spec.time_axis + (steps,)]
        for state, array in zip(self.manifest.states, states, strict=True):
            inside[state.input] = array.take(rows, state.batch_axis)
        if self._inner_lengths is not None:
            inside[self._inner_lengths] = lengths
        return self._graph.run(inside)

    def _room(self, outputs: Sequence[Array], rows: int, steps: int) -> list[Array]:
        """Zeros for the outputs of all rows and steps, of which these are a part."""
        room = []
        for spec, output in zip(self.manifest.outputs, outputs, strict=True):
            shape = list(output.shape)
            shape[spec.batch_axis] = rows
            if spec.time_axis is not None:
                shape[spec.time_axis] = steps
            room.append(np.zeros(shape, output.dtype))
        return room


class StepByStep(_Loop):
    """A graph that takes one step a run, run once for each step, on the rows that have one."""

    def workspace(self, rows: int, steps: int) -> Workspace:
        """Return the arrays of a run; see ``Graph``. For one step they are those of the graph inside."""
        if steps > 1:
            return super().workspace(rows, steps)
        workspace = self._graph.workspace(rows, 1)
        if workspace.lengths is None:
            workspace.lengths = np.empty(rows, np.int32)
        return workspace

    def run(self, feeds: Mapping[str, Array]) -> Results:
        """Run the graph for each step of the longest row; see ``Graph``."""
        lengths = np.asarray(feeds[self._lengths], np.int32)
        longest = int(lengths.max())
        states = [feeds[state.input].copy() for state in self.manifest.states]
        outputs: list[Array] = []
        for step in range(longest):
            rows = np.flatnonzero(lengths > step)
            one = np.ones(len(rows), np.int32)
            given, after = self._run_inside(feeds, states, rows, slice(step, step + 1), one)
            outputs = outputs or self._room(given, len(lengths), longest)
            for spec, output, array in zip(self.manifest.outputs, outputs, given, strict=True):
                _rows_first(output, spec)[rows, step] = _rows_first(array, spec)[:, 0]
            for state, old, new in zip(self.manifest.states, states, after, strict=True):
                np.moveaxis(old, state.batch_axis, 0)[rows] = np.moveaxis(new, state.batch_axis, 0)
        return outputs, states


class RowByRow(_Loop):
    """A graph that takes one row a run, or should, run once for each row."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.manifest = self.manifest.model_copy(update={"rows_per_run": 1})

    def run(self, feeds: Mapping[str, Array]) -> Results:
        """Run the graph for each row; see ``Graph``."""
        lengths = np.asarray(feeds[self._lengths], np.int32)
        before = [feeds[state.input] for state in self.manifest.states]
        states: list[Sequence[Array]] = []
        outputs: list[Array] = []
        for row, length in enumerate(lengths):
            rows = np.array([row], np.intp)
            given, after = self._run_inside(feeds, before, rows, slice(0, int(length)), lengths[rows])
            states.append(after)
            outputs = outputs or self._room(given, len(lengths), int(lengths.max()))
            for spec, output, array in zip(self.manifest.outputs, outputs, given, strict=True):
                valid = (row,) if spec.time_axis is None else (row, slice(0, int(length)))
                _rows_first(output, spec)[valid] = _rows_first(array, spec)[0]
        together = zip(self.manifest.states, zip(*states, strict=True), strict=True)
        return outputs, [np.concatenate(arrays, state.batch_axis) for state, arrays in together]


def _rows_first(array: Array, spec: TensorSpec) -> Array:
    """View an array as [N, T, ...]; without a time axis, as [N, ...]."""
    if spec.time_axis is None:
        return np.moveaxis(array, spec.batch_axis, 0)
    return np.moveaxis(array, (spec.batch_axis, spec.time_axis), (0, 1))
