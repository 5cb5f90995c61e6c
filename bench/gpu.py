"""Run the benchmark on a device: ``python -m bench.gpu``. Owns its order and what is said meanwhile."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
from rich.console import Console

from bench import gpu_report as report
from bench.gpu_cases import (
    LOWERED,
    QUICK_LOWERED,
    QUICK_SERVED,
    QUICK_TICKS,
    SERVED,
    TICKS,
    Case,
    Device,
    make,
    model_file,
)
from bench.gpu_results import Measured, Results
from bench.gpu_timing import Ticks, measure
from bench.processes import Failed
from bench.progress import Progress
from bench.results import describe_host
from service.engines.provider import why_no_cuda
from service.errors import LoadError

_DESCRIPTION = """\
Measure the engine on CUDA beside torch's LSTM and GRU (cuDNN), beside the least that the device could take, and
through the whole service; in one run on one machine.

  python -m bench.gpu                                 everything; planned for twenty minutes
  python -m bench.gpu --quick                         a few shapes for a moment each: whether it works, not how well
  python -m bench.gpu --quick --device cpu            the same code where there is no GPU; no target is judged
  python -m bench.gpu --only "LSTM 128->512 x 2"      what has this in its title
  python -m bench.gpu --write docs/performance/gpu    everything, into the folder that docs/performance.md links to

Float32 everywhere, TF32 off on both sides. States stay where the model runs. With copies, x comes from pinned host
memory in each tick and y goes there; without, both stay on the device. Subjects take turns within each run.
"""


def main() -> int:
    """Measure what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where [%(default)s]")
    parser.add_argument("--write", type=Path, metavar="DIR", help="where results go [FOLDER/results-gpu]")
    parser.add_argument("--only", default="", metavar="PATTERN", help="what has this in its title, and nothing else")
    parser.add_argument("--runs", type=int, metavar="N", help="of each case; the median counts [3]")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each subject in each run [0.3]")
    parser.add_argument("--quick", action="store_true", help="a few shapes, one run; no target is judged by it")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where models are kept [%(default)s]")
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing; write anew what follows from results.json"
    )
    options = parser.parse_args()
    if options.device == "cpu" and options.write is not None:
        parser.error("--write is for what ran on a GPU; with --device cpu results go to FOLDER/results-gpu")
    folder = options.write or options.folder / "results-gpu"
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    if options.draw:
        return _write(Results.from_json((folder / "results.json").read_text()), folder, console, judge=True)
    if options.device == "cuda" and (missing := _why_no_cuda()):
        print(f"{parser.prog}: {missing}\nWithout a GPU: {parser.prog} --quick --device cpu", file=sys.stderr)
        return 1
    if options.device == "cpu":
        console.print(
            "On the CPU this machine's memory stands in for the device's: it shows that all of it runs, and the"
        )
        console.print("figures mean nothing.", end="\n\n")
    # What loading has to say stands beside a progress line.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    results = Bench(options, console).run()
    if results is None:
        parser.error(f"none has {options.only!r} in its title")
    return _write(results, folder, console, judge=options.device == "cuda" and not options.quick)


def _why_no_cuda() -> str:
    """What is missing for torch, the peer, to run on CUDA: of the machine, of the engine, of torch, in this order."""
    import torch

    if torch.version.cuda is not None and torch.cuda.is_available():
        return ""
    if reason := why_no_cuda():
        return f"CUDA does not start here: {reason}"
    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is built for the CPU, and its cuDNN is what the engine is held against"
        )
    return "torch finds no CUDA device, and the engine does; see what torch.cuda.is_available() warns of"


