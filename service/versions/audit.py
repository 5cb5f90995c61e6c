"""What is held of a graph before it is served: on this machine, on the provider in use, with random input.

Owns the comparisons and what follows from each: a graph whose rows do not keep to themselves runs row by row, one whose
chunks do not give what the whole gives is refused. Must not know files, onnxruntime or sessions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engines.stepping import RowByRow
from service.errors import LoadError
from service.graphs.graph import Graph
from service.manifest import TensorSpec
from service.states.pool import initial_value
from service.ticks.packing import pack, unpack

Array = NDArray[np.generic]

_ROWS, _STEPS = 3, 5
_MANY = 33
"""More rows than are compared: a graph may mix them from some number on."""
_RAGGED = (5, 2, 4)
_CUTS = ((2, 3), (1,) * 5)
_TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "float16": 1e-2, "int8": 5e-2}
_TF32 = 1e-2
"""What runs with TF32 may differ by: kernels round, or do not, by how many rows and steps they are given."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found.

    Attributes:
        graph: what is to be served: the one that was given, or a loop over its rows.
        rows: largest difference between a row alone and among others; None where it was not compared, or would not run.
        chunks: largest difference between whole and chunked sequences; None where that was not compared.
            Both are None too where results hold NaN, which is equal to itself and shows nothing.
        warnings: what its operator should know, a sentence each.
    """

    graph: Graph
    rows: float | None
    chunks: float | None
    warnings: tuple[str, ...]


def audit(
    graph: Graph, strict: bool = False, tolerance: float | None = None, described: bool = False, tf32: bool = False
) -> Audit:
    """Hold a graph against what the server relies on.

    Args:
        graph: to be served.
        strict: refuse what would be served with a warning.
        tolerance: largest difference that passes, as a share where values are beyond 1; of integers and bools, the
            share of them that differ. None for what suits the dtype.
        described: whether its states were paired by hand.
        tf32: whether its products may round their factors to TF32.

    Raises:
        LoadError: if it does not run, gives what its manifest does not say, or its states do not carry a sequence.
    """
    return _Auditor(graph, strict, tolerance, described, tf32).audit()


def differences(graph: Graph, other: Graph) -> tuple[float, float]:
    """Return how far two graphs of one model are from each other on the audit's data: in outputs, and in final states.

    Args:
        graph: the one.
        other: the other, whose values count as exact: differences are shares of those beyond 1.

    Raises:
        LoadError: if one of them does not run.
    """
    ours, exact = (_Auditor(one, False, None, False).drawn() for one in (graph, other))
    outputs, states = (
        max(
            (
                _difference(array, should)
                for row, expected in zip(ours, exact, strict=True)
                for array, should in zip(row[part], expected[part], strict=True)
            ),
            default=0.0,
        )
        for part in (0, 1)
    )
    return outputs, states


Row = tuple[list[Array], list[Array]]
"""A row's outputs [T, ...] or [...], and its states."""
Rows = Sequence[Sequence[Array]]
"""The inputs, or the states, of each of some rows."""


