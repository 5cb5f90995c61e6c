"""What the benchmark on a device found: figures, rates, the host; JSON out and in, and what follows from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.gpu_cases import LOWERED, SERVED, TICKS, Case, Stack
from bench.gpu_floor import Rates


@dataclass(slots=True)
class Measured:
    """One case.

    Attributes:
        case: which.
        runs: the figures of each run, by subject.
        missing: why there are none, by subject.
    """

    case: Case
    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def median(self, subject: str, figure: str = "steps_per_s") -> float:
        """The median of a subject's figure over the runs; NaN if it was not measured."""
        values = [run[figure] for run in self.runs.get(subject, []) if figure in run]
        return statistics.median(values) if values else math.nan

    def ratio(self, subject: str, other: str) -> float:
        """Steps per second of one over those of another; NaN if either was not measured."""
        return self.median(subject) / self.median(other)


@dataclass(slots=True)
class Results:
    """All of one benchmark.

    Attributes:
        device: ``cuda``; ``cpu`` where it was only to be seen that the benchmark runs.
        host: what it ran on, by name.
        settings: how, by name.
        rates: of the device.
        ticks: ``engine`` and ``torch`` with x up and y down, ``engine_device`` and ``torch_device`` without.
        lowered: ``engine`` on the device, ``engine_cpu`` with the lowering for the CPU, on the CPU.
        served: ``service``, and ``engine`` at the rows per tick that the service had.
        took_s: how long all of it took.
    """

    device: str
    host: dict[str, str]
    settings: dict[str, Any]
    rates: Rates
    ticks: list[Measured] = field(default_factory=list)
    lowered: list[Measured] = field(default_factory=list)
    served: list[Measured] = field(default_factory=list)
    took_s: float = 0.0

    def to_json(self) -> str:
        """As text that ``from_json`` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what ``to_json`` wrote."""
        read = json.loads(text)
        read["rates"] = Rates(**read["rates"])
        for part in ("ticks", "lowered", "served"):
            read[part] = [
                Measured(**one | {"case": Case(**one["case"] | {"stack": Stack(**one["case"]["stack"])})})
                for one in read[part]
            ]
        return cls(**read)


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that every one of some cases should reach: the case that does worst is what counts.

    Attributes:
        what: for people.
        bound: the least that it should be.
        part: of the results.
        cases: all of that part that it is about.
        subject: whose steps per second are
        other: held against whose.
    """

    what: str
    bound: float
    part: str
    cases: Sequence[Case]
    subject: str
    other: str

    def ratios(self, results: Results) -> dict[Case, float]:
        """The ratio of each case that was measured."""
        found = {
            one.case: one.ratio(self.subject, self.other)
            for one in getattr(results, self.part)
            if one.case in self.cases
        }
        return {case: ratio for case, ratio in found.items() if not math.isnan(ratio)}

    def line(self, results: Results) -> list[str]:
        """What was to be reached, what it is, and whether that is enough. With cases missing, nothing is reached."""
        ratios = self.ratios(results)
        bound = f"at least {self.bound:g}"
        if not ratios:
            return [self.what, bound, "not measured", ""]
        worst = min(ratios, key=ratios.__getitem__)
        enough = sum(ratio >= self.bound for ratio in ratios.values())
        measured = (
            f"{ratios[worst]:.3g} at worst ({worst.title}); "
            f"{enough} of {len(ratios)} shapes reach it, the median is {statistics.median(ratios.values()):.3g}"
        )
        if len(ratios) < len(self.cases):
            return [self.what, bound, f"{measured}; {len(self.cases) - len(ratios)} not measured", "incomplete"]
        return [self.what, bound, measured, "reached" if enough == len(ratios) else "falls short"]


TARGETS = (
    Target(
        "the engine's steps per second over those of torch's cuDNN, 64 rows and more, on the device",
        0.9,
        "ticks",
        [case for case in TICKS if case.rows >= 64],
        "engine_device",
        "torch_device",
    ),
    Target(
        "the same with x up and y down in each tick",
        0.9,
        "ticks",
        [case for case in TICKS if case.rows >= 64],
        "engine",
        "torch",
    ),
    Target(
        "through the whole service, 1,024 sessions, 64 chunks a message, over the engine alone",
        0.8,
        "served",
        SERVED,
        "service",
        "engine",
    ),
    Target(
        "peepholes and reset-before GRU at 256 rows: the lowering for CUDA over the CPU's lowering on the CPU",
        10,
        "lowered",
        LOWERED,
        "engine",
        "engine_cpu",
    ),
)
