"""The memory of a tick on a device: what goes up lies together, and what comes down, here as there.

Owns where each tensor lies. Must not know in which order copies and runs happen, or for which tick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.resident_graph import ResidentGraph
from service.graphs.resident import AFTER, BEFORE
from service.graphs.workspace import sizes
from service.manifest import TensorSpec
from service.states.device import Buffer, Device, Stream

Array = NDArray[Any]
Shape = tuple[int, ...]

_ALIGNMENT = 256
"""Bytes, as CUDA's own allocations have it."""


@dataclass(frozen=True, slots=True)
class Tensor:
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


Layout = dict[str, tuple[Shape, Shape, str]]
"""How each tensor lies in memory, how the graph sees it in one run, and its dtype."""


class Area:
    """Memory here, and as much on the device; what is copied goes to the same place."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self._here = device.staging(size)
        self._there = device.empty((size,), "uint8")

    def cut(self, layout: Layout) -> dict[str, Tensor]:
        """Lay tensors into it, one behind the other."""
        tensors = {}
        start = 0
        for name, (lying, shape, dtype) in layout.items():
            size = math.prod(lying) * np.dtype(dtype).itemsize
            here = self._here[start : start + size].view(dtype).reshape(lying)
            here[:] = 0
            tensors[name] = Tensor(here, self._there.part(start, lying, dtype), shape)
            start += _aligned(size)
        return tensors

    def upload(self, stream: Stream, size: int) -> None:
        """Copy as many bytes there."""
        stream.upload(self._here[:size], self._there.part(0, (size,), "uint8"))

    def download(self, stream: Stream, size: int) -> None:
        """Copy as many bytes here."""
        stream.download(self._there.part(0, (size,), "uint8"), self._here[:size])


def layouts(graph: ResidentGraph, rows: int, steps: int) -> tuple[Layout, Layout]:
    """Return what goes up for a tick of so many rows and steps, and what comes down."""
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


def presented(lying: Array, spec: TensorSpec, graph: ResidentGraph) -> Array:
    """A tensor in the manifest's axes."""
    return np.moveaxis(lying, 0, spec.time_axis) if graph.stepped and spec.time_axis is not None else lying


def bytes_of(layout: Layout) -> int:
    """Return how much memory it takes."""
    return sum(_aligned(math.prod(lying) * np.dtype(dtype).itemsize) for lying, _, dtype in layout.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
