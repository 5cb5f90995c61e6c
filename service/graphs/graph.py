"""What runs a model: a graph that takes arrays by name and gives arrays back, and the pool that its states live in.

Must not know what is behind either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import LoadError
from service.graphs.workspace import Results, Workspace
from service.manifest import Manifest, StateSpec, TensorSpec

Array = NDArray[np.generic]


class StatePool(Protocol):
    """Slots for the states of rows. A slot belongs to one caller at a time; taking and giving back is for any thread.

    Attributes:
        in_flight: how many ticks may be under way at once, between their ``gather`` and their ``scatter``.
        taken: how many slots are in use.
    """

    in_flight: int

    @property
    def taken(self) -> int:
        """How many slots are in use."""

    def settle_in(self) -> str:
        """Do once what there is to do in the thread in which ticks run, before anybody else uses the pool.

        Returns:
            What has come of it, for people; empty if there was nothing to do.
        """

    def allocate(self, states: Sequence[Array] | int | None = None) -> int:
        """Take a slot, with the states that are given, or those of another slot, or the initial ones.

        Raises:
            Full: if too many are taken.
        """

    def allocate_many(self, count: int) -> NDArray[np.intp]:
        """Take slots with the initial states, all or none.

        Raises:
            Full: if too many would be taken.
        """

    def reserve_many(self, count: int) -> NDArray[np.intp]:
        """Take slots, all or none, to be scattered to before anything is read of them.

        Raises:
            Full: if too many would be taken.
        """

    def free(self, slot: int) -> None:
        """Give a slot back."""

    def free_many(self, slots: NDArray[np.intp]) -> None:
        """Give slots back."""

    def read(self, slot: int) -> list[Array]:
        """Copy a slot's states out, each without the batch axis. From a device that takes a while."""

    def read_many(self, slots: Sequence[int]) -> list[list[Array]]:
        """Copy the states of slots out, as ``read`` does; all of them take about as long as one."""

    def write(self, slot: int, states: Sequence[Array]) -> None:
        """Set a slot's states, each given without the batch axis."""

    def reset(self, slot: int) -> None:
        """Put a slot back to the initial states."""

    def gather(self, slots: NDArray[np.intp], out: Any) -> Any:
        """Have a tick's rows begin in the states of slots; ``out`` are the ``states`` of its workspace."""

    def scatter(self, slots: NDArray[np.intp], rows: NDArray[np.intp], states: Any) -> None:
        """End a tick that succeeded: ``slots[k]`` has the states that ``rows[k]`` has after it; ``rows`` ascends."""

    def abandon(self, states: Any) -> None:
        """End a tick that came to nothing; no slot has other states than before."""

    def by_age(self, slots: Sequence[int]) -> list[int]:
        """Return the indices of slots from those that were taken first to those that were taken last."""


class Graph(Protocol):
    """A graph, ready to run. Whoever calls ``run`` does so from one thread at a time."""

    @property
    def manifest(self) -> Manifest:
        """What the graph says of itself."""

    @property
    def digest(self) -> str:
        """What tells the graph's file from any other."""

    def run(self, feeds: Mapping[str, Array]) -> Results:
        """Run it once.

        Args:
            feeds: every input by name, in the axes of the manifest.

        Returns:
            The outputs and the states after the run, each in the manifest's order and axes.
        """

    def workspace(self, rows: int, steps: int) -> Workspace:
        """Return arrays to fill for a run of so many rows and steps; see ``Workspace`` for how long they are valid."""

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> StatePool:
        """Return the pool that its workspaces take states from.

        Args:
            slots: most that may be taken at once.
            tick_rows: most rows of a tick.
            count: told of states that are copied between the host and a device: ``up`` or ``down``, and the bytes.

        Raises:
            LoadError: if there is no memory for so many.
        """


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph, as its file has it.

    Attributes:
        dtype: as numpy calls it; one that numpy lacks, or no tensor at all, as onnxruntime calls it.
        shape: the size of each axis; None for an axis that takes any. Of an output whose axes the file does not say
            it is empty, as that of a scalar.
    """

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs that a graph must be given, its outputs, and the inputs that have a value without being given one."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    optional: Mapping[str, Port] = field(default_factory=dict)

    def leaves_sizes_open(self, manifest: Manifest) -> bool:
        """Whether no result has a size in the file where the manifest lets it vary, as what is bound has to be."""
        for name, spec in _results(manifest):
            shapes = zip(_port(spec, manifest).shape, self.outputs[name].shape, strict=False)
            if any(want is None and have is not None for want, have in shapes):
                return False
        return True

    def check(self, manifest: Manifest) -> None:
        """Hold a manifest against it: same names, dtypes and fixed sizes.

        Raises:
            LoadError: if they disagree.
        """
        inputs = {spec.name: _port(spec, manifest) for spec in manifest.inputs}
        inputs |= {spec.input: _port(spec, manifest) for spec in manifest.states}
        inputs |= {one.name: Port(one.dtype, one.shape) for one in manifest.constants}
        if manifest.lengths is not None:
            inputs[manifest.lengths] = Port(manifest.lengths_dtype, (manifest.rows_per_run,))
        outputs = [(name, _port(spec, manifest)) for name, spec in _results(manifest)]
        if missing := sorted(self.inputs.keys() - inputs.keys()):
            raise LoadError(f"the graph's inputs {missing} are not in its manifest")
        takes = {**self.optional, **self.inputs}
        for kind, want, have in (("input", inputs.items(), takes), ("output", outputs, self.outputs)):
            for name, port in want:
                if name not in have:
                    raise LoadError(f"the manifest's {kind} {name!r} is not in the graph, which has {sorted(have)}")
                dtype, shape = have[name].dtype, have[name].shape
                if dtype != port.dtype:
                    raise LoadError(f"{kind} {name!r} is {port.dtype} in the manifest and {dtype} in the graph")
                if kind == "output" and not shape:
                    continue  # its axes are not in the file
                # What the graph gives may have axes it has no size for; those the manifest fixes. Where the manifest
                # has none, the graph's is that of the example it was exported with: each run's are checked.
                if len(shape) != len(port.shape) or any(
                    a is not None and a != b and (kind == "input" or b is not None)
                    for a, b in zip(shape, port.shape, strict=True)
                ):
                    raise LoadError(f"{kind} {name!r} has shape {port.shape} in the manifest and {shape} in the graph")


def _results(manifest: Manifest) -> list[tuple[str, TensorSpec | StateSpec]]:
    """What a graph gives, by its own names."""
    return [*((y.name, y) for y in manifest.outputs), *((state.output, state) for state in manifest.states)]


def _port(spec: TensorSpec | StateSpec, manifest: Manifest) -> Port:
    """What a graph has that is presented so: no axes that it lacks, one row or step where it takes one."""
    sizes = dict(enumerate(spec.shape))
    sizes[spec.batch_axis] = manifest.rows_per_run
    if isinstance(spec, TensorSpec) and spec.time_axis is not None:
        sizes[spec.time_axis] = manifest.steps_per_run
    return Port(spec.dtype, tuple(size for axis, size in sizes.items() if axis not in spec.absent))
