"""A graph in onnxruntime, spoken to as the reference is: batch first, states as the model's list.

Owns the way from the reference's arrays to the graph's and back. Goes by the names and axes of the manifest, as the
server does, so that a manifest which does not fit is found out. Must not know what the results are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from export.describe import initial_state
from export.errors import ExportError
from export.signature import pack_states, state_tensors, unpack_states
from models.reference import State
from models.spec import ModelSpec
from models.weights import Array
from service.manifest import Manifest


@dataclass(frozen=True)
class Result:
    """What came out of one run: ``y[N, T, O]`` with zeros past a row's length, or ``y[N, O]``; and the final states."""

    y: Array
    states: list[State]


class Graph:
    """A loaded graph.

    Args:
        model: the file's bytes.
        manifest: what it says of itself.
        spec: what the model is made of.

    Raises:
        ExportError: onnxruntime cannot load the graph.
    """

    def __init__(self, model: bytes, manifest: Manifest, spec: ModelSpec) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds have no common base
            raise ExportError(f"onnxruntime refuses the graph: {error}") from error
        self.manifest = manifest
        self.tensors = state_tensors(spec)

    def run(self, x: Array, lengths: Array, states: Sequence[State]) -> Result:
        """Run over ``x[N, T, ...]`` from these states."""
        x_spec, y_spec = self.manifest.inputs[0], self.manifest.outputs[0]
        assert x_spec.time_axis is not None
        feed = {x_spec.name: np.moveaxis(x, (0, 1), (x_spec.batch_axis, x_spec.time_axis))}
        if self.manifest.lengths is not None:
            feed[self.manifest.lengths] = lengths.astype(np.int32)
        for state, array in zip(self.manifest.states, pack_states(self.tensors, states), strict=True):
            feed[state.input] = array.astype(state.dtype)
        names = [y_spec.name, *(state.output for state in self.manifest.states)]
        try:
            y, *final = self.session.run(names, feed)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the graph: {error}") from error
        if y_spec.time_axis is not None:
            y = np.moveaxis(y, (y_spec.batch_axis, y_spec.time_axis), (0, 1))
            y = np.where((np.arange(x.shape[1]) < lengths[:, None])[:, :, None], y, 0)
        return Result(y, unpack_states(self.tensors, final))

    def initial_states(self, N: int) -> list[State]:
        """The states that N rows start from by the manifest."""
        return unpack_states(self.tensors, [initial_state(state, N) for state in self.manifest.states])
