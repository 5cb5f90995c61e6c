"""Which ticks run as a captured graph: those of one step, with room for a power of two of rows, where that is quicker.

Owns the graph of one step that is captured, and the choice. Must not know devices, onnxruntime or sessions. A captured
graph is one launch where a run is one for each of its nodes, and reads and writes the memory that it was captured with:
so it has a fixed number of rows, of which those that nobody has asked for are padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.graphs.placement import RECURRENT
from service.graphs.unrolled import unroll
from service.manifest import Manifest

Array = NDArray[Any]

MOST_ROWS = 1024
"""Of a captured graph: with more of them launching takes a small part of a run."""
_WORTH = 0.95
"""Share of the time that a plain run takes, over which a captured one is not worth its padding."""
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "int8": 1e-5}
"""By precision: most that two orders of adding up may differ by, as a share of values beyond 1."""
_LENGTHS_AT = 4
"""Where a recurrent operator has the lengths of the rows (ONNX, LSTM, input sequence_lens)."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was found of a number of rows.

    Attributes:
        rows: a power of two.
        plain_s: seconds of a run of as many rows.
        captured_s: seconds of a captured one.
        difference: the largest between what the two gave, as a share of values beyond 1.
    """

    rows: int
    plain_s: float
    captured_s: float
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.rows}: {self.captured_s * 1e6:.0f} us captured, {self.plain_s * 1e6:.0f} us plainly, "
            f"results differ by {self.difference:.2g}"
        )


class Choice:
    """Which numbers of rows run as a captured graph.

    Args:
        trials: what was found; numbers of rows that are not among them run plainly.
        tolerance: most that a captured graph may differ by.
    """

    def __init__(self, trials: Iterable[Trial] = (), tolerance: float = 0.0) -> None:
        found = {trial.rows: trial for trial in trials}
        self._rows: dict[int, int] = {}
        for rows, trial in found.items():
            if not trial.difference <= tolerance:
                continue
            if trial.captured_s <= _WORTH * trial.plain_s:
                self._rows[rows] = rows
            # With fewer rows it takes as long, and a plain run may not: one of half as many takes less than any of
            # those between.
            half = found.get(rows // 2)
            if half is not None and trial.captured_s <= _WORTH * half.plain_s:
                self._rows |= dict.fromkeys(range(rows // 2 + 1, rows), rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def graphs(self) -> set[int]:
        """The numbers of rows of the captured graphs that are used."""
        return set(self._rows.values())

    def rows(self, rows: int) -> int | None:
        """Return how many rows the captured graph has that runs so many; None where they run plainly."""
        return self._rows.get(rows)


def worst_of(trials: Sequence[Trial]) -> Trial:
    """Return what holds of several trials of as many rows: the quickest runs, and the worst difference."""
    return Trial(
        trials[0].rows,
        min(trial.plain_s for trial in trials),
        min(trial.captured_s for trial in trials),
        max(trial.difference for trial in trials),
    )


def buckets(tick_rows: int) -> list[int]:
    """Return the numbers of rows that are tried: 1, 2, 4, ... up to what a tick of so many rows needs."""
    most = min(MOST_ROWS, 1 << (tick_rows - 1).bit_length())
    return [1 << power for power in range(most.bit_length())]


def make_one_step(model: Any, manifest: Manifest) -> Manifest:
    """Rewrite a graph in its place so that a run takes exactly one step, without loops.

    Args:
        model: the onnx ModelProto.
        manifest: what the graph is served as.

    Returns:
        What the new graph is served as: without lengths, if nothing needs them any more.

    Raises:
        LoadError: if it cannot be rewritten.
    """
    unroll(model, manifest, 1)
    graph = model.graph
    for node in graph.node:
        # Every row has one step. What reads lengths here reads them on the host.
        if node.op_type in RECURRENT and node.input[_LENGTHS_AT : _LENGTHS_AT + 1] == [manifest.lengths]:
            node.input[_LENGTHS_AT] = ""
    used = {name for node in graph.node for name in node.input}
    if manifest.lengths is None or manifest.lengths in used:
        return manifest.model_copy(update={"steps_per_run": None})
    for index, value in enumerate(graph.input):
        if value.name == manifest.lengths:
            del graph.input[index]
            break
    return manifest.model_copy(update={"steps_per_run": None, "lengths": None})


def difference(ours: Array, theirs: Array) -> float:
    """Return the largest difference between two arrays, as a share of values beyond 1; infinite where NaN differs."""
    if ours.dtype.kind != "f":
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        errors = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(b)))
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))
