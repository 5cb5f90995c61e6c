"""What a tick is filled into and what comes out of it: arrays in the graph's axes.

Owns which arrays a tick of so many rows and steps has, and their memory where it is used again. Must not know
sessions, slots or onnxruntime.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.manifest import Manifest, StateSpec, TensorSpec
from service.states.device import Mark
from service.states.memory import Reserved

Array = NDArray[np.generic]
Results = tuple[Sequence[Array], Any]
"""The outputs after a run, in the manifest's order and axes; and the states: those too, where they lie in arrays."""
Bind = Callable[[Mapping[str, Array], Mapping[str, Array]], Callable[[], None]]
"""Ties a graph's inputs and outputs, by name, to arrays, and returns the run that reads those and fills these."""

_LIMIT_BYTES = 64 << 20
_MOST_SHAPES = 128
_ALIGNMENT = 64


class Workspace(ABC):
    """The arrays of a tick: fill those that go in, and run.

    All of them, results too, are valid until it is released, or, where the graph has one tick under way at a time,
    until it is asked for its next workspace.

    Attributes:
        inputs: one an input of the manifest; None where the graph takes any number of features: put an array there.
        lengths: of the rows, [N]; None where the graph takes none.
        states: as the pool that belongs to the graph fills them in ``gather``.
        rows: how many run side by side.
    """

    inputs: list[Array | None]
    lengths: Array | None
    states: Any
    rows: int

    def start(self) -> Mark | None:
        """Begin the run, where it goes on by itself; elsewhere all of it is done by ``run``.

        Returns:
            When it is over; None where it has not begun.

        Raises:
            Exception: whatever the graph raises.
        """
        return None

    @abstractmethod
    def run(self) -> Results:
        """Run the graph on what the arrays hold, or wait for the end of the run that has begun.

        Raises:
            Exception: whatever the graph raises.
        """

    def release(self) -> None:
        """Nobody needs its arrays any more."""
        return


class _HostWorkspace(Workspace):
    """A workspace whose states are arrays, one a state, as it goes in."""

    def __init__(
        self, manifest: Manifest, rows: int, steps: int, empty: Callable[[Sequence[int], str], Array] = np.empty
    ) -> None:
        self._manifest = manifest
        self.rows = rows
        self.inputs = [
            None if None in spec.tail else empty(sizes(spec, rows, steps), spec.dtype) for spec in manifest.inputs
        ]
        self.lengths = None if manifest.lengths is None else empty([rows], manifest.lengths_dtype)
        self.states: list[Array] = [empty(sizes(state, rows, steps), state.dtype) for state in manifest.states]

    def _feeds(self) -> dict[str, Array]:
        manifest = self._manifest
        given = zip(manifest.inputs, self.inputs, strict=True)
        feeds = {spec.name: array for spec, array in given if array is not None}
        if manifest.lengths is not None and self.lengths is not None:
            feeds[manifest.lengths] = self.lengths
        return feeds | {state.input: array for state, array in zip(manifest.states, self.states, strict=True)}


class FedWorkspace(_HostWorkspace):
    """A workspace of memory of its own, for any graph.

    Args:
        manifest: of the graph.
        rows: N.
        steps: size of the time axis.
        run: takes the arrays by name.
    """

    def __init__(
        self, manifest: Manifest, rows: int, steps: int, run: Callable[[Mapping[str, Array]], Results]
    ) -> None:
        super().__init__(manifest, rows, steps)
        self._run = run

    def run(self) -> Results:
        """Hand the arrays to the graph."""
        return self._run(self._feeds())


class BoundWorkspaces:
    """Workspaces of a graph that reads and fills arrays in place. Those of all shapes lie in the same memory.

    Args:
        manifest: of the graph, of which ``bindable`` is true.
        bind: of the graph.
        limit_bytes: size of the memory.
        most: how many shapes are kept. Of more, those that have not been used for longest are made anew.
    """

    def __init__(
        self, manifest: Manifest, bind: Bind, limit_bytes: int = _LIMIT_BYTES, most: int = _MOST_SHAPES
    ) -> None:
        self._manifest = manifest
        self._bind = bind
        self._memory = Reserved(limit_bytes)
        self._most = most
        self._kept: OrderedDict[tuple[int, int], _Bound] = OrderedDict()

    def get(self, rows: int, steps: int) -> Workspace | None:
        """Return the workspace of a shape; None where the memory is too small for it."""
        shape = (rows, steps)
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape]
        try:
            made = _Bound(self._manifest, rows, steps, self._bind, _Cutter(self._memory.bytes))
        except MemoryError:
            return None
        self._kept[shape] = made
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return made


def bindable(manifest: Manifest) -> bool:
    """Whether all sizes but rows and steps are known before a run."""
    return not any(None in spec.tail for spec in (*manifest.inputs, *manifest.outputs))


class _Bound(_HostWorkspace):
    def __init__(self, manifest: Manifest, rows: int, steps: int, bind: Bind, cutter: _Cutter) -> None:
        super().__init__(manifest, rows, steps, cutter.empty)
        # As the graph's own sizes are told from its first input.
        steps = 1 if manifest.inputs[0].time_axis is None else steps
        absent = {x.name: x.absent for x in manifest.inputs} | {state.input: state.absent for state in manifest.states}
        feeds = {name: array.squeeze(absent.get(name, ())) for name, array in self._feeds().items()}
        results: dict[str, Array] = {}

        def result(name: str, spec: TensorSpec | StateSpec) -> Array:
            # A state may be served as an output too.
            if name not in results:
                results[name] = cutter.empty(sizes(spec, rows, steps), spec.dtype).squeeze(spec.absent)
            return np.expand_dims(results[name], spec.absent)

        self._outputs = [result(spec.name, spec) for spec in manifest.outputs]
        self._after = [result(state.output, state) for state in manifest.states]
        self._run = bind(feeds, results)

    def run(self) -> Results:
        self._run()
        return self._outputs, self._after


class _Cutter:
    """Cuts arrays from a piece of memory, one behind the other."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._left = memory

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._left):
            raise MemoryError
        piece, self._left = self._left[:size], self._left[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return piece.view(dtype).reshape(shape)


def sizes(spec: TensorSpec | StateSpec, rows: int, steps: int) -> list[int]:
    """Return a spec's shape with the free axes of rows and steps filled in."""
    time_axis = spec.time_axis if isinstance(spec, TensorSpec) else None
    free = {spec.batch_axis: rows, time_axis: steps}
    return [free[axis] if size is None else size for axis, size in enumerate(spec.shape)]