class Bench:
    """One benchmark.

    Args:
        options: of the command line.
        console: where to say what is found.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.device: Device = options.device
        self.quick: bool = options.quick
        self.folder: Path = options.folder
        self.runs: int = options.runs or (1 if options.quick else 3)
        self.seconds: float = options.seconds or (0.1 if options.quick else 0.3)
        self.cores = len(os.sched_getaffinity(0))
        self.console = console

        def chosen(cases: tuple[Case, ...], quick: tuple[Case, ...]) -> list[Case]:
            return [case for case in (quick if options.quick else cases) if options.only in case.title]

        self.ticks = chosen(TICKS, QUICK_TICKS)
        self.lowered = chosen(LOWERED, QUICK_LOWERED)
        self.served = chosen(SERVED, QUICK_SERVED)

    def run(self) -> Results | None:
        """Measure; None if there is nothing to."""
        from bench import gpu_peer as peer

        cases = [*self.ticks, *self.lowered, *self.served]
        if not cases:
            return None
        a_run = self.seconds * 1.3 + 0.1
        expected_s = self.runs * a_run * (4 * len(self.ticks) + 2 * len(self.lowered)) + 20 * len(self.served)
        progress = Progress(self.console, expected_s + 10, time.perf_counter)
        peer.prepare(self.cores)
        for stack in dict.fromkeys(case.stack for case in cases):
            with progress.stage(f"{stack.title}: its file", 0):
                make(stack, self.folder, progress.say)
        with progress.stage("what the device does at most", 10):
            rates = peer.rates(self.device, self.quick)
        results = Results(self.device, describe_host() | peer.describe(self.device), self._settings(), rates)
        for stack in dict.fromkeys(case.stack for case in self.ticks):
            mine = [case for case in self.ticks if case.stack == stack]
            with progress.stage(stack.title, self.runs * a_run * 4 * len(mine)):
                results.ticks += self._measure_ticks(mine, progress.say)
            self.console.print(report.tick_table(results, stack), "")
        for case in self.lowered:
            with progress.stage(case.title, self.runs * a_run * 2):
                results.lowered.append(self._measure_lowered(case, progress.say))
            self.console.print(report.other_table(results.lowered[-1]), "")
        for case in self.served:
            with progress.stage(case.title, 20):
                results.served.append(self._measure_served(case, progress.say))
            self.console.print(report.other_table(results.served[-1]), "")
        results.took_s = progress.elapsed_s()
        return results

    def _settings(self) -> dict[str, object]:
        return {
            "runs": self.runs,
            "seconds of each subject in each": self.seconds,
            "threads of what runs on the CPU": self.cores,
        }

    def _measure_ticks(self, cases: list[Case], say: Callable[[str], None]) -> list[Measured]:
        from bench.gpu_peer import peer_ticks

        engine_ticks = self._load(
            model_file(cases[0].stack, self.folder), self.device, max(case.rows for case in cases), self.device == "cpu"
        )
        found = [Measured(case) for case in cases]
        for number in range(1, self.runs + 1):
            for one in found:
                say(f"{one.case.title}, run {number} of {self.runs}")
                for copies, suffix in ((False, "_device"), (True, "")):
                    self._one(one, f"engine{suffix}", partial(engine_ticks, one.case, copies))
                    self._one(one, f"torch{suffix}", partial(peer_ticks, one.case, self.device, copies))
        return found

    def _measure_lowered(self, case: Case, say: Callable[[str], None]) -> Measured:
        found = Measured(case)
        path = model_file(case.stack, self.folder)
        engines = {
            "engine": self._load(path, self.device, case.rows, self.device == "cpu"),
            "engine_cpu": self._load(path, "cpu", case.rows),
        }
        for number in range(1, self.runs + 1):
            for subject, engine_ticks in engines.items():
                say(f"{case.title}: {subject}, run {number} of {self.runs}")
                self._one(found, subject, partial(engine_ticks, case, True))
        return found

    def _measure_served(self, case: Case, say: Callable[[str], None]) -> Measured:
        from bench.gpu_service import measure_service, serving

        found = Measured(case)
        # The server and the client's processes share the machine.
        clients = max(count for count in (1, 2, 4, 8) if count == 1 or count <= self.cores // 2)
        try:
            with serving(case.stack, self.folder, self.device) as server:
                figures = measure_service(case, server, clients, 0.5 if self.quick else 3.0, say)
        except (Failed, OSError) as error:
            found.missing["service"] = str(error)
            return found
        found.runs["service"] = [figures]
        rows, steps = max(1, round(figures["rows_per_tick"])), max(1, round(figures["steps_per_row"]))
        # On the CPU the server has no device either.
        engine_ticks = self._load(model_file(case.stack, self.folder), self.device, rows)
        alone = replace(case, rows=rows, steps=steps)
        say(f"{alone.title}: the engine alone")
        self._one(found, "engine", partial(engine_ticks, alone, True), rows * steps)
        return found

    def _load(self, path: Path, device: Device, rows: int, stand_in: bool = False) -> Callable[[Case, bool], Ticks]:
        """Load an engine and return its ticks; where it does not load, asking for them says why."""
        from bench.gpu_engine import Engine

        try:
            return Engine(path, device, self.cores, rows, stand_in).ticks
        except LoadError as error:
            why = str(error)

        def refuse(case: Case, copies: bool) -> Ticks:
            raise LoadError(why)

        return refuse

    def _one(self, found: Measured, subject: str, make_ticks: Callable[[], Ticks], steps: int = 0) -> None:
        """One run of a subject. One that fails, for want of memory say, is told and leaves the others."""
        try:
            figures = measure(make_ticks(), steps or found.case.rows * found.case.steps, self.seconds)
        except Exception as error:
            found.missing[subject] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            return
        found.runs.setdefault(subject, []).append(figures)


def _write(results: Results, folder: Path, console: Console, judge: bool) -> int:
    console.print(report.target_table(results) if judge else "no target is judged: this was not a whole run on a GPU")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.to_json() + "\n")
    try:
        pictures = report.draw(results, folder)
    except ImportError as error:
        console.print(f"no pictures: {error}; python -m bench.gpu --draw makes them from results.json elsewhere")
        pictures = []
    (folder / "README.md").write_text(report.page(results, [path.name for path in pictures]))
    for path in (folder / "results.json", folder / "README.md", *pictures):
        console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
