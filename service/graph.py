"""What runs a model: a graph that takes arrays by name and gives arrays back. Must not know what is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
