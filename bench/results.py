"""What a whole benchmark found: every case with its subjects, and the host it ran on. JSON out and in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.cases import Case, Subject
from bench.measure import Measured, Settings
from bench.models import Model

_LIBRARIES = ("grpcio", "numpy", "onnxruntime", "protobuf")


@dataclass(slots=True)
class Results:
    """All of one benchmark.

    Attributes:
        host: what it ran on, by name.
        settings: how, by name.
        cases: each with what was measured.
        situations: the figures of each run, by situation.
    """

    host: dict[str, str]
    settings: dict[str, Any]
    cases: list[tuple[Case, list[Measured]]] = field(default_factory=list)
    situations: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def situation(self, name: str, figure: str) -> float:
        """The median of a figure over the runs of a situation; NaN if it was not measured."""
        values = [run[figure] for run in self.situations.get(name, []) if figure in run]
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
        cases = [{"case": asdict(case), "measured": [asdict(one) for one in measured]} for case, measured in self.cases]
        whole = {"host": self.host, "settings": self.settings, "cases": cases, "situations": self.situations}
        return json.dumps(whole, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what ``to_json`` wrote."""
        read = json.loads(text)
        cases = []
        for entry in read["cases"]:
            given = entry["case"]
            case = Case(**given | {"model": Model(**given["model"]), "subjects": tuple(given["subjects"])})
            cases.append((case, [Measured(**one) for one in entry["measured"]]))
        return cls(read["host"], read["settings"], cases, read["situations"])


def describe_host() -> dict[str, str]:
    """What figures depend on: processor, cores, memory, versions, date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def describe_settings(settings: Settings) -> dict[str, Any]:
    """How it was measured."""
    return {
        "runs of each subject": settings.runs,
        "seconds of each run": settings.seconds,
        "threads inside one run of a model": settings.threads,
    }
