"""Ticks timed: each one alone for its latency, and many at once for throughput. Knows no device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_WARM_UP = 0.2
"""Of the seconds of a run, how long ticks run before anything is counted."""
_LEAST = 5
"""Ticks that are counted, however long they take."""


@dataclass(frozen=True, slots=True)
class Ticks:
    """One way to run ticks of one shape.

    Attributes:
        launch: begins a tick.
        wait: returns when all that were launched have ended.
    """

    launch: Callable[[], object]
    wait: Callable[[], object]


def measure(
    ticks: Ticks, steps: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Run ticks for so long, half of it one by one and half of it one behind the other.

    Args:
        ticks: to run.
        steps: of all rows of a tick together.
        seconds: how long, after a fifth of it to warm up.
        clock: tells the time, in seconds.

    Returns:
        ``p50_ms`` and ``p99_ms`` of a tick that is alone, from its launch to its end; ``steps_per_s`` of ticks that are
        launched without waiting for the one before.
    """
    until = clock() + seconds * _WARM_UP
    while True:
        ticks.launch()
        ticks.wait()
        if clock() >= until:
            break
    took: list[float] = []
    until = clock() + seconds / 2
    while len(took) < _LEAST or clock() < until:
        began = clock()
        ticks.launch()
        ticks.wait()
        took.append(clock() - began)
    count = max(_LEAST, math.ceil(seconds / 2 / statistics.median(took)))
    began = clock()
    for _ in range(count):
        ticks.launch()
    ticks.wait()
    elapsed = clock() - began
    took.sort()
    return {
        "steps_per_s": count * steps / elapsed,
        "p50_ms": statistics.median(took) * 1e3,
        "p99_ms": took[min(len(took) - 1, math.ceil(0.99 * len(took)) - 1)] * 1e3,
    }
