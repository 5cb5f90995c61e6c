"""What the figures are held against. Each is a ratio within one benchmark, never a number of another day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.cases import Subject
from bench.models import LARGE, LARGE_INT8, SMALL
from bench.results import Results


@dataclass(frozen=True, slots=True)
class Target:
    """One figure.

    Attributes:
        what: for people.
        bound: what it should reach.
        most: whether the bound is the most that it should be, or the least.
        find: the figure; NaN if it was not measured.
    """

    what: str
    bound: float
    most: bool
    find: Callable[[Results], float]

    def reached(self, figure: float) -> bool:
        """Whether a figure is as it should be."""
        return figure <= self.bound if self.most else figure >= self.bound


def _large(figure: str, subject: Subject, sessions: int) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        ours = results.find("conveyor", LARGE, sessions=sessions, steps=1, chunks=64)
        theirs = results.find(subject, LARGE, sessions=sessions, steps=1, chunks=64)
        return ours.median(figure) / theirs.median(figure) if ours and theirs else float("nan")

    return find


def _against_triton(chunks: int, sessions: int, streams: int) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        ours = results.find("conveyor", SMALL, sessions=sessions, streams=streams, steps=1, chunks=chunks)
        theirs = results.find("triton", SMALL, sessions=64, streams=4)
        if not ours or not theirs:
            return float("nan")
        return ours.median("cpu_us_per_step") / theirs.median("cpu_us_per_step")

    return find


def _situation(name: str, figure: str) -> Callable[[Results], float]:
    return lambda results: results.situation(name, figure)


def _int8(sessions: int) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        quick = results.find("conveyor", LARGE_INT8, sessions=sessions, chunks=64)
        exact = results.find("conveyor", LARGE, sessions=sessions, steps=1, chunks=64)
        return quick.median("steps_per_s") / exact.median("steps_per_s") if quick and exact else float("nan")

    return find


TARGETS = (
    *(
        Target(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: CPU per step over the graph's alone",
            1.15,
            True,
            _large("cpu_us_per_step", "compute", sessions),
        )
        for sessions in (64, 256)
    ),
    *(
        Target(
            f"{LARGE.title}, {sessions} sessions, 64 chunks a message: steps per second over the loop's",
            8,
            False,
            _large("steps_per_s", "loop", sessions),
        )
        for sessions in (64, 256)
    ),
    Target(
        f"{SMALL.title}, 64 sessions on 4 streams, 1 chunk a message: CPU per step over Triton's",
        0.5,
        True,
        _against_triton(1, 64, 4),
    ),
    Target(
        f"{SMALL.title}, 64 sessions, 64 chunks a message: CPU per step over Triton's with one",
        0.08,
        True,
        _against_triton(64, 64, 1),
    ),
    Target(
        "p99 of streaming steps beside long batches that saturate the model, over p99 alone at the same rate",
        2.0,
        True,
        _situation("streams beside batches", "ratio"),
    ),
    Target(
        "cells computed and thrown away, log-normal lengths (sigma 1)",
        0.05,
        True,
        _situation("streams beside batches", "wasted"),
    ),
    Target("4x overload: answered in time over the peak rate", 0.9, False, _situation("overload", "4x.in_time")),
    Target("4x overload: milliseconds to a refusal, p99", 50.0, True, _situation("overload", "4x.refusal_p99_ms")),
    Target(
        "4x overload: growth of the server's memory over 2x, bytes",
        0.0,
        True,
        _situation("overload", "4x.growth_bytes"),
    ),
    Target("tick time with 100,000 resident sessions over 1,000", 1.1, True, _situation("residents", "ratio")),
    Target(f"{LARGE.title}, 64 sessions: int8's steps per second over float32's", 2.7, False, _int8(64)),
)
