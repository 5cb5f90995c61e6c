"""Hold a graph against the reference, and against itself cut and batched otherwise.

Owns what is compared, with which data, and how an error is measured and judged. Must not know torch or how a graph is
made.

The graph runs in onnxruntime on the CPU, the reference in NumPy in float64 with the weights it is given. An error is
the absolute difference where the reference lies within [-1, 1], and the difference relative to the reference where it
is greater. Outputs of a head are sums that cancel, so theirs is relative to the largest of the step's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnxruntime

from export.errors import ExportError, VerificationFailed
from export.runtime import Graph, Result
from models.reference import State, run_model
from models.spec import ModelSpec
from models.weights import Array, Weights
from service.manifest import Parity, ParityRow

BATCHES = (1, 2, 7)
STEPS = (1, 2, 33)
CUTS = (1, 2, 3, 12)
"""Where sequences are cut into chunks: chunks of 1, 1, 1, 9 and 21 steps of 33."""

AGAINST_CPU = "against the CPU's form, ragged"
"""The case in which two graphs of one model are compared, and none with the reference."""

Piece = tuple[Array, int, int]
"""Some rows of a batch, and the steps that are run of them: from one, up to another."""


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

    def rows(self, data: tuple[Array, Array] | None = None, other: Graph | None = None) -> Iterator[ParityRow]:
        """Run everything there is to compare, one row after the other.

        Args:
            data: given sequences, ``x[N, T, ...]`` and their lengths, beside the random ones.
            other: the same model in the form for the CPU.
        """
        for N in BATCHES:
            for T in STEPS:
                yield from self._random(N, T, np.random.default_rng([N, T]))
                if other is not None:
                    yield self._against(other, N, T, np.random.default_rng([N, T]))
        if data is not None:
            yield from self._given(*data)

    def _random(self, N: int, T: int, random: np.random.Generator) -> Iterator[ParityRow]:
        x, full, states = self._inputs(N, T, random), np.full(N, T), self._states(N, random)
        start = self.graph.run(x, full, self.graph.initial_states(N))
        yield self._row("random", x, start, self._reference(x, full, None))
        whole = self.graph.run(x, full, states)
        yield self._row("random, from a state", x, whole, self._reference(x, full, states))
        if T == 1:
            return
        if self.spec.streamable:
            yield self._row("whole against chunked", x, self._in_pieces(x, full, states, chunks(full)), whole)
        ragged = random.integers(1, T + 1, N)
        ragged[0] = T - 1  # so that one row at least is shorter than the batch
        batched = self.graph.run(x, ragged, states)
        yield self._row("random, ragged", x, batched, self._reference(x, ragged, states))
        if N > 1:
            yield self._row("alone against batched", x, self._in_pieces(x, ragged, states, rows(ragged)), batched)

    def _against(self, other: Graph, N: int, T: int, random: np.random.Generator) -> ParityRow:
        x, lengths, states = self._inputs(N, T, random), random.integers(1, T + 1, N), self._states(N, random)
        result, expected = self.graph.run(x, lengths, states), other.run(x, lengths, states)
        # Each may be off by the bound, on either side of what is exact.
        return compare(AGAINST_CPU, self.spec, x, result, expected, min(1.0, 2 * self.bound))

    def _given(self, x: Array, lengths: Array) -> Iterator[ParityRow]:
        x, states = x.astype(self.graph.manifest.inputs[0].dtype), self.graph.initial_states(len(x))
        whole = self.graph.run(x, lengths, states)
        yield self._row("given data", x, whole, self._reference(x, lengths, None))
        if self.spec.streamable and lengths.max() > 1:
            chunked = self._in_pieces(x, lengths, states, chunks(lengths))
            yield self._row("given data, whole against chunked", x, chunked, whole)
        if len(x) > 1:
            alone = self._in_pieces(x, lengths, states, rows(lengths))
            yield self._row("given data, alone against batched", x, alone, whole)

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

    def _in_pieces(self, x: Array, lengths: Array, states: Sequence[State], pieces: Iterable[Piece]) -> Result:
        """Run one piece after the other, each from the states that its rows have by then."""
        every = self.spec.head_on == "every"
        y = np.zeros((*(x.shape[:2] if every else x.shape[:1]), self.spec.output_size))
        final = [tuple(part.astype(np.float64) for part in state) for state in states]
        for here, start, stop in pieces:
            left = np.minimum(lengths[here], stop) - start
            result = self.graph.run(x[here, start:stop], left, [tuple(part[here] for part in state) for state in final])
            y[(here, slice(start, stop)) if every else here] = result.y
            for state, after in zip(final, result.states, strict=True):
                for part, value in zip(state, after, strict=True):
                    part[here] = value
        return Result(y, final)

    def _row(self, case: str, x: Array, got: Result, expected: Result) -> ParityRow:
        return compare(case, self.spec, x, got, expected, self.bound)


def chunks(lengths: Array) -> Iterator[Piece]:
    """All rows cut at ``CUTS``; a row that has ended by then is in no further piece."""
    T = int(lengths.max())
    for start, stop in pairwise([0, *(cut for cut in CUTS if cut < T), T]):
        yield np.flatnonzero(lengths > start), start, stop


def rows(lengths: Array) -> Iterator[Piece]:
    """Each row by itself."""
    for row, length in enumerate(lengths):
        yield np.array([row]), 0, int(length)


def compare(case: str, spec: ModelSpec, x: Array, got: Result, expected: Result, bound: float) -> ParityRow:
    """The largest errors between two results.

    Args:
        case: what is compared.
        spec: what the model is made of.
        x: what it was run over, ``[N, T, ...]``.
        got: what is judged.
        expected: what it is held against.
        bound: what both errors must stay under.

    Raises:
        ExportError: the shapes differ.
    """
    scale = np.abs(expected.y).max(-1, keepdims=True) if spec.head_size is not None else np.abs(expected.y)
    states = [
        largest_error(after, exact, np.abs(exact))
        for pair in zip(got.states, expected.states, strict=True)
        for after, exact in zip(*pair, strict=True)
    ]
    outputs = largest_error(got.y, expected.y, scale)
    N, T = x.shape[:2]
    return ParityRow(case=case, batch=N, steps=T, outputs=outputs, states=max(states), bound=bound)


def largest_error(got: Array, expected: Array, scale: Array) -> float:
    """The largest ``|got - expected| / max(1, scale)``; infinite where anything is not finite.

    Raises:
        ExportError: the shapes differ.
    """
    if got.shape != expected.shape:
        raise ExportError(f"got shape {got.shape}, expected {expected.shape}")
    if not got.size:
        return 0.0
    errors = np.abs(got.astype(np.float64) - expected) / np.maximum(1, scale)
    return float(np.where(np.isfinite(errors), errors, np.inf).max())


def check_bound(bound: float) -> None:
    """See whether a bound bounds anything: an error of 1 is as large as the largest state there is.

    Raises:
        ExportError: it does not.
    """
    if not 0 < bound <= 1:
        raise ExportError(f"a largest error of {bound} was allowed, expected a number above 0 and up to 1")


def judge(compared: Sequence[ParityRow]) -> Parity:
    """The rows as the manifest records them.

    Raises:
        VerificationFailed: an error is over its bound, or no number.
    """
    provider = f"CPUExecutionProvider, onnxruntime {onnxruntime.__version__}"
    parity = Parity(reference="NumPy float64", provider=provider, rows=tuple(compared))
    if failed := [row for row in compared if not row.within]:
        worst = max(failed, key=lambda row: max(row.outputs, row.states))
        raise VerificationFailed(
            f"verification failed in {len(failed)} of {len(compared)} rows; at worst, in {worst.case!r} with batch "
            f"{worst.batch} and {worst.steps} steps, the error is {max(worst.outputs, worst.states):.1e} and the "
            f"bound {worst.bound:.1e}. A model with large recurrent weights enlarges rounding errors by itself; where "
            "that is the cause and the error is acceptable, --max-error allows it",
            parity,
        )
    return parity
