"""Run the benchmark: ``python -m bench``. Owns its order and what is said meanwhile; measures nothing itself."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from bench import models, plots, report
from bench.cases import CURVES, GROUPS, Case
from bench.measure import Measured, expected_s, measure_case, measure_curve
from bench.models import make, model_file, parity_loss
from bench.processes import Failed
from bench.progress import Progress
from bench.results import Results, describe_host, describe_settings
from bench.servers import TUNING, Servers, Settings
from bench.situations import SITUATIONS

_DESCRIPTION = """\
Measure the server, always beside its ceilings and its peers, in one run on one machine.

  python -m bench                              everything, in less than ten minutes on two cores
  python -m bench --quick                      everything for a moment each: whether it works, not how well
  python -m bench --only "LSTM 64->256, 64"    the cases, curves and situations whose title has this in it
  python -m bench --write docs/performance     everything, into the folder that docs/performance.md shows

Ceilings: the same graph alone in onnxruntime at the rows per tick that the server had; an echo of the same messages
through gRPC; and, where a target rests on a case, a server that makes the steps and keeps no promise. Peers: the server
that one writes first (a dict of states, one run a step), and Triton with its sequence batcher, installed into the
benchmark's folder on the first run; where it cannot be had, its lines say so.

What a step costs is the CPU time, user and system, of the server's whole process tree over the steps that were
answered: the client runs on the same machine and takes a core of its own.
"""
_QUICK_SECONDS = 0.3


def main() -> int:
    """Measure what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="where results.json, tables.md and the pictures go; DIR.md, where there is one, gets its generated parts "
        "written anew [FOLDER/results]",
    )
    parser.add_argument("--only", metavar="PATTERN", help="what has this in its title, and nothing else")
    parser.add_argument("--runs", type=int, metavar="N", help="of what a target rests on; the median counts [3]")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each of those; others take a third less [1.5]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="inside one run of a model [%(default)s]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one run of {_QUICK_SECONDS:g} s each, to see that it works; no target is judged by it",
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="models and peers [%(default)s]")
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing; write anew what follows from results.json"
    )
    options = parser.parse_args()
    folder = options.write or options.folder / "results"
    # Off a terminal rich takes 80 columns, and would break the tables.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if options.draw:
        return _write(Results.from_json((folder / "results.json").read_text()), folder, console, judge=True)
    settings = Settings(
        options.folder,
        options.runs or (1 if options.quick else 3),
        options.seconds or (_QUICK_SECONDS if options.quick else 1.5),
        options.threads,
    )
    results = Results(describe_host(), describe_settings(settings))
    if not _measure(results, settings, options.only or "", console):
        titles = [case.title for case in itertools.chain(*GROUPS)] + [curve.title for curve in CURVES]
        parser.error("none has that in its title; there are:\n  " + "\n  ".join([*titles, *SITUATIONS]))
    return _write(results, folder, console, judge=not options.quick)


def _measure(results: Results, settings: Settings, only: str, console: Console) -> bool:
    """Measure whatever has ``only`` in its title; whether there is any."""
    groups = [[case for case in group if only in case.title] for group in GROUPS]
    curves = [curve for curve in CURVES if only in curve.title]
    situations = {name: situation for name, situation in SITUATIONS.items() if only in name}
    expected = [expected_s(case, settings) for case in itertools.chain(*groups)]
    expected += [expected_s(curve, settings) for curve in curves]
    expected += [situation.expected_s(settings) for situation in situations.values()]
    if not expected:
        return False
    expected += [
        models.expected_s(model, settings.folder) for model in {case.model for group in groups for case in group}
    ]
    settings.folder.mkdir(parents=True, exist_ok=True)
    # What was found out about models on another day is not this benchmark's.
    shutil.rmtree(settings.folder / TUNING, ignore_errors=True)
    console.print("; ".join(f"{name} {value}" for name, value in results.host.items()))
    progress = Progress(console, sum(expected), time.perf_counter)
    for group in filter(None, groups):
        with Servers(settings, progress.say) as servers:
            _measure_group(results, group, servers, progress, console)
            results.event_loops |= servers.event_loops
    for curve in curves:
        with progress.stage(curve.title, expected_s(curve, settings)), Servers(settings, progress.say) as servers:
            points = measure_curve(curve, servers)
            results.event_loops |= servers.event_loops
        results.curves.append((curve, points))
        console.print(report.curve_table(curve, points), "")
    for name, situation in situations.items():
        with progress.stage(name, situation.expected_s(settings)):
            try:
                results.situations[name] = situation.run(settings, progress.say)
            # Files of a process that has ended are gone, and its ports closed.
            except (Failed, OSError) as error:
                results.missing[name] = str(error)
        console.print(report.situation_table(results, name), "")
    results.took_s = progress.elapsed_s()
    console.print(f"{results.took_s:.0f} s in all")
    return True


def _measure_group(results: Results, group: list[Case], servers: Servers, progress: Progress, console: Console) -> None:
    settings = servers.settings
    found = [(case, [Measured(subject) for subject in case.subjects]) for case in group]
    for model in dict.fromkeys(case.model for case in group):
        with progress.stage(f"{model.title}: its file", models.expected_s(model, settings.folder)):
            make(model, settings.folder, progress.say)
            results.parity[model.title] = parity_loss(model_file(model, settings.folder))
    for run in range(1, settings.runs + 1):
        for case, measured in found:
            if run == 1 or case.target:
                runs = settings.runs if case.target else 1
                with progress.stage(f"{case.title}: run {run} of {runs}", expected_s(case, settings) / runs):
                    measure_case(case, servers, measured, run)
            if run == (settings.runs if case.target else 1):
                console.print(report.case_table(case, measured), "")
    results.cases += found


def _write(results: Results, folder: Path, console: Console, judge: bool) -> int:
    quick = "no target is judged: the runs were too short for that"
    console.print(report.target_table(results) if judge else quick)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.to_json() + "\n")
    (folder / "tables.md").write_text(report.tables(results))
    pictures = plots.draw(results, folder)
    page = folder.with_name(folder.name + ".md")
    if page.is_file() and judge:
        page.write_text(report.fill(page.read_text(), results, folder.name, [path.name for path in pictures]))
    for path in (folder / "results.json", folder / "tables.md", *pictures):
        console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
