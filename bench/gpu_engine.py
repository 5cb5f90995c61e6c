"""Conveyor's engine alone: ticks of rows whose states stay where the model runs, without queue, sessions or grpc."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np

from bench.gpu_cases import Case, Device
from bench.gpu_timing import Ticks
from service.device import HostDevice
from service.graph import Graph
from service.loading import load_model
from service.resident_engine import ResidentEngine
from service.resident_workspace import ResidentWorkspace
from service.settings import Settings
from service.workspace import Workspace


class Engine:
    """A model, loaded as the server loads it.

    Args:
        path: of its model.onnx.
        device: where it runs.
        threads: inside one run on the CPU.
        stand_in: whether the CPU stands in for a GPU: the file for CUDA, and the code that has states on a device.

    Raises:
        LoadError: if the device does not take it.
    """

    def __init__(self, path: Path, device: Device, threads: int, stand_in: bool = False) -> None:
        self._graph: Graph
        if stand_in:
            own = path.with_name(f"{path.stem}.cuda{path.suffix}")
            self._graph = ResidentEngine(own if own.is_file() else path, HostDevice(), threads)
        else:
            self._graph = load_model(path, Settings(device=device), threads).graph

    def ticks(self, case: Case, copies: bool) -> Ticks:
        """Ticks of a shape, over and over.

        Args:
            case: the shape.
            copies: whether x goes up in each tick and y comes down, as in the server; without, nothing is copied
                between host and device, and each tick does the same again.

        Raises:
            LoadError: if there is no memory for the states.
        """
        return self._served(case) if copies else self._on_device(case)

    def _served(self, case: Case) -> Ticks:
        """As a runner has them: as many under way as the pool allows, each of other sessions than the one before."""
        pool = self._graph.pool(2 * case.rows, case.rows, lambda way, size: None)
        turns = deque(pool.allocate_many(case.rows) for _ in range(pool.in_flight))
        rows = np.arange(case.rows)
        x = _draw(case)
        flying: deque[tuple[Workspace, np.ndarray[tuple[int], np.dtype[np.intp]]]] = deque()

        def settle() -> None:
            workspace, slots = flying.popleft()
            _, states = workspace.run()
            pool.scatter(slots, rows, states)
            workspace.release()

        def launch() -> None:
            if len(flying) == pool.in_flight:
                settle()
            slots = turns[0]
            turns.rotate()
            workspace = self._graph.workspace(case.rows, case.steps)
            _fill(workspace, case, x)
            pool.gather(slots, workspace.states)
            workspace.start()
            flying.append((workspace, slots))

        def wait() -> None:
            while flying:
                settle()

        return Ticks(launch, wait)

    def _on_device(self, case: Case) -> Ticks:
        """One tick's arrays, filled once and run over and over."""
        pool = self._graph.pool(case.rows, case.rows, lambda way, size: None)
        workspace = self._graph.workspace(case.rows, case.steps)
        _fill(workspace, case, _draw(case))
        pool.gather(pool.allocate_many(case.rows), workspace.states)
        if not isinstance(workspace, ResidentWorkspace):
            return Ticks(workspace.run, lambda: None)
        workspace.start()
        workspace.run()
        device = workspace.device
        return Ticks(workspace.compute, lambda: device.mark().wait())


def _draw(case: Case) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    shape = case.steps, case.rows, case.stack.input_size
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _fill(workspace: Workspace, case: Case, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    room = workspace.inputs[0]
    assert room is not None
    room[:] = x
    if workspace.lengths is not None:
        workspace.lengths[:] = case.steps
