"""What runs a model: a graph that takes arrays by name and gives arrays back. Must not know what is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.manifest import Manifest

Array = NDArray[np.generic]


class Graph(Protocol):
    """A graph, ready to run. Whoever calls ``run`` does so from one thread at a time."""

    @property
    def manifest(self) -> Manifest:
        """What the graph says of itself."""

    @property
    def digest(self) -> str:
        """What tells the graph's file from any other."""

    def run(self, feeds: Mapping[str, Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Run it once.

        Args:
            feeds: every input by name, in the axes of the manifest.

        Returns:
            The outputs and the states after the run, each in the manifest's order and axes.
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
