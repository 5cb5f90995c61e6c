"""How a model is best run on a machine, told from how long its runs took there.

Owns which sizes and thread counts are worth a look, and what follows from what was seen. Pure; must not know graphs,
files, or how anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from service.ticks.pace import Pace

_MOST_ROWS = 512
"""Rows of the largest tick that is looked at, and that a server has unless it is told or has measured otherwise."""
_MOST_CELLS = 8192
"""Rows times steps of the largest tick that is looked at."""
_LONG = 16
"""Steps of a tick that is not short: by then what a run costs once is a small part of it."""
_MOST_BYTES = 64 * 2**20
"""Of inputs and states, of the largest tick that is looked at."""
_TELLING = (1, 16, 64, 256)
"""Rows that tell most."""
_BUSY_ROWS = 16
"""Rows from which on a tick is one of a busy server, where throughput counts."""
_WORTH = 0.5
"""The share of what as many more threads could give at best that they have to give."""
_TICK_S = 3e-4
"""What a tick costs apart from the run: to cut it, hand it over and answer it."""
_ENOUGH = 0.95
_LEAST_TICK_ROWS = 64

Count = Annotated[int, Field(ge=1, le=65_536, strict=True)]
Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Measurement(BaseModel):
    """What runs of one size took.

    Attributes:
        threads: inside the run.
        rows: side by side.
        steps: of each row.
        seconds: of one run, the quickest.
        cpu_s: seconds of CPU that one run took, of all threads together; the least.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: Count
    rows: Count
    steps: Count
    seconds: Annotated[Time, Field(ge=1e-9, le=86_400)]
    cpu_s: Time

    @property
    def steps_per_s(self) -> float:
        """Steps of sequences that such runs do in a second."""
        return self.rows * self.steps / self.seconds

    @property
    def cpu_us_per_step(self) -> float:
        """Microseconds of CPU for one step of one sequence."""
        return self.cpu_s / (self.rows * self.steps) * 1e6


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest tick that is looked at.

    Attributes:
        rows: side by side.
        steps: of each row.
        cells: rows times steps.
    """

    rows: int = _MOST_ROWS
    steps: int = _LONG
    cells: int = _MOST_CELLS


WIDEST = Bounds()


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a model is run.

    Attributes:
        threads: inside one run.
        tick_rows: most rows in a tick: more gain nothing, or none were seen that gain nothing.
        measured: what runs took, with every thread count that was looked at; none where nothing was measured.
    """

    threads: int
    tick_rows: int = _MOST_ROWS
    measured: tuple[Measurement, ...] = ()

    @property
    def pace(self) -> Pace:
        """How long ticks take, as far as it was measured."""
        pace = Pace()
        for one in self.measured:
            if one.threads == self.threads:
                pace.learn(one.rows, one.steps, one.seconds)
        return pace


def thread_counts(cores: int) -> tuple[int, ...]:
    """The thread counts worth a look: 1, 2, 4, ... and one a core."""
    return (*(2**k for k in range(cores.bit_length()) if 2**k < cores), cores)


def sizes(timed: bool, bounds: Bounds = WIDEST, step_bytes: int = 0, state_bytes: int = 0) -> list[tuple[int, int]]:
    """The rows and steps of the ticks worth a look, those first from which most follows; at least that of one step.

    Args:
        timed: whether a tick can have more than one step.
        bounds: what the server's ticks do not exceed.
        step_bytes: of the inputs of one step of one row.
        state_bytes: of the states of one row.
    """
    every = [(2**k, steps) for k in range(_MOST_ROWS.bit_length()) for steps in ((1, _LONG) if timed else (1,))]
    every.sort(key=lambda size: (size[0] not in _TELLING, size[1], size[0]))

    def fits(rows: int, steps: int) -> bool:
        return (
            rows <= bounds.rows
            and steps <= bounds.steps
            and rows * steps <= min(bounds.cells, _MOST_CELLS)
            and rows * (steps * step_bytes + state_bytes) <= _MOST_BYTES
        )

    return [size for size in every if size == (1, 1) or fits(*size)]


def choose(measured: Sequence[Measurement]) -> Tuning:
    """Choose how to run a model.

    Threads: the event loop and other models share the cores, so that more threads have to buy more than they take. With
    n threads instead of m a busy server's ticks, of 16 rows or more, must come to at least 1 + (n / m - 1) / 2 times
    the steps per second in the geometric mean: twice the threads for one and a half times the steps, which costs at
    most a third more CPU a step.

    Rows in a tick: a power of two from which on more rows of one step gain less than a twentieth, with 0.3 ms a tick
    added for all that is not the run; 64 at least.

    Args:
        measured: with one thread count or more; not empty.
    """
    counts = sorted({one.threads for one in measured})
    threads = counts[0]
    for count in counts[1:]:
        if worth_it(measured, threads, count):
            threads = count
    return Tuning(threads, _useful_rows(one for one in measured if one.threads == threads), tuple(measured))


def speedup(tuning: Tuning, other: Tuning) -> float | None:
    """Tell how many times the steps per second of one way to run a model another has, for a busy server.

    That is in ticks of 16 rows or more, in the geometric mean, where they were seen in both.

    Args:
        tuning: the one.
        other: the other, on another device.

    Returns:
        None where no size was measured in both.
    """
    ours, theirs = (
        {(one.rows, one.steps): one.seconds for one in each.measured if one.threads == each.threads}
        for each in (tuning, other)
    )
    return _gain(theirs, ours)


def worth_it(measured: Sequence[Measurement], fewer: int, more: int) -> bool:
    """Whether some more threads buy enough steps per second; see ``choose``."""
    slow, quick = (
        {(one.rows, one.steps): one.seconds for one in measured if one.threads == threads} for threads in (fewer, more)
    )
    gain = _gain(slow, quick)
    return gain is not None and gain >= 1 + _WORTH * (more / fewer - 1)


def _gain(slow: Mapping[tuple[int, int], float], quick: Mapping[tuple[int, int], float]) -> float | None:
    """How many times as quick one way is as the other, by the seconds of each size, where many rows run if any do."""
    both = slow.keys() & quick.keys()
    both = {size for size in both if size[0] >= _BUSY_ROWS} or both
    if not both:
        return None
    return math.exp(sum(math.log(slow[size] / quick[size]) for size in both) / len(both))


def _useful_rows(measured: Iterable[Measurement]) -> int:
    speeds = {one.rows: one.rows / (one.seconds + _TICK_S) for one in measured if one.steps == 1}
    if not speeds:
        return _MOST_ROWS
    best = max(speeds.values())
    useful = max(_LEAST_TICK_ROWS, min(rows for rows, speed in speeds.items() if speed >= _ENOUGH * best))
    # Where the most that were tried are the best, more may be better still.
    return min(useful, _MOST_ROWS) if useful < max(speeds) else _MOST_ROWS
