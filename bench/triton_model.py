"""What Triton runs: its Python backend around the same graph, batching what the sequence batcher hands over.

Runs inside Triton's own Python, with NumPy and onnxruntime and nothing of this project; ``graph.json`` beside it names
the graph's inputs and outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # type: ignore[import-not-found]


class TritonPythonModel:
    """States in a dict, by sequence; one run of the graph for all requests of a batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph."""
        folder = Path(__file__).parent
        self.names = json.loads((folder / "graph.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.names["threads"]
        self.session = onnxruntime.InferenceSession(
            str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.states: dict[int, list[Any]] = {}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Step each request's sequence once."""
        names = self.names
        rows = len(requests)
        x = np.concatenate([_input(request, "x") for request in requests], axis=1)
        sequences = [int(_input(request, "CORRID").ravel()[0]) for request in requests]
        states = [np.zeros((layers, rows, hidden), np.float32) for layers, hidden in names["state_shapes"]]
        for row, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
            if not _input(request, "START").ravel()[0]:
                for state, kept in zip(states, self.states[sequence], strict=True):
                    state[:, row] = kept
        feeds = {names["x"]: x} | dict(zip(names["state_inputs"], states, strict=True))
        if names["lengths"] is not None:
            feeds[names["lengths"]] = np.ones(rows, np.int32)
        y, *states = self.session.run([names["y"], *names["state_outputs"]], feeds)
        replies = []
        for row, sequence in enumerate(sequences):
            self.states[sequence] = [state[:, row].copy() for state in states]
            replies.append(triton.InferenceResponse([triton.Tensor("y", np.ascontiguousarray(y[:, row][None]))]))
        return replies


def _input(request: Any, name: str) -> Any:
    return triton.get_input_tensor_by_name(request, name).as_numpy()
