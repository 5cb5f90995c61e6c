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
        beside: what has to be said with the figure; what has nothing to say is left out.
    """

    what: str
    bound: float
    most: bool
    find: Callable[[Results], float]
    form: str = "{:.3g}"
    beside: tuple[Callable[[Results], str], ...] = ()

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
        beside = "; ".join(filter(None, (tell(results) for tell in self.beside)))
        return [self.what, bound, self.form.format(figure) + (f" ({beside})" if beside else ""), said]


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure of a case: the median of any subject."""

    name: str
    model: Model
    load: dict[str, int]

    def of(self, subject: Subject, results: Results) -> float:
        found = results.find(subject, self.model, **self.load)
        return found.median(self.name) if found else float("nan")


def _cost(model: Model, load: dict[str, int]) -> _Figure:
    return _Figure("cpu_us_per_step", model, load)


def _rate(model: Model, load: dict[str, int]) -> _Figure:
    return _Figure("steps_per_s", model, load)


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
    return f"Triton: {len(found.runs)} runs came through, {found.failed} did not"


def _paced(sessions: int) -> Callable[[Results], str]:
    """What the cost is over the graph alone when that runs as often as the server's ticks."""
    load = _many(sessions)
    of_paced = _Figure("paced_cpu_us_per_step", LARGE, load)

    def beside(results: Results) -> str:
        ratio = _cost(LARGE, load).of("conveyor", results) / of_paced.of("compute", results)
        return "" if math.isnan(ratio) else f"{ratio:.3g} over the graph's when it runs as often as the server's ticks"

    return beside


def _graph(sessions: int) -> Callable[[Results], str]:
    """What int8 gains in the graph alone."""
    load = _many(sessions)

    def beside(results: Results) -> str:
        ratio = _rate(LARGE_INT8, load).of("compute", results) / _rate(LARGE, load).of("compute", results)
        return "" if math.isnan(ratio) else f"the graph alone: {ratio:.3g}"

    return beside


def _parity(results: Results) -> str:
    quick, exact = (results.parity.get(model.title) for model in (LARGE_INT8, LARGE))
    if quick is None or exact is None:
        return ""
    errors = (f"{name} {quick[name]:.1e} off, {exact[name]:.1e} in float32" for name in ("outputs", "states"))
    return "; ".join(errors)


def _over(
    what: str,
    bound: float,
    most: bool,
    figure: _Figure,
    subject: Subject,
    other: _Figure,
    *beside: Callable[[Results], str],
) -> Target:
    """Conveyor's figure over a subject's other; and beside it what the bare server comes to by the same measure."""

    def bare(results: Results) -> str:
        ratio = figure.of("bare", results) / other.of("bare" if subject == "conveyor" else subject, results)
        return "" if math.isnan(ratio) else f"a bare server: {ratio:.3g}"

    def find(results: Results) -> float:
        return figure.of("conveyor", results) / other.of(subject, results)

    return Target(what, bound, most, find, beside=(bare, *beside))


TARGETS = (
    *(
        _over(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: CPU per step over the graph's alone",
            1.15,
            True,
            _cost(LARGE, _many(sessions)),
            "compute",
            _cost(LARGE, _many(sessions)),
            _paced(sessions),
        )
        for sessions in (64, 256)
    ),
    *(
        _over(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: steps per second over the loop's",
            8,
            False,
            _rate(LARGE, _many(sessions)),
            "loop",
            _rate(LARGE, _many(sessions)),
        )
        for sessions in (64, 256)
    ),
    _over(
        f"{SMALL.title}, 64 sessions on 4 streams, 1 chunk a message: CPU per step over Triton's",
        0.5,
        True,
        _cost(SMALL, _SINGLE),
        "triton",
        _cost(SMALL, _SINGLE),
        _triton_runs,
    ),
    _over(
        f"{SMALL.title}, 64 sessions, 64 chunks a message: CPU per step over Triton's, which takes one a message",
        0.08,
        True,
        _cost(SMALL, _many(64)),
        "triton",
        _cost(SMALL, _SINGLE),
        _triton_runs,
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
    *(
        _over(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: int8's steps per second over float32's",
            2.7,
            False,
            _rate(LARGE_INT8, _many(sessions)),
            "conveyor",
            _rate(LARGE, _many(sessions)),
            _graph(sessions),
            _parity,
        )
        for sessions in (64, 256)
    ),
)
