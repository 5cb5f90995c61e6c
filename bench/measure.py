"""Cases and curves measured: the subjects taken in turn, the runs gathered.

Subjects take turns within each run rather than each having its runs in a row, and so do the cases of a group, so that a
machine whose speed drifts drifts for all of them alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.cases import Case, Curve, Subject
from bench.load import Load
from bench.models import Model, model_file
from bench.processes import Failed, Process, Worker, python
from bench.servers import Servers, Settings

KEEPS_UP = 0.95
"""A subject keeps up with a rate if it answers at least this share of it."""
_SHORTER = 2 / 3
"""Of a run's seconds, how many there are where no target rests on it."""
_TRITON_TRIES = 3
"""It dies of signal 11 every now and then, mostly where sequences end."""


@dataclass(slots=True)
class Measured:
    """What one subject did in one case, in every run.

    Attributes:
        subject: who.
        runs: the figures of each run by name.
        failed: how many runs came to nothing.
        why: the last of those did; empty if there are none.
    """

    subject: Subject
    runs: list[dict[str, float]] = field(default_factory=list)
    failed: int = 0
    why: str = ""

    def median(self, figure: str) -> float:
        """The median over the runs; NaN if it was not measured."""
        values = [run[figure] for run in self.runs if figure in run]
        return statistics.median(values) if values else float("nan")


@dataclass(frozen=True, slots=True)
class Point:
    """What one subject did at one rate.

    Attributes:
        subject: who.
        rate: steps per second that fell due.
        figures: by name.
    """

    subject: Subject
    rate: int
    figures: dict[str, float]

    @property
    def kept_up(self) -> bool:
        """Whether as much was answered as fell due, but for what was under way at the end."""
        return self.figures["steps_per_s"] >= KEEPS_UP * self.rate


def measure_case(case: Case, servers: Servers, measured: Sequence[Measured], number: int) -> None:
    """One run of every subject of a case.

    Args:
        case: which.
        servers: who is asked.
        measured: one a subject, in the case's order; the run is put there.
        number: of the run, from 1.
    """
    at: dict[str, float] = {}
    for one in measured:
        servers.say(f"{case.title}: {one.subject}, run {number}")
        for _ in range(_TRITON_TRIES if one.subject == "triton" else 1):
            try:
                if one.subject == "compute":
                    figures = _compute(case, at, servers.settings)
                else:
                    figures = _load(case, one.subject, servers)
            except (Failed, OSError) as error:
                one.failed, one.why = one.failed + 1, str(error)
                servers.drop(one.subject, case.model)
                continue
            one.runs.append(figures)
            if one.subject == "conveyor":
                at = figures
            break


def measure_curve(curve: Curve, servers: Servers) -> list[Point]:
    """Every subject of a curve at rising rates, until it no longer keeps up; the last point of each is past that."""
    points: list[Point] = []
    left = list(curve.subjects)
    for rate in curve.rates:
        for subject in list(left):
            servers.say(f"{curve.title}: {subject}, {rate:,} steps/s")
            for _ in range(_TRITON_TRIES if subject == "triton" else 1):
                try:
                    server = servers.get(subject, curve.model)
                    load = _plan(curve, subject, server, servers.settings, rate)
                    points.append(Point(subject, rate, run_load(servers.client, load)))
                except (Failed, OSError):
                    servers.drop(subject, curve.model)
                    continue
                break
            if not points or points[-1].subject != subject or not points[-1].kept_up:
                left.remove(subject)
    return points


def run_load(client: Worker, load: Load) -> dict[str, float]:
    """Have the client run a load; its figures.

    Raises:
        Failed: if it does not come to its end, or nothing was answered, unless the load allows for that.
    """
    client.ask(load.to_line())
    figures = client.answer(load.seconds * 2 + 30)
    if "p99_ms" not in figures and not load.timeout_ms:
        raise Failed("nothing was answered")
    return figures


def run_counted(client: Worker, load: Load, server: Process) -> dict[str, float]:
    """The same, and what the server counts from the load's beginning to its end.

    Returns:
        Beside the load's figures ``rows_per_tick``, ``steps_per_row`` in a tick, and ``tick_ms``.

    Raises:
        Failed: as ``run_load``.
    """
    before = _ticks(server)
    figures = run_load(client, load)
    ticks, rows, steps, seconds = (after - at for after, at in zip(_ticks(server), before, strict=True))
    return figures | {
        "rows_per_tick": rows / max(1.0, ticks),
        "steps_per_row": steps / max(1.0, rows),
        "tick_ms": seconds / max(1.0, ticks) * 1e3,
    }


def load_of(model: Model, server: Process, door: str, **given: Any) -> Load:
    """A load for a server that serves a model."""
    return Load(door, server.port, model.name, model.input_size, model.hidden_size, pid=server.pid, **given)


def expected_s(case: Case | Curve, settings: Settings) -> float:
    """About how long something takes, all runs together, to tell how much is left."""
    a_run = _seconds(case, settings) * 1.2 + 0.4
    if isinstance(case, Curve):
        # Who does not keep up drops out on the way.
        return a_run * len(case.rates) * len(case.subjects) * 0.7 + 5
    return a_run * len(case.subjects) * (settings.runs if case.target else 1) + 1.5


def _seconds(case: Case | Curve, settings: Settings) -> float:
    """How long a run is: longest where a target rests on it."""
    return settings.seconds if isinstance(case, Case) and case.target else settings.seconds * _SHORTER


def _door(subject: Subject, chunks: int) -> str:
    if subject in ("inference", "triton"):
        return "sequences"
    if subject == "echo":
        return "echo"
    return "blocks" if subject != "loop" and chunks > 1 else "chunks"


def _plan(case: Case | Curve, subject: Subject, server: Process, settings: Settings, rate: float = 0.0) -> Load:
    return load_of(
        case.model,
        server,
        _door(subject, case.chunks),
        sessions=case.sessions,
        streams=case.streams,
        steps=case.steps if isinstance(case, Case) else 1,
        chunks=case.chunks,
        seconds=_seconds(case, settings),
        rate=float(rate),
    )


def _load(case: Case, subject: Subject, servers: Servers) -> dict[str, float]:
    server = servers.get(subject, case.model)
    load = _plan(case, subject, server, servers.settings)
    if subject in ("conveyor", "inference"):
        return run_counted(servers.client, load, server)
    return run_load(servers.client, load)


def _ticks(server: Process) -> list[float]:
    names = ("tick_rows_count", "tick_rows_sum", "steps_total", "tick_seconds_sum")
    return [server.metric(f"conveyor_{name}") for name in names]


def _compute(case: Case, at: dict[str, float], settings: Settings) -> dict[str, float]:
    if not at:
        raise Failed("the rows per tick are not known")
    rows, steps = max(1, round(at["rows_per_tick"])), max(1, round(at["steps_per_row"]))
    flags = ["--rows", str(rows), "--steps", str(steps), "--seconds", str(_seconds(case, settings) / 2)]
    if case.target:
        flags += ["--period-s", str(rows * steps / at["steps_per_s"])]
    command = python("bench.compute", str(model_file(case.model, settings.folder)), *flags)
    try:
        done = subprocess.run(
            [*command, "--threads", str(settings.threads)], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Failed("the graph alone: no end after 60 s") from error
    if done.returncode:
        raise Failed(f"the graph alone: {done.stderr.strip()[-200:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures | {"rows_per_tick": float(rows), "steps_per_row": float(steps)}
