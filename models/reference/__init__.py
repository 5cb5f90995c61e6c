"""The recurrent cells in NumPy, to be read beside a textbook and to be held against.

Owns what is true: every other implementation in the project is measured against this one, in float64. Batch-major
throughout: ``x[N, T, I]``, ``outputs[N, T, H]``, states [N, H]. Must not know torch, ONNX or the server.

Read ``cells`` first (the equations), then ``sequence`` (time and lengths), then ``model`` (layers and the head).
"""

from __future__ import annotations

from models.reference.cells import State, step
from models.reference.matrices import run_matrices
from models.reference.model import initial_states, run_layer, run_model, stack_states, unstack_states
from models.reference.sequence import run_sequence

__all__ = [
    "State",
    "initial_states",
    "run_layer",
    "run_matrices",
    "run_model",
    "run_sequence",
    "stack_states",
    "step",
    "unstack_states",
]
