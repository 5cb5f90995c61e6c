"""A graph of a few lines of NumPy, for tests in which runs are to fail, be held, or be looked into.

It adds up: y_t = s + x_0 + ... + x_t, and its state s is the last y. What a row should give is plain to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.manifest import Manifest, StateSpec, TensorSpec
from service.pool import Pool
from service.workspace import FedWorkspace

Array = NDArray[np.generic]

POISON = 666.0
"""What tests let the graph choke on."""


class Sums:
    """The graph.

    Attributes:
        digest: of no file.
        manifest: x [T, N] and lengths in, y [T, N] out, state s [N].
        runs: the rows of each run.
        before: called inside each run with its x.
    """

    def __init__(self) -> None:
        self.digest = ""
        self.manifest = Manifest(
            inputs=(TensorSpec(name="x", dtype="float64", shape=(None, None), batch_axis=1, time_axis=0),),
            lengths="lengths",
            outputs=(TensorSpec(name="y", dtype="float64", shape=(None, None), batch_axis=1, time_axis=0),),
            states=(StateSpec(name="s", input="s0", output="sT", dtype="float64", shape=(None,), batch_axis=0),),
            streamable=True,
        )
        self.runs: list[int] = []
        self.before: Callable[[Array], None] = lambda x: None

    def run(self, feeds: Mapping[str, Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Add up."""
        x, lengths = feeds["x"], feeds["lengths"]
        self.runs.append(x.shape[1])
        self.before(x)
        y = feeds["s0"] + np.cumsum(x, axis=0)
        return [y], [y[lengths.astype(np.intp) - 1, np.arange(len(lengths))]]

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> Pool:
        """States in this machine's memory."""
        return Pool(self.manifest.states, slots)

    def workspace(self, rows: int, steps: int) -> FedWorkspace:
        """Arrays that are handed to ``run``."""
        return FedWorkspace(self.manifest, rows, steps, self.run)
