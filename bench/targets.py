"""What the figures are held against: bounds, and ratios within one benchmark; never a number of another day."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.cases import Subject
from bench.models import LARGE, LARGE_INT8, SMALL, Model
from bench.results import Results

NONE = 0.01
"""What growth of memory is taken for none: allocators move by as much."""


@dataclass(frozen=True, slots=True)
class Target:
    """One figure.

    Attributes:
        what: for people.
        bound: what it should reach.
        most: whether the bound is the most that it should be, or the least.
        find: the figure; NaN if it was not measured.
        form: how it is written.
        beside: what has to be said with the figure.
    """

    what: str
    bound: float
    most: bool
    find: Callable[[Results], float]
    form: str = "{:.3g}"
    beside: Callable[[Results], str] = lambda results: ""

    def reached(self, figure: float) -> bool:
        """Whether a figure is as it should be."""
        return figure <= self.bound if self.most else figure >= self.bound

    def line(self, results: Results) -> list[str]:
        """What was to be reached, what it is, and whether that is enough."""
        bound = f"{'at most' if self.most else 'at least'} {self.form.format(self.bound)}"
        figure = self.find(results)
        if math.isnan(figure):
            return [self.what, bound, "not measured", ""]
        said = "reached" if self.reached(figure) else "falls short"
        return [self.what, bound, self.form.format(figure) + self.beside(results), said]


def _ratio(
    figure: str,
    model: Model,
    load: dict[str, int],
    subject: Subject,
    other: Model,
    other_load: dict[str, int],
    of_other: str = "",
) -> Callable[[Results], float]:
    """Conveyor's median over another subject's, of the same figure unless that is given."""

    def find(results: Results) -> float:
        ours, theirs = results.find("conveyor", model, **load), results.find(subject, other, **other_load)
        return ours.median(figure) / theirs.median(of_other or figure) if ours and theirs else float("nan")

    return find


def _many(sessions: int) -> dict[str, int]:
    return {"sessions": sessions, "steps": 1, "chunks": 64}


_SINGLE = {"sessions": 64, "streams": 4, "steps": 1, "chunks": 1}


def _situation(name: str, *figures: str) -> Callable[[Results], float]:
    """The largest of some medians."""

    def find(results: Results) -> float:
        return max(results.situation(name, figure) for figure in figures)

    return find


def _triton_runs(results: Results) -> str:
    found = results.find("triton", SMALL, **_SINGLE)
    if found is None or not found.failed:
        return ""
    return f" (Triton: {len(found.runs)} runs came through, {found.failed} did not)"


def _paced(sessions: int) -> Callable[[Results], str]:
    """What the same figure is over the graph alone when that runs as often as the server's ticks."""
    of_paced = _ratio(
        "cpu_us_per_step", LARGE, _many(sessions), "compute", LARGE, _many(sessions), "paced_cpu_us_per_step"
    )

    def beside(results: Results) -> str:
        ratio = of_paced(results)
        return (
            "" if math.isnan(ratio) else f" ({ratio:.3g} over the graph's when it runs as often as the server's ticks)"
        )

    return beside


def _parity(results: Results) -> str:
    quick, exact = (results.parity.get(model.title) for model in (LARGE_INT8, LARGE))
    if quick is None or exact is None:
        return ""
    errors = (f"{name} {quick[name]:.1e} off, {exact[name]:.1e} in float32" for name in ("outputs", "states"))
    return f" ({'; '.join(errors)})"


TARGETS = (
    *(
        Target(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: CPU per step over the graph's alone",
            1.15,
            True,
            _ratio("cpu_us_per_step", LARGE, _many(sessions), "compute", LARGE, _many(sessions)),
            beside=_paced(sessions),
        )
        for sessions in (64, 256)
    ),
    *(
        Target(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: steps per second over the loop's",
            8,
            False,
            _ratio("steps_per_s", LARGE, _many(sessions), "loop", LARGE, _many(sessions)),
        )
        for sessions in (64, 256)
    ),
    Target(
        f"{SMALL.title}, 64 sessions on 4 streams, 1 chunk a message: CPU per step over Triton's",
        0.5,
        True,
        _ratio("cpu_us_per_step", SMALL, _SINGLE, "triton", SMALL, _SINGLE),
        beside=_triton_runs,
    ),
    Target(
        f"{SMALL.title}, 64 sessions, 64 chunks a message: CPU per step over Triton's, which takes one a message",
        0.08,
        True,
        _ratio("cpu_us_per_step", SMALL, _many(64), "triton", SMALL, _SINGLE),
        beside=_triton_runs,
    ),
    Target(
        "p99 of streaming steps beside long batches that saturate the model, over p99 alone at the same rate",
        2.0,
        True,
        _situation("streams beside batches", "p99_ratio"),
    ),
    Target(
        "cells computed and thrown away, log-normal lengths (sigma 1)",
        0.05,
        True,
        _situation("streams beside batches", "wasted", "batch_alone_wasted"),
        "{:.1%}",
    ),
    Target("4 times the peak: answered in time, over the peak", 0.9, False, _situation("overload", "4x.in_time")),
    Target(
        "4 times the peak: time to a refusal, p99", 50, True, _situation("overload", "4x.refusal_p99_ms"), "{:.0f} ms"
    ),
    Target("4 times the peak: growth of memory", NONE, True, _situation("overload", "growth"), "{:.1%}"),
    Target("tick time with 100,000 resident sessions over 1,000", 1.1, True, _situation("resident sessions", "ratio")),
    Target(
        f"{LARGE.title}, 64 sessions, 64 chunks a message: int8's steps per second over float32's",
        2.7,
        False,
        _ratio("steps_per_s", LARGE_INT8, _many(64), "conveyor", LARGE, _many(64)),
        beside=_parity,
    ),
)
