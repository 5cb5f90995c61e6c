"""How long a graph's runs take: tried out, several runs of each size, within a time.

Owns the runs and the clocks. The quickest run counts: what others did to the rest is not the model's. Must not know
what follows from what it finds, nor what runs inside a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from service.graphs.graph import Graph
from service.manifest import Manifest, StateSpec, TensorSpec
from service.versions.tuning import WIDEST, Bounds, Measurement, sizes, worth_it

Array = NDArray[np.generic]
Clock = Callable[[], float]

_TURNS = 3
_MOST_TURNS = 9
_SHORT_S = 5e-3
"""Turns that are over so soon are repeated: more of them cost little."""


def measure(
    graph_with: Callable[[int], Graph],
    counts: Sequence[int],
    seconds: float,
    start_s: float = 0.0,
    every: bool = False,
    bounds: Bounds = WIDEST,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> tuple[Measurement, ...]:
    """Measure runs of a model. Whoever calls sees to it that nothing else runs meanwhile.

    Thread counts are held against each other in turns, run by run, so that whatever else the machine does meets them
    alike. One that does not pay ends the search: those after it would pay less.

    Args:
        graph_with: gives the model, ready to run with so many threads.
        counts: of threads, in rising order.
        seconds: that all of it may take, but for a run that has begun, and for the first.
        start_s: what it takes to make another graph ready.
        every: measure each count, whether it pays or not.
        bounds: of the ticks that are run.
        clock: tells the time, in seconds.
        cpu_clock: tells the CPU time of the process, in seconds.

    Raises:
        Exception: whatever the graph raises.
    """
    end = clock() + seconds
    if every or len(counts) == 1:
        return tuple(_in_turns({count: graph_with(count) for count in counts}, end, bounds, clock, cpu_clock))
    best = counts[0]
    found: list[Measurement] = []
    for number, count in enumerate(counts[1:], start=2):
        left = end - clock()
        if start_s >= left / 2:
            break
        until = end if number == len(counts) else clock() + left / 2
        pair = {best: graph_with(best), count: graph_with(count)}
        compared = _in_turns(pair, until, bounds, clock, cpu_clock)
        # Only what was measured in turns can be compared, and the earlier pair has been: of it the winner's figures
        # are kept, for the sizes that there was no time for again.
        again = {(one.rows, one.steps) for one in compared}
        found = compared + [one for one in found if one.threads == best and (one.rows, one.steps) not in again]
        if not worth_it(compared, best, count):
            break
        best = count
    return tuple(found or _in_turns({best: graph_with(best)}, end, bounds, clock, cpu_clock))


def _in_turns(
    graphs: Mapping[int, Graph], until: float, bounds: Bounds, clock: Clock, cpu_clock: Clock
) -> list[Measurement]:
    found: list[Measurement] = []
    manifest = next(iter(graphs.values())).manifest
    timed = all(spec.time_axis is not None for spec in manifest.inputs)
    for rows, steps in sizes(timed, bounds, manifest.step_bytes, manifest.state_bytes):
        # A cell costs less where there are more: the runs will not take longer, or not much.
        cell_s = min((one.seconds / (one.rows * one.steps) for one in found), default=0.0)
        if found and clock() + 2 * cell_s * rows * steps * len(graphs) > until:
            continue
        # Not in the graph's own workspaces, which would go on holding memory for sizes that may never come.
        feeds = _zeros(manifest, rows, steps)
        ticks = {threads: _tick(graph, feeds) for threads, graph in graphs.items()}
        for tick in ticks.values():
            tick()
        times: dict[int, list[float]] = {threads: [] for threads in graphs}
        cpu_times: dict[int, list[float]] = {threads: [] for threads in graphs}
        began = clock()
        for turn in range(_MOST_TURNS):
            if turn and (clock() > until or (turn >= _TURNS and clock() - began > _SHORT_S)):
                break
            for threads, tick in ticks.items():
                start, cpu_start = clock(), cpu_clock()
                tick()
                times[threads].append(clock() - start)
                cpu_times[threads].append(cpu_clock() - cpu_start)
        found += [
            Measurement(
                threads=threads,
                rows=rows,
                steps=steps,
                seconds=max(min(times[threads]), 1e-9),
                cpu_s=min(cpu_times[threads]),
            )
            for threads in graphs
        ]
    return found


@runtime_checkable
class _OnDevice(Protocol):
    """A graph whose states stay on a device from tick to tick."""

    def rehearse(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """Return a tick that leaves them there."""


def _tick(graph: Graph, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """What a tick takes the time of: states that stay on a device are not carried there and back."""
    return graph.rehearse(feeds) if isinstance(graph, _OnDevice) else partial(graph.run, feeds)


def _zeros(manifest: Manifest, rows: int, steps: int) -> dict[str, Array]:
    """Inputs and states of a run, in the axes of the manifest; a size that is free is 1."""
    feeds = {spec.name: _zero(spec, rows, steps) for spec in manifest.inputs}
    feeds |= {state.input: _zero(state, rows, steps) for state in manifest.states}
    if manifest.lengths is not None:
        feeds[manifest.lengths] = np.full(rows, steps, np.int32)
    return feeds


def _zero(spec: TensorSpec | StateSpec, rows: int, steps: int) -> Array:
    shape = [size or 1 for size in spec.shape]
    shape[spec.batch_axis] = rows
    if isinstance(spec, TensorSpec) and spec.time_axis is not None:
        shape[spec.time_axis] = steps
    return np.zeros(shape, spec.dtype)
