"""Conveyor's engine alone: ticks of rows whose states stay where the model runs, without queue, sessions or grpc."""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.gpu_cases import Case, Device
from bench.gpu_timing import Ticks
from service.engines.resident_engine import ResidentEngine
from service.engines.resident_workspace import ResidentWorkspace
from service.graphs.graph import Graph
from service.graphs.workspace import Workspace
from service.settings import Settings
from service.states.device import HostDevice
from service.versions.loading import load_model

Slots = NDArray[np.intp]


class Engine:
    """A model, loaded as the server loads it. It runs the ticks of one shape at a time.

    Args:
        path: of its model.onnx.
        device: where it runs.
        threads: inside one run on the CPU.
        rows: most of a tick.
        stand_in: whether the CPU stands in for a GPU: the file for CUDA, and the code that has states on a device.

    Raises:
        LoadError: if the device does not take it, or has no memory for the states.
    """

    def __init__(self, path: Path, device: Device, threads: int, rows: int, stand_in: bool = False) -> None:
        self._graph: Graph
        if stand_in:
            own = path.with_name(f"{path.stem}.cuda{path.suffix}")
            self._graph = ResidentEngine(own if own.is_file() else path, HostDevice(), threads)
        else:
            self._graph = load_model(path, Settings(device=device, cuda_graphs="on"), threads).graph
        self._pool = self._graph.pool(2 * rows, rows, lambda way, size: None)
        # Which ticks run as captured graphs is tried out here, as in the server.
        self._pool.settle_in()
        self._taken: list[Slots] = []
        self._flying: deque[tuple[Workspace, Slots]] = deque()

    def ticks(self, case: Case, copies: bool) -> Ticks:
        """Ticks of a shape, over and over, until others are asked for.

        Args:
            case: the shape.
            copies: whether x goes up in each tick and y comes down, as in the server; without, nothing is copied
                between host and device, and each tick does the same again.
        """
        self._clear()
        return self._served(case) if copies else self._on_device(case)

    def _served(self, case: Case) -> Ticks:
        """As a runner has them: as many under way as the pool allows, each of other sessions than the one before."""
        pool = self._pool
        turns = deque(self._take(case.rows) for _ in range(pool.in_flight))
        x = _draw(case)

        def launch() -> None:
            if len(self._flying) == pool.in_flight:
                self._settle()
            slots = turns[0]
            turns.rotate()
            workspace = self._graph.workspace(case.rows, case.steps)
            self._flying.append((workspace, slots))
            _fill(workspace, case, x)
            pool.gather(slots, workspace.states)
            workspace.start()

        def wait() -> None:
            while self._flying:
                self._settle()

        return Ticks(launch, wait)

    def _on_device(self, case: Case) -> Ticks:
        """One tick's arrays, filled once and run over and over."""
        workspace = self._graph.workspace(case.rows, case.steps)
        slots = self._take(case.rows)
        self._flying.append((workspace, slots))
        _fill(workspace, case, _draw(case))
        self._pool.gather(slots, workspace.states)
        if not isinstance(workspace, ResidentWorkspace):
            return Ticks(workspace.run, lambda: None)
        workspace.start()
        workspace.run()
        device = workspace.device
        return Ticks(workspace.compute, lambda: device.runs.mark().wait())

    def _take(self, rows: int) -> Slots:
        self._taken.append(self._pool.allocate_many(rows))
        return self._taken[-1]

    def _settle(self) -> None:
        workspace, slots = self._flying.popleft()
        try:
            _, states = workspace.run()
            self._pool.scatter(slots, np.arange(len(slots)), states)
        finally:
            workspace.release()

    def _clear(self) -> None:
        """Give back what the ticks before have taken, those that failed too."""
        while self._flying:
            with contextlib.suppress(Exception):
                self._settle()
        while self._taken:
            self._pool.free_many(self._taken.pop())


def _draw(case: Case) -> NDArray[np.float32]:
    shape = case.steps, case.rows, case.stack.input_size
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _fill(workspace: Workspace, case: Case, x: NDArray[np.float32]) -> None:
    room = workspace.inputs[0]
    assert room is not None
    room[:] = x
    if workspace.lengths is not None:
        workspace.lengths[:] = case.steps