class _Auditor:
    def __init__(
        self, graph: Graph, strict: bool, tolerance: float | None, described: bool, tf32: bool = False
    ) -> None:
        self._graph = graph
        self._manifest = graph.manifest
        self._strict = strict
        self._tolerance = tolerance
        self._described = described
        self._tf32 = tf32
        self._warnings: list[str] = []
        self._steps = _STEPS if all(spec.time_axis is not None for spec in self._manifest.inputs) else 1
        self._inputs: list[list[Array]] = []

    def drawn(self) -> list[Row]:
        """Draw the input, and return what the first rows of it give alone."""
        # Some graphs give numbers for positive input alone: those that take a logarithm.
        for lowest in (-1.0, 0.0):
            alone = self._draw(lowest)
            if not _has_nan(alone):
                break
        return alone

    def audit(self) -> Audit:
        alone = self.drawn()
        unknown = _has_nan(alone)
        self._check_repeats(alone[0])
        self._check_pairs()
        self._check_round_trip(alone[0])
        rows = self._check_rows(alone)
        chunks = None
        if self._manifest.streamable and self._manifest.steps_per_run is None and self._steps > 1:
            chunks = self._check_chunks()
        if unknown:
            self._warn("rows and chunks could not be checked: results hold NaN after random input")
            rows = chunks = None
        return Audit(self._graph, rows, chunks, tuple(self._warnings))

    def _draw(self, lowest: float) -> list[Row]:
        """Draw the input, real numbers from ``lowest`` to 1, and return what the first rows of it give alone."""
        random = np.random.default_rng(0)
        inputs = self._manifest.inputs
        self._inputs = [[_drawn(random, spec, self._steps, lowest) for spec in inputs] for _ in range(_ROWS)]
        try:
            return [self._run([row])[0] for row in self._inputs]
        except Exception as error:  # whatever the engine raises
            raise LoadError(f"the model does not run: {_said(error)}{self._tried()}{self._free_sizes()}") from error

    def _check_pairs(self) -> None:
        """Tell of states that nothing but their description pairs."""
        kinds = [(state.dtype, state.shape) for state in self._manifest.states]
        alike = [state.name for state, kind in zip(self._manifest.states, kinds, strict=True) if kinds.count(kind) > 1]
        if self._described and self._manifest.steps_per_run == 1 and alike:
            # No reason to refuse it, however strict: every cell of an LSTM is so.
            self._warnings.append(
                f"states {', '.join(map(repr, alike))} are alike and a run takes one step: nothing here can show "
                "whether each has its own output in model.yaml"
            )

    def _check_repeats(self, first: Row) -> None:
        again = self._run([self._inputs[0]])[0]
        if any(a.tobytes() != b.tobytes() for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True)):
            self._warn("a second run of the same input gives other results")

    def _check_round_trip(self, row: Row) -> None:
        for spec, state in zip(self._manifest.states, row[1], strict=True):
            if state.dtype.kind == "f" and not np.isfinite(state).all():
                self._warn(f"state {spec.name!r} holds NaN or infinity after random input")
        try:
            self._run([self._inputs[0]], [row[1]])
        except Exception as error:
            raise LoadError(f"the model does not run from the states that it gives: {_said(error)}") from error

    def _check_rows(self, alone: Sequence[Row]) -> float | None:
        """Compare rows alone with rows together, and turn to one at a time where they differ."""
        if self._manifest.rows_per_run == 1:
            return None
        worst, reason = 0.0, ""
        for count, rows, states, expected in self._row_cases(alone):
            try:
                together = self._run(rows, states)
            except Exception as error:
                worst, reason = np.nan, f"it does not run on {count} rows ({_said(error)})"
                break
            difference, wrong = self._compare(together[:_ROWS], expected)
            worst = max(worst, difference)
            if wrong:
                reason = f"a row among {count} gives other results than alone ({wrong})"
                break
        if not reason:
            return worst
        self._warn(f"{reason}; it is run row by row")
        self._graph = RowByRow(self._graph)
        self._manifest = self._graph.manifest
        return None if np.isnan(worst) else worst

    def _row_cases(self, alone: Sequence[Row]) -> Iterator[tuple[int, Rows, Rows | None, Sequence[Row]]]:
        """Rows to be run together: how many, their inputs, their states, and what the first of them should give."""
        yield _ROWS, self._inputs, None, alone
        # From states that differ: those of the beginning are the same in every row.
        states = [row[1] for row in alone]
        carried = [self._run([row], [state])[0] for row, state in zip(self._inputs, states, strict=True)]
        yield _ROWS, self._inputs, states, carried
        yield _MANY, self._inputs * (_MANY // _ROWS), states * (_MANY // _ROWS), carried
        if self._manifest.lengths is not None and self._steps == _STEPS:
            shorter = [[array[:length] for array in row] for row, length in zip(self._inputs, _RAGGED, strict=True)]
            yield _ROWS, shorter, None, [self._run([row])[0] for row in shorter]

    def _check_chunks(self) -> float:
        try:
            whole = self._run(self._inputs)
            worst = 0.0
            for cut in _CUTS:
                error, wrong = self._compare(self._run_in_chunks(cut), whole)
                worst = max(worst, error)
                if wrong:
                    break
            else:
                return worst
        except Exception as error:
            raise LoadError(f"the model does not run on chunks of a sequence: {_said(error)}") from error
        raise LoadError(
            f"a sequence in chunks gives other results than whole ({wrong}): two states of one shape may be swapped, "
            "or a state left out; of a graph that reads both ways, model.yaml says streamable: false; where a graph "
            "only rounds coarsely, tolerance lets more pass"
        )

    def _run_in_chunks(self, cut: Sequence[int]) -> list[Row]:
        states: list[list[Array]] | None = None
        parts: list[list[Row]] = []
        begin = 0
        for steps in cut:
            given = [[array[begin : begin + steps] for array in row] for row in self._inputs]
            parts.append(self._run(given, states))
            states = [row[1] for row in parts[-1]]
            begin += steps
        joined = []
        for row, last in enumerate(parts[-1]):
            outputs = [
                last[0][index] if spec.time_axis is None else np.concatenate([part[row][0][index] for part in parts])
                for index, spec in enumerate(self._manifest.outputs)
            ]
            joined.append((outputs, last[1]))
        return joined

    def _run(self, rows: Rows, states: Rows | None = None) -> list[Row]:
        """Run some rows together, from their states or the initial ones."""
        manifest = self._manifest
        lengths = [len(row[0]) for row in rows]
        feeds = {
            spec.name: pack([row[index][np.newaxis] for row in rows], lengths, spec)
            for index, spec in enumerate(manifest.inputs)
        }
        if manifest.lengths is not None:
            feeds[manifest.lengths] = np.array(lengths, np.int32)
        initial = [initial_value(spec) for spec in manifest.states]
        for index, spec in enumerate(manifest.states):
            before = [initial[index]] * len(rows) if states is None else [row[index] for row in states]
            feeds[spec.input] = np.stack(before, spec.batch_axis)
        outputs, after = self._graph.run(feeds)
        unpacked = [
            unpack(array, spec, [1] * len(rows), lengths) for spec, array in zip(manifest.outputs, outputs, strict=True)
        ]
        return [
            (
                [rows_of_output[row][0] for rows_of_output in unpacked],
                [
                    np.asarray(array.take(row, spec.batch_axis))
                    for spec, array in zip(manifest.states, after, strict=True)
                ],
            )
            for row in range(len(rows))
        ]

    def _compare(self, rows: Sequence[Row], expected: Sequence[Row]) -> tuple[float, str]:
        """Return the largest difference, and the tensor that differs by more than it may."""
        names = [f"output {y.name!r}" for y in self._manifest.outputs]
        names += [f"state {state.name!r}" for state in self._manifest.states]
        worst, wrong = 0.0, ""
        for row, other in zip(rows, expected, strict=True):
            for name, array, should in zip(names, row[0] + row[1], other[0] + other[1], strict=True):
                error, allowed = _difference(array, should), self._allowed(should.dtype.name)
                if error > max(allowed, worst):
                    kind = "" if should.dtype.kind == "f" else f" of its {should.dtype.name} values"
                    wrong = f"{name} by {error:.2g}{kind}, {allowed:.2g} allowed"
                worst = max(worst, error)
        return worst, wrong

    def _allowed(self, dtype: str) -> float:
        if self._tolerance is not None:
            return self._tolerance
        if not dtype.startswith("float"):
            return 0.0
        manifest = self._manifest
        bounds = [_TOLERANCE[dtype], _TOLERANCE[manifest.precision], _TF32 if self._tf32 else 0.0]
        if manifest.parity is not None:
            # Two runs that are each within the bound that export held them to are within twice that of each other.
            bounds += [2 * row.bound for row in manifest.parity.rows if np.isfinite(row.bound)]
        return max(bounds)

    def _warn(self, text: str) -> None:
        if self._strict:
            raise LoadError(f"{text}, and model.yaml says strict")
        self._warnings.append(text)

    def _tried(self) -> str:
        """The shape that failed, where two of its axes may have been taken for each other."""
        x = self._manifest.inputs[0]
        if not self._described or x.time_axis is None or x.absent:
            return ""
        shape = [size or 1 for size in x.shape]
        shape[x.time_axis] = self._steps
        tried = f"{x.name!r} was {shape}, 1 row and {self._steps} steps"
        return f"; {tried}: are time_axis and batch_axis as the graph has them?"

    def _free_sizes(self) -> str:
        free = [spec.name for spec in self._manifest.inputs if None in spec.tail]
        return (
            f"; inputs {free} were tried with size 1 where they take any: model.yaml can give a shape" if free else ""
        )


def _drawn(random: np.random.Generator, spec: TensorSpec, steps: int, lowest: float) -> Array:
    """Random input of one row: [T, ...]."""
    shape = (steps, *(size or 1 for size in spec.tail))
    if spec.dtype.startswith("float"):
        return random.uniform(lowest, 1, shape).astype(spec.dtype)
    below = min(spec.below or 2, np.iinfo(spec.dtype).max) if spec.dtype != "bool" else 2
    return random.integers(0, below, shape).astype(spec.dtype)


def _difference(array: Array, expected: Array) -> float:
    """The largest difference, as a share of expected values beyond 1; of discrete values, the share that differs."""
    if array.shape != expected.shape:
        return float("inf")
    if array.dtype.kind != "f":
        return float((array != expected).mean()) if array.size else 0.0
    ours, theirs = array.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        errors = np.where(
            (ours == theirs) | (np.isnan(ours) & np.isnan(theirs)),
            0.0,
            np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs)),
        )
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))


def _has_nan(rows: Sequence[Row]) -> bool:
    return any(array.dtype.kind == "f" and np.isnan(array).any() for row in rows for array in row[0] + row[1])


def _said(error: Exception) -> str:
    """The first line of an error, without the codes and the place in its source that onnxruntime puts before."""
    line = next(iter(str(error).splitlines()), "") or repr(error)
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return re.sub(r"/\S*onnxruntime/\S+:\d+ .*?\) ", "", line)[:300]
