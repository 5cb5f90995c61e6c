"""What a whole benchmark found: cases, curves, situations, and the host it ran on. JSON out and in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.cases import Case, Curve, Subject
from bench.load import event_loop
from bench.measure import Measured, Point
from bench.models import Model
from bench.servers import Settings

_LIBRARIES = ("cupy-cuda13x", "grpcio", "numpy", "onnxruntime", "onnxruntime-gpu", "protobuf", "uvloop")


@dataclass(slots=True)
class Results:
    """All of one benchmark.

    Attributes:
        host: what it ran on, by name.
        settings: how, by name.
        event_loops: on which event loop each subject ran.
        parity: the largest errors of each model's file, as export measured them, by the model's title.
        cases: each with what was measured.
        curves: each with its points.
        situations: the figures of each round, by situation.
        missing: why situations were not measured.
        took_s: how long all of it took.
    """

    host: dict[str, str]
    settings: dict[str, Any]
    event_loops: dict[str, str] = field(default_factory=dict)
    parity: dict[str, dict[str, float]] = field(default_factory=dict)
    cases: list[tuple[Case, list[Measured]]] = field(default_factory=list)
    curves: list[tuple[Curve, list[Point]]] = field(default_factory=list)
    situations: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    took_s: float = 0.0

    def situation(self, name: str, figure: str) -> float:
        """The median of a figure over the rounds of a situation; NaN if it was not measured."""
        values = [found[figure] for found in self.situations.get(name, []) if figure in found]
        return statistics.median(values) if values else float("nan")

    def find(self, subject: Subject, model: Model, **load: int) -> Measured | None:
        """What a subject did in the case of a model whose load has these values; None if it was not measured."""
        for case, measured in self.cases:
            if case.model == model and all(getattr(case, name) == value for name, value in load.items()):
                for one in measured:
                    if one.subject == subject and one.runs:
                        return one
        return None

    def to_json(self) -> str:
        """As text that ``from_json`` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what ``to_json`` wrote."""
        read = json.loads(text)
        read["cases"] = [
            (Case(**_load(case)), [Measured(**one) for one in measured]) for case, measured in read["cases"]
        ]
        read["curves"] = [(Curve(**_load(curve)), [Point(**one) for one in points]) for curve, points in read["curves"]]
        return cls(**read)


def _load(given: dict[str, Any]) -> dict[str, Any]:
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return given | lists | {"model": Model(**given["model"])}


def describe_host() -> dict[str, str]:
    """What figures depend on: processor, cores, memory, versions, date, and how busy it was."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    } | _versions(_LIBRARIES)


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_settings(settings: Settings) -> dict[str, Any]:
    """How it was measured."""
    return {
        "runs of what a target rests on": settings.runs,
        "seconds of each of those; others are shorter by a third": settings.seconds,
        "threads inside one run of a model": settings.threads,
        "the client's event loop": event_loop(),
    }
