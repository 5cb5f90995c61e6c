"""Hold a graph against the reference, and against itself cut and batched otherwise.

Owns what is compared, with which data, and how an error is measured. Must not know torch or how a graph is made.

The graph runs in onnxruntime on the CPU, the reference in NumPy in float64 with the weights it is given. An error is
the absolute difference where the reference lies within [-1, 1], and the difference relative to the reference where it
is greater. Outputs of a head are sums that cancel, so theirs is relative to the largest of the step's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from export.describe import initial_state
from export.errors import ExportError
from export.signature import pack_states, state_tensors, unpack_states
from models.reference import State, run_model
from models.spec import ModelSpec
from models.weights import Array, Weights
from service.manifest import Manifest, Parity, ParityRow

BATCHES = (1, 2, 7)
STEPS = (1, 2, 33)
CUTS = (1, 2, 3, 12)
"""Where sequences are cut into chunks: chunks of 1, 1, 1, 9 and 21 steps of 33."""


@dataclass(frozen=True)
class Result:
    """What came out of one run: ``y[N, T, O]`` with zeros past a row's length, or ``y[N, O]``; and the final states."""

    y: Array
    states: list[State]


class Graph:
    """A graph in onnxruntime, spoken to as the reference is: batch first, states as the model's list.

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

    def run(self, x: Array, lengths: Array, states: Sequence[State] | None) -> Result:
        """Run over ``x[N, T, ...]``; states None for the manifest's own."""
        N, T = x.shape[:2]
        packed = (
            [initial_state(state, N) for state in self.manifest.states]
            if states is None
            else pack_states(self.tensors, states)
        )
        feed = {"x": x.swapaxes(0, 1), "lengths": lengths.astype(np.int32)}
        for state, array in zip(self.manifest.states, packed, strict=True):
            feed[state.input] = array.astype(state.dtype)
        names = [*(output.name for output in self.manifest.outputs), *(state.output for state in self.manifest.states)]
        try:
            y, *final = self.session.run(names, feed)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the graph: {error}") from error
        if self.manifest.head_on == "every":
            y = y.swapaxes(0, 1)
            y = np.where((np.arange(T) < lengths[:, None])[:, :, None], y, 0)
        return Result(y, unpack_states(self.tensors, final))


@dataclass(frozen=True)
class Verification:
    """One model file about to be held against its reference.

    Attributes:
        graph: the graph.
        spec: what the reference is made of.
        weights: the reference's weights.
        bound: what every error must stay under.
    """

    graph: Graph
    spec: ModelSpec
    weights: Weights
    bound: float

    def rows(self, data: tuple[Array, Array] | None = None) -> Iterator[ParityRow]:
        """Run everything there is to compare, one row after the other.

        Args:
            data: given sequences, ``x[N, T, ...]`` and their lengths, beside the random ones.
        """
        for N in BATCHES:
            for T in STEPS:
                yield from self._random(N, T, np.random.default_rng([N, T]))
        if data is not None:
            x, lengths = data
            x = x.astype(self.graph.manifest.inputs[0].dtype)
            yield self._row("given data", x, self.graph.run(x, lengths, None), self._reference(x, lengths, None))

    def _random(self, N: int, T: int, random: np.random.Generator) -> Iterator[ParityRow]:
        x, full = self._inputs(N, T, random), np.full(N, T)
        yield self._row("random", x, self.graph.run(x, full, None), self._reference(x, full, None))
        states = self._states(N, random)
        whole = self.graph.run(x, full, states)
        yield self._row("random, from a state", x, whole, self._reference(x, full, states))
        if T == 1:
            return
        if self.spec.streamable:
            yield self._row("whole against chunked", x, self._chunked(x, states), whole)
        ragged = random.integers(1, T + 1, N)
        ragged[0] = T - 1  # so that one row at least is shorter than the batch
        batched = self.graph.run(x, ragged, states)
        yield self._row("random, ragged", x, batched, self._reference(x, ragged, states))
        if N > 1:
            yield self._row("alone against batched", x, self._alone(x, ragged, states), batched)

    def _inputs(self, N: int, T: int, random: np.random.Generator) -> Array:
        if self.spec.vocabulary_size is not None:
            return random.integers(0, self.spec.vocabulary_size, (N, T))
        x = random.standard_normal((N, T, self.spec.layers[0].input_size))
        return x.astype(self.graph.manifest.inputs[0].dtype)

    def _states(self, N: int, random: np.random.Generator) -> list[State]:
        dtype = self.graph.manifest.states[0].dtype
        return [
            tuple(random.uniform(-1, 1, (N, layer.hidden_size)).astype(dtype) for _ in range(1 + layer.has_cell_state))
            for layer in self.spec.layers
            for _ in range(layer.directions)
        ]

    def _reference(self, x: Array, lengths: Array, states: Sequence[State] | None) -> Result:
        exact = None if states is None else [tuple(part.astype(np.float64) for part in state) for state in states]
        x = x if self.spec.vocabulary_size is not None else x.astype(np.float64)
        return Result(*run_model(self.spec, self.weights, x, lengths, exact))

    def _chunked(self, x: Array, states: Sequence[State]) -> Result:
        outputs = []
        for chunk in np.split(x, [cut for cut in CUTS if cut < x.shape[1]], axis=1):
            result = self.graph.run(chunk, np.full(len(chunk), chunk.shape[1]), states)
            outputs.append(result.y)
            states = result.states
        return Result(np.concatenate(outputs, axis=1) if self.spec.head_on == "every" else outputs[-1], list(states))

    def _alone(self, x: Array, lengths: Array, states: Sequence[State]) -> Result:
        every = self.spec.head_on == "every"
        y = np.zeros((*(x.shape[:2] if every else x.shape[:1]), self.spec.output_size))
        final = [tuple(np.zeros(part.shape) for part in state) for state in states]
        for row, length in enumerate(lengths):
            own = [tuple(part[row : row + 1] for part in state) for state in states]
            result = self.graph.run(x[row : row + 1, :length], lengths[row : row + 1], own)
            y[(row, slice(length)) if every else row] = result.y[0]
            for state, after in zip(final, result.states, strict=True):
                for part, value in zip(state, after, strict=True):
                    part[row] = value[0]
        return Result(y, final)

    def _row(self, case: str, x: Array, got: Result, expected: Result) -> ParityRow:
        scale = np.abs(expected.y).max(-1, keepdims=True) if self.spec.head_size is not None else np.abs(expected.y)
        states = [
            largest_error(after, exact, np.abs(exact))
            for pair in zip(got.states, expected.states, strict=True)
            for after, exact in zip(*pair, strict=True)
        ]
        return ParityRow(
            case=case,
            batch=x.shape[0],
            steps=x.shape[1],
            outputs=largest_error(got.y, expected.y, scale),
            states=max(states),
            bound=self.bound,
        )


def largest_error(got: Array, expected: Array, scale: Array) -> float:
    """The largest ``|got - expected| / max(1, scale)``; infinite where anything is not finite.

    Raises:
        ExportError: the shapes differ.
    """
    if got.shape != expected.shape:
        raise ExportError(f"the graph gave shape {got.shape}, expected {expected.shape}")
    if not got.size:
        return 0.0
    errors = np.abs(got.astype(np.float64) - expected) / np.maximum(1, scale)
    return float(np.where(np.isfinite(errors), errors, np.inf).max())


def to_parity(rows: Sequence[ParityRow]) -> Parity:
    """The rows as the manifest records them."""
    provider = f"CPUExecutionProvider, onnxruntime {onnxruntime.__version__}"
    return Parity(reference="NumPy float64", provider=provider, rows=tuple(rows))
