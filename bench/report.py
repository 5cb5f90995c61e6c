"""Results for people, in tables: for the terminal, and for pages in Markdown. Measures and draws nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from rich.table import Table

from bench.cases import Case, Curve
from bench.measure import Measured, Point
from bench.results import Results
from bench.targets import TARGETS

NAMES = {
    "conveyor": "Conveyor",
    "inference": "Conveyor, Open Inference Protocol",
    "loop": "peer: the loop one writes first",
    "triton": "peer: Triton",
    "bare": "ceiling: a bare server in Python",
    "echo": "ceiling: transport alone",
    "compute": "ceiling: the graph alone",
}
_CASE = ("steps/s", "CPU/step", "p50", "p99", "rows/tick", "runs")
_CURVE = ("rate", "steps/s", "CPU/step", "p50", "p99", "")
_TARGET = ("figure", "to reach", "measured", "")


def case_lines(measured: Iterable[Measured]) -> list[list[str]]:
    """A case's lines: who, then the columns; medians over the runs."""
    lines = []
    for one in measured:
        if not one.runs:
            lines.append([NAMES[one.subject], f"not measured: {_last_line(one.why)}"])
            continue
        lost = f", {one.failed} failed" if one.failed else ""
        lines.append(
            [
                NAMES[one.subject],
                f"{one.median('steps_per_s'):,.0f}",
                f"{one.median('cpu_us_per_step'):,.1f} us",
                _show(one.median("p50_ms"), "{:.2f} ms"),
                _show(one.median("p99_ms"), "{:.2f} ms"),
                _show(one.median("rows_per_tick"), "{:.1f}"),
                f"{len(one.runs)}{lost}",
            ]
        )
    return lines


def curve_lines(points: Sequence[Point]) -> list[list[str]]:
    """A curve's lines, subject by subject."""
    subjects = dict.fromkeys(point.subject for point in points)
    return [
        [
            NAMES[point.subject],
            f"{point.rate:,}",
            f"{point.figures['steps_per_s']:,.0f}",
            f"{point.figures['cpu_us_per_step']:,.1f} us",
            _show(point.figures["p50_ms"], "{:.2f} ms"),
            _show(point.figures["p99_ms"], "{:.2f} ms"),
            "" if point.kept_up else "does not keep up",
        ]
        for subject in subjects
        for point in points
        if point.subject == subject
    ]


def situation_lines(results: Results, name: str) -> list[list[str]]:
    """A situation's lines: figure, median over the rounds, and each round's."""
    if name in results.missing:
        return [["not measured", _last_line(results.missing[name]), ""]]
    rounds = results.situations[name]
    figures = dict.fromkeys(figure for found in rounds for figure in found)
    return [
        [
            figure,
            f"{results.situation(name, figure):,.4g}",
            ", ".join(f"{found[figure]:,.4g}" for found in rounds if figure in found),
        ]
        for figure in figures
    ]


def case_table(case: Case, measured: Iterable[Measured]) -> Table:
    """One case, for a terminal."""
    return terminal(case.title, ("", *_CASE), case_lines(measured))


def curve_table(curve: Curve, points: Sequence[Point]) -> Table:
    """One curve, for a terminal."""
    return terminal(curve.title, ("", *_CURVE), curve_lines(points))


def situation_table(results: Results, name: str) -> Table:
    """One situation, for a terminal."""
    return terminal(name, ("", "median", "rounds"), situation_lines(results, name))


def target_table(results: Results) -> Table:
    """What was to be reached, as far as it was measured, for a terminal."""
    found = [target for target in TARGETS if not math.isnan(target.find(results))]
    title = f"What was to be reached: {len(found)} of {len(TARGETS)} measured"
    return terminal(title, _TARGET, [target.line(results) for target in found])


def tables(results: Results) -> str:
    """The page with all tables."""
    text = [
        "# Every figure",
        "",
        "Written by `python -m bench`; [performance.md](../performance.md) says how to read it.",
        "",
    ]
    text += [_circumstances(results), ""]
    for case, measured in results.cases:
        text += [f"## {case.title}", "", *markdown(["", *_CASE], case_lines(measured)), ""]
    for curve, points in results.curves:
        text += [f"## {curve.title}", "", *markdown(["", *_CURVE], curve_lines(points)), ""]
    for name in [*results.situations, *results.missing]:
        title = name[0].upper() + name[1:]
        text += [f"## {title}", "", *markdown(["", "median", "rounds"], situation_lines(results, name)), ""]
    text += [
        "## Parity",
        "",
        "The largest errors against the float64 reference, as export measured them and each file says.",
        "",
    ]
    errors = [[name, f"{loss['outputs']:.1e}", f"{loss['states']:.1e}"] for name, loss in results.parity.items()]
    text += [*markdown(["model", "outputs", "final states"], errors), ""]
    return "\n".join(text)


def fill(page: str, results: Results, folder: str, pictures: Iterable[str]) -> str:
    """A page with its generated parts written anew.

    Args:
        page: in Markdown, each generated part between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
        results: what they are written from.
        folder: of tables and pictures, as the page links to it.
        pictures: file names there.

    Raises:
        KeyError: if the page has a part of another name.
    """
    shown = [line for name in pictures for line in (f"![{name.partition('.')[0]}]({folder}/{name})", "")]
    links = [f"[{folder}/{name}]({folder}/{name})" for name in ("tables.md", "results.json")]
    parts = {
        "circumstances": [_circumstances(results)],
        "targets": markdown(_TARGET, [target.line(results) for target in TARGETS]),
        "pictures": [*shown, f"All figures: {links[0]}, and as data {links[1]}."],
    }

    def write(found: re.Match[str]) -> str:
        return "\n".join([found[1], "", *parts[found[2]], "", found[3]])

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", write, page, flags=re.DOTALL)


def _circumstances(results: Results) -> str:
    host = "; ".join(f"{name} {value}" for name, value in results.host.items())
    settings = "; ".join(f"{name}: {value}" for name, value in results.settings.items())
    loops = "; ".join(f"{NAMES[name]}: {loop}" for name, loop in results.event_loops.items())
    return (
        f"Host: {host}.\n\nSettings: {settings}. Event loops: {loops}. "
        f"The whole benchmark took {results.took_s / 60:.1f} minutes."
    )


def _last_line(text: str) -> str:
    return (text.splitlines() or [""])[-1].strip()


def _show(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def terminal(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A table, for a terminal: what is in the first column on the left, figures on the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number == 0 or columns is _TARGET else "right")
    for line in lines:
        drawn.add_row(*line)
    return drawn


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines, for a page."""
    text = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for line in lines:
        padded = [*line, *[""] * (len(columns) - len(line))]
        text.append(f"| {' | '.join(padded)} |")
    return text
