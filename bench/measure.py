"""One case measured: its servers started, its subjects taken in turn, the runs gathered.

Subjects take turns within each run rather than each having its runs in a row, so that a machine whose speed drifts
drifts for all of them alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import triton
from bench.cases import Case, Subject
from bench.load import Load
from bench.models import make
from bench.processes import Failed, Process, python

_DOORS: dict[Subject, str] = {
    "conveyor": "native",
    "inference": "inference",
    "loop": "native",
    "triton": "inference",
    "echo": "echo",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How measuring is done.

    Attributes:
        folder: where models and peers are kept.
        runs: of each subject; the median counts.
        seconds: of each run.
        threads: inside one run of a model, of every subject.
    """

    folder: Path
    runs: int = 3
    seconds: float = 2.0
    threads: int = 1


@dataclass(slots=True)
class Measured:
    """What one subject did in one case, in every run.

    Attributes:
        subject: who.
        runs: the figures of each run by name.
        why: it was not measured; empty if it was.
    """

    subject: Subject
    runs: list[dict[str, float]] = field(default_factory=list)
    why: str = ""

    def median(self, figure: str) -> float:
        """The median over the runs; NaN if it was not measured."""
        values = [run[figure] for run in self.runs if figure in run]
        return statistics.median(values) if values else float("nan")


def measure(case: Case, settings: Settings, say: Callable[[str], None]) -> list[Measured]:
    """Measure a case.

    Args:
        case: which.
        settings: how.
        say: told what is done.

    Returns:
        One a subject, in the case's order.
    """
    repository = make(case.model, settings.folder, say)
    path = repository / case.model.name / "1" / "model.onnx"
    measured = {subject: Measured(subject) for subject in case.subjects}
    with ExitStack() as stack:
        servers: dict[str, Process] = {}
        for subject in case.subjects:
            name = "conveyor" if subject == "inference" else subject
            if name == "compute" or name in servers:
                continue
            say(f"{case.title}: starting {name}")
            try:
                servers[name] = stack.enter_context(_start(name, case, path, repository, settings, say))
            except Failed as error:
                measured[subject].why = str(error)
        for run in range(settings.runs):
            rows = 1.0
            for subject in _turns(case, measured, run):
                say(f"{case.title}: {subject}, run {run + 1} of {settings.runs}")
                if subject == "compute":
                    measured[subject].runs.append(_compute(case, path, max(1, round(rows)), settings))
                    continue
                server = servers.get("conveyor" if subject == "inference" else subject)
                if server is None:
                    continue
                try:
                    figures = _load(case, subject, server, settings)
                except Failed as error:
                    measured[subject].why = str(error)
                    # It dies of signal 11 every now and then, when sequences end.
                    if subject == "triton":
                        say(f"{case.title}: starting triton again")
                        servers[subject] = stack.enter_context(_start(subject, case, path, repository, settings, say))
                    continue
                measured[subject].runs.append(figures)
                if subject == "conveyor":
                    rows = figures["rows_per_tick"]
    return list(measured.values())


def _turns(case: Case, measured: dict[Subject, Measured], run: int) -> list[Subject]:
    """Who is measured in a run; one that has failed before has a few more goes."""
    subjects = list(case.subjects)
    if "triton" in subjects and len(measured["triton"].runs) < run:
        subjects[subjects.index("triton") : subjects.index("triton") + 1] = ["triton"] * 3
    return subjects


def _start(
    name: str, case: Case, path: Path, repository: Path, settings: Settings, say: Callable[[str], None]
) -> Process:
    threads = str(settings.threads)
    if name == "conveyor":
        return start_conveyor(repository, settings)
    if name == "loop":
        return Process(name, python("bench.loop", str(path), "--threads", threads))
    if name == "echo":
        # A result's own fields are some fifty bytes beside its numbers.
        reply = case.chunks * (case.steps * case.model.hidden_size * 4 + 50)
        return Process(name, python("bench.echo", "--reply-bytes", str(reply)))
    return triton.start(case.model, path, settings.folder, settings.threads, say)


def start_conveyor(repository: Path, settings: Settings, *flags: str) -> Process:
    """Start the server with what is in a repository.

    Raises:
        Failed: if it does not start.
    """
    given = ("--repository", str(repository), "--threads", str(settings.threads), *flags)
    ports = ("--port", "0", "--metrics-port", "0")
    return Process("conveyor", python("service", *given, *ports, "--device", "cpu", "--log-format", "json"))


def run_load(load: Load) -> dict[str, float]:
    """Run a load in a process of its own; its figures.

    Raises:
        Failed: if it does not come to its end.
    """
    return _json(python("bench.load", *load.to_flags()), load.seconds + 60)


def _load(case: Case, subject: Subject, server: Process, settings: Settings) -> dict[str, float]:
    load = Load(
        door=_DOORS[subject],
        port=server.port,
        model=case.model.name,
        input_size=case.model.input_size,
        sessions=case.sessions,
        streams=case.streams,
        steps=case.steps,
        chunks=case.chunks,
        seconds=settings.seconds,
        pid=server.pid,
    )
    counted = subject in ("conveyor", "inference")
    before = _ticks(server) if counted else (0.0, 0.0)
    figures = run_load(load)
    if counted:
        after = _ticks(server)
        figures["rows_per_tick"] = (after[0] - before[0]) / max(1.0, after[1] - before[1])
    return figures


def _ticks(server: Process) -> tuple[float, float]:
    return server.metric("conveyor_tick_rows_sum"), server.metric("conveyor_tick_rows_count")


def _compute(case: Case, path: Path, rows: int, settings: Settings) -> dict[str, float]:
    flags = ("--rows", str(rows), "--steps", str(case.steps), "--seconds", str(settings.seconds / 2))
    figures = _json(python("bench.compute", str(path), *flags, "--threads", str(settings.threads)), 60)
    return figures | {"rows_per_tick": float(rows)}


def _json(command: list[str], timeout_s: float) -> dict[str, float]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"no end after {timeout_s:g} s: {' '.join(command[1:4])}") from error
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if "details" in line or "Error" in line]
        raise Failed(f"{command[2]}: {said[-1] if said else done.stderr[-200:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
