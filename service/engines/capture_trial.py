"""Ticks of one step, captured and plain, side by side: whether they give the same, and which is quicker.

Owns the runs and the clock. Must not know sessions, or how a graph is captured: a captured one is a workspace like any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engines.resident_workspace import ResidentWorkspace
from service.graphs.capture import Trial, difference
from service.graphs.workspace import sizes
from service.manifest import TensorSpec
from service.states.resident_pool import INITIAL, UNWANTED, Moves, ResidentPool

Array = NDArray[Any]

BEFORE_CAPTURE = 3
"""The first runs of a graph take memory; in a later one it is captured (onnxruntime, cuda_execution_provider.h)."""
_TURNS = 5
_SEEN = 16
"""Rows of which states are copied out to be compared."""


def compare(
    pool: ResidentPool, inputs: Sequence[TensorSpec], plain: ResidentWorkspace, captured: ResidentWorkspace
) -> Trial:
    """Hold captured runs against plain ones.

    Args:
        pool: that both work on; what they leave in it is given back.
        inputs: of the graph.
        plain: the arrays of one.
        captured: those of the other, with as many rows.

    Raises:
        Full: if the pool has not twice as many slots free.
        Exception: whatever the graphs raise.
    """
    for _ in range(BEFORE_CAPTURE):
        _idle(captured)
    worst = _difference(pool, inputs, plain, captured)
    return race(plain.rows, partial(_idle, plain), partial(_idle, captured), worst)


def race(rows: int, plain: Callable[[], object], captured: Callable[[], object], difference: float) -> Trial:
    """Let two ticks run in turns, and say how long each took at best.

    Args:
        rows: of either.
        plain: the one.
        captured: the other.
        difference: the largest that was found between what they give.
    """
    times: list[tuple[Callable[[], object], list[float]]] = [(plain, []), (captured, [])]
    for _ in range(_TURNS):
        for tick, taken in times:
            began = time.perf_counter()
            tick()
            taken.append(time.perf_counter() - began)
    plain_s, captured_s = (min(taken) for _, taken in times)
    return Trial(rows, plain_s, captured_s, difference)


def _difference(
    pool: ResidentPool, inputs: Sequence[TensorSpec], plain: ResidentWorkspace, captured: ResidentWorkspace
) -> float:
    """The largest one, of two steps of random input, the second from the states that the first has left."""
    random = np.random.default_rng(0)
    rows = plain.rows
    slots = [pool.allocate_many(rows) for _ in range(2)]
    worst = 0.0
    try:
        for _ in range(2):
            drawn = [_drawn(random, spec, rows) for spec in inputs]
            outputs = [
                _step(pool, workspace, drawn, ours) for workspace, ours in zip((plain, captured), slots, strict=True)
            ]
            worst = max(worst, difference_of(*outputs))
            # Every state goes into the outputs of the next step; of some it is seen as it is, too.
            some = slice(None, None, -(-rows // _SEEN))
            for one, two in zip(*(pool.peek_many(ours[some].tolist()) for ours in slots), strict=True):
                worst = max([worst, *(difference(b, a) for a, b in zip(one, two, strict=True))])
    finally:
        for ours in slots:
            pool.free_many(ours)
    return worst


def difference_of(plain: Sequence[Array], captured: Sequence[Array]) -> float:
    """Return the largest difference between several arrays and others; see ``difference``."""
    return max((difference(two, one) for one, two in zip(plain, captured, strict=True)), default=0.0)


def _step(
    pool: ResidentPool, workspace: ResidentWorkspace, drawn: Sequence[Array], slots: NDArray[np.intp]
) -> list[Array]:
    """Run a step on the states of slots; its outputs."""
    workspace.begin(len(slots), _nothing)
    for array, given in zip(workspace.inputs, drawn, strict=True):
        assert array is not None
        array[...] = given
    if workspace.lengths is not None:
        workspace.lengths[:] = 1
    moves = pool.gather(slots, workspace.states)
    try:
        workspace.start()
        outputs, _ = workspace.run()
        copies = [output.copy() for output in outputs]
    except BaseException:
        pool.abandon(moves)
        raise
    pool.scatter(slots, np.arange(len(slots)), moves)
    return copies


def _idle(workspace: ResidentWorkspace) -> None:
    """Run on the initial states, and keep nothing."""
    workspace.begin(workspace.rows, _nothing)
    moves: Moves = workspace.states
    moves.before[:], moves.after[:] = INITIAL, UNWANTED
    if moves.between is not None:
        moves.between[:] = UNWANTED
    if workspace.lengths is not None:
        workspace.lengths[:] = 1
    workspace.start()
    workspace.run()


def _drawn(random: np.random.Generator, spec: TensorSpec, rows: int) -> Array:
    """Random input of one step."""
    shape = sizes(spec, rows, 1)
    if spec.dtype.startswith("float"):
        return random.uniform(-1, 1, shape).astype(spec.dtype)
    return random.integers(0, min(spec.below or 2, 2), shape).astype(spec.dtype)


def _nothing() -> None:
    pass
