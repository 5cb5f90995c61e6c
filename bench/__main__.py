"""Run the benchmark: ``python -m bench``. Owns its order and what is said meanwhile; measures nothing itself."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from bench import report
from bench.cases import CASES
from bench.measure import Settings, measure
from bench.results import Results, describe_host, describe_settings
from bench.situations import SITUATIONS

_DESCRIPTION = """\
Measure the server, always beside its ceilings and its peers, in one run on one machine.

Ceilings: the same graph alone in onnxruntime at the rows per tick that the server had, and an echo of the same messages
through gRPC. Peers: the server that one writes first (a dict of states, one run a step), and Triton with its sequence
batcher, installed into the benchmark's folder on the first run; where it cannot be had, its lines say so.

What a step costs is the CPU time, user and system, of the server's whole process tree over the steps that were
answered: the client runs on the same machine and takes a core of its own.
"""


def main() -> int:
    """Measure what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/performance"), help="where results go [%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="models and peers [%(default)s]")
    parser.add_argument("--runs", type=int, default=3, help="of each subject; the median counts [%(default)s]")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="inside one run of a model [%(default)s]")
    parser.add_argument("--only", metavar="TEXT", help="cases and situations whose title has this in it")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw and tabulate what is in --out anew")
    options = parser.parse_args()
    console = Console(highlight=False)
    if options.draw:
        results = Results.from_json((options.out / "results.json").read_text())
        return _write(results, options.out, console)
    settings = Settings(options.folder, options.runs, options.seconds, options.threads)
    cases = [case for case in CASES if options.only is None or options.only in case.title]
    situations = [name for name in SITUATIONS if options.only is None or options.only in name]
    if not cases and not situations:
        titles = [*(case.title for case in CASES), *SITUATIONS]
        parser.error("none has that in its title; there are:\n  " + "\n  ".join(titles))
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(describe_host(), describe_settings(settings))
    console.print("; ".join(f"{name} {value}" for name, value in results.host.items()))
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        with console.status("") as status:
            head = f"{number}/{len(cases)}  {time.perf_counter() - began:4.0f} s  "
            if not console.is_terminal:
                console.print(f"{head}{case.title}")

            def say(text: str, head: str = head, status: Status = status) -> None:
                status.update(head + text)

            measured = measure(case, settings, say)
        results.cases.append((case, measured))
        console.print(report.table(case, measured), "")
    for name in situations:
        console.print(f"      {time.perf_counter() - began:4.0f} s  {name}")
        with console.status("") as status:
            runs = [SITUATIONS[name](settings, status.update) for _ in range(settings.runs)]
        results.situations[name] = runs
        for figure, value in report.situation_rows(results, name):
            console.print(f"  {figure:<24} {value}")
    console.print(f"{time.perf_counter() - began:.0f} s in all")
    return _write(results, options.out, console)


def _write(results: Results, folder: Path, console: Console) -> int:
    drawn = Table(title="What was to be reached", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("figure", "to reach", "measured", ""):
        drawn.add_column(column)
    for line in report.targets(results):
        drawn.add_row(*line)
    console.print(drawn)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.to_json() + "\n")
    (folder / "tables.md").write_text(report.page(results))
    for path in report.draw(results, folder):
        console.print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
