"""A graph that adds up, for tests in which runs are to fail, be held, or be looked into.

y_t = s + x_0 + ... + x_t, and its state s is the last y. What a row should give is plain to see. There are two of it: a
few lines of NumPy, with its states in this machine's memory; and an ONNX graph, with its states on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from service.engines.resident_engine import ResidentEngine
from service.engines.resident_workspace import ResidentWorkspace
from service.graphs.workspace import FedWorkspace
from service.manifest import METADATA_KEY, Manifest, StateSpec, TensorSpec
from service.states.device import Device, HostDevice
from service.states.pool import Pool

Array = NDArray[np.generic]

POISON = 666.0
"""What tests let the graph choke on."""
MANIFEST = Manifest(
    inputs=(TensorSpec(name="x", dtype="float64", shape=(None, None), batch_axis=1, time_axis=0),),
    lengths="lengths",
    outputs=(TensorSpec(name="y", dtype="float64", shape=(None, None), batch_axis=1, time_axis=0),),
    states=(StateSpec(name="s", input="s0", output="sT", dtype="float64", shape=(None,), batch_axis=0),),
    streamable=True,
)
"""x [T, N] and lengths in, y [T, N] out, state s [N]."""
_GRAPH = """sums (double[T, N] x, int32[N] lengths, double[N] s0) => (double[T, N] y, double[N] sT)
<int64 zero = {0}, int32[1] one = {1}, int64[1] front = {0}> {
    sum = CumSum(x, zero)
    y = Add(sum, s0)
    last = Sub(lengths, one)
    row = Unsqueeze(last, front)
    found = GatherElements<axis = 0>(y, row)
    sT = Squeeze(found, front)
}"""


class Sums:
    """The graph in NumPy.

    Attributes:
        digest: of no file.
        manifest: of it.
        runs: the rows of each run.
        before: called inside each run with its x.
    """

    def __init__(self) -> None:
        self.digest = ""
        self.manifest = MANIFEST
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


class ResidentSums(ResidentEngine):
    """The same graph, with its states on a device.

    Attributes:
        runs: the rows of each run.
        before: called before each run with its x.
    """

    def __init__(self, folder: Path, device: Device | None = None) -> None:
        path = folder / "sums.onnx"
        write_sums(path)
        super().__init__(path, device or HostDevice())
        self.runs: list[int] = []
        self.before: Callable[[Array], None] = lambda x: None

    def workspace(self, rows: int, steps: int) -> ResidentWorkspace:
        """The arrays of a tick, which say that it starts."""
        workspace = super().workspace(rows, steps)
        compute = type(workspace).compute

        def told() -> None:
            self.runs.append(rows)
            (x,) = workspace.inputs
            assert x is not None
            self.before(x)
            compute(workspace)

        workspace.compute = told  # type: ignore[method-assign]
        return workspace


def write_sums(path: Path) -> None:
    """Write the graph into a file."""
    model: Any = helper.make_model(
        onnx.parser.parse_graph(_GRAPH), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    helper.set_model_props(model, {METADATA_KEY: MANIFEST.model_dump_json()})
    onnx.save(model, path)
