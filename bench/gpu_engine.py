"""Conveyor's engine alone: ticks of rows whose states stay where the model runs, without queue, sessions or grpc."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.gpu_cases import Case, Device
from bench.gpu_timing import Ticks
from service.loading import load_model
from service.pool import Pool
from service.settings import Settings


class Engine:
    """A model, loaded as the server loads it.

    Args:
        path: of its model.onnx.
        device: where it runs.
        threads: inside one run on the CPU.

    Raises:
        LoadError: if the device does not take it.
    """

    def __init__(self, path: Path, device: Device, threads: int) -> None:
        self._loaded = load_model(path, Settings(device=device), threads)

    def ticks(self, case: Case, copies: bool) -> Ticks:
        """Ticks of a shape, over and over.

        Args:
            case: the shape; its rows are those of as many slots.
            copies: whether x goes up in each tick, and y comes down.
        """
        graph = self._loaded.graph
        pool = Pool(graph.manifest.states, case.rows)
        slots = pool.allocate_many(case.rows)
        rows = np.arange(case.rows)
        x = np.random.default_rng(0).standard_normal((case.steps, case.rows, case.stack.input_size)).astype(np.float32)
        workspace = graph.workspace(case.rows, case.steps)
        if workspace.lengths is not None:
            workspace.lengths[:] = case.steps
        if (room := workspace.inputs[0]) is None:
            raise ValueError("the model takes any number of features")
        room[:] = x

        def launch() -> None:
            if copies:
                room[:] = x
            pool.gather(slots, workspace.states)
            _, states = workspace.run()
            pool.scatter(slots, rows, states)

        return Ticks(launch, lambda: None)
