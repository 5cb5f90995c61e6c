"""Results for people: tables for the terminal and for a page, and pictures. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.cases import Case
from bench.measure import Measured
from bench.models import LARGE, SMALL, Model
from bench.results import Results
from bench.targets import TARGETS

_NAMES = {
    "conveyor": "Conveyor",
    "inference": "Conveyor, Open Inference Protocol",
    "loop": "peer: the loop one writes first",
    "triton": "peer: Triton",
    "echo": "ceiling: transport alone",
    "compute": "ceiling: the graph alone",
}
_COLOURS = {
    "conveyor": "#0f8b8d",
    "inference": "#7cc6c3",
    "loop": "#ec9a29",
    "triton": "#a8201a",
    "echo": "#b9b4c7",
    "compute": "#5c5470",
}
_COLUMNS = ("steps/s", "CPU/step", "p50", "p99", "rows/tick")


def rows(measured: Iterable[Measured]) -> list[list[str]]:
    """A case's lines: who, then the columns; medians over the runs."""
    lines = []
    for one in measured:
        if not one.runs:
            lines.append([_NAMES[one.subject], f"not measured: {one.why.splitlines()[0] if one.why else ''}"])
            continue
        lines.append(
            [
                _NAMES[one.subject],
                f"{one.median('steps_per_s'):,.0f}",
                f"{one.median('cpu_us_per_step'):,.1f} us",
                _show(one.median("p50_ms"), "{:.2f} ms"),
                _show(one.median("p99_ms"), "{:.2f} ms"),
                _show(one.median("rows_per_tick"), "{:.1f}"),
            ]
        )
    return lines


def table(case: Case, measured: Iterable[Measured]) -> Table:
    """One case, for a terminal."""
    drawn = Table(title=case.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    drawn.add_column("")
    for column in _COLUMNS:
        drawn.add_column(column, justify="right")
    for line in rows(measured):
        drawn.add_row(*line)
    return drawn


def situation_rows(results: Results, name: str) -> list[list[str]]:
    """A situation's lines: figure, median over the runs."""
    figures = dict.fromkeys(figure for run in results.situations.get(name, []) for figure in run)
    return [[figure, f"{results.situation(name, figure):,.4g}"] for figure in figures]


def targets(results: Results) -> list[list[str]]:
    """What was to be reached, what it is, and whether that is enough."""
    lines = []
    for target in TARGETS:
        figure = target.find(results)
        if math.isnan(figure):
            lines.append([target.what, "", "not measured", ""])
            continue
        bound = f"{'at most' if target.most else 'at least'} {target.bound:g}"
        lines.append([target.what, bound, f"{figure:.3g}", "reached" if target.reached(figure) else "falls short"])
    return lines


def page(results: Results) -> str:
    """All tables, in Markdown."""
    host = "; ".join(f"{name} {value}" for name, value in results.host.items())
    settings = "; ".join(f"{name}: {value}" for name, value in results.settings.items())
    text = [f"Host: {host}.", "", f"Settings: {settings}. Medians of the runs.", ""]
    text += ["## What was to be reached", ""]
    text += _markdown(["figure", "to reach", "measured", ""], targets(results))
    text += ["", "## Every case", ""]
    for case, measured in results.cases:
        text += [f"### {case.title}", "", *_markdown(["", *_COLUMNS], rows(measured)), ""]
    for name in results.situations:
        text += [f"### {name[0].upper()}{name[1:]}", "", *_markdown(["", "median"], situation_rows(results, name)), ""]
    return "\n".join(text)


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures.

    Returns:
        The files.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    files = []
    with pyplot.rc_context(style | {"grid.alpha": 0.25, "figure.facecolor": "#faf9f5", "axes.facecolor": "#faf9f5"}):
        files.append(_latency(results, folder / "latency.png"))
        files.append(_rows(results, folder / "rows.png"))
        files.append(_cost(results, folder / "cost.png"))
    return files


def _latency(results: Results, path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for chunks, marker, style in ((1, "o", "-"), (64, "s", "--")):
        points = []
        for case, measured in results.cases:
            if case.model == SMALL and case.chunks == chunks and case.steps == 1:
                points += [
                    (one.median("steps_per_s"), one.median("p50_ms"), one.median("p99_ms"), case.sessions)
                    for one in measured
                    if one.subject == "conveyor" and one.runs
                ]
        if not points:
            continue
        points.sort(key=lambda point: point[3])
        for column, alpha in ((1, 1.0), (2, 0.45)):
            label = f"{chunks} chunk{'s' if chunks > 1 else ''} a message, {'p50' if column == 1 else 'p99'}"
            axes.plot(
                [point[0] for point in points],
                [point[column] for point in points],
                style,
                marker=marker,
                color=_COLOURS["conveyor"],
                alpha=alpha,
                label=label,
            )
        for steps, p50, _, sessions in points:
            axes.annotate(f"{sessions}", (steps, p50), xytext=(6, -12), textcoords="offset points", fontsize=9)
    if axes.lines:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(frameon=False)
    axes.set_xlabel("steps per second")
    axes.set_ylabel("milliseconds from a message to its whole answer")
    axes.set_title(f"{SMALL.title}: latency against throughput, by number of sessions", loc="left", weight="bold")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _rows(results: Results, path: Path) -> Path:
    from matplotlib import pyplot

    found = [
        (case.title, one.median("rows_per_tick"))
        for case, measured in results.cases
        for one in measured
        if one.subject == "conveyor" and one.runs
    ]
    figure, axes = pyplot.subplots(figsize=(11, 0.42 * len(found) + 1.5), layout="constrained")
    axes.barh([title for title, _ in found], [value for _, value in found], color=_COLOURS["conveyor"])
    for at, (_, value) in enumerate(found):
        axes.text(value, at, f" {value:.1f}", va="center", fontsize=9)
    axes.invert_yaxis()
    if found:
        axes.set_xscale("log")
    axes.set_xlabel("rows that one run of the model answered, on average")
    axes.set_title("Rows per tick", loc="left", weight="bold")
    axes.grid(axis="y", visible=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _cost(results: Results, path: Path) -> Path:
    from matplotlib import pyplot

    shown = [(SMALL, 64, 1), (SMALL, 64, 64), (LARGE, 64, 64), (LARGE, 256, 64)]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(14, 4.6), layout="constrained")
    for axes, (model, sessions, chunks) in zip(panels, shown, strict=True):
        bars = _bars(results, model, sessions, chunks)
        names = [_NAMES[subject].replace(": ", ":\n").replace(", ", ",\n") for subject, _ in bars]
        axes.bar(names, [value for _, value in bars], color=[_COLOURS[subject] for subject, _ in bars])
        for at, (_, value) in enumerate(bars):
            axes.text(at, value, f"{value:,.3g}", ha="center", va="bottom", fontsize=9)
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
        axes.set_title(f"{model.title}\n{sessions} sessions, {chunks} a message", loc="left", fontsize=10)
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("microseconds of the server's CPU per step")
    figure.suptitle("What a step costs", x=0.01, ha="left", weight="bold")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(results: Results, model: Model, sessions: int, chunks: int) -> list[tuple[str, float]]:
    for case, measured in results.cases:
        if (case.model, case.sessions, case.chunks, case.steps) == (model, sessions, chunks, 1):
            return [(one.subject, one.median("cpu_us_per_step")) for one in measured if one.runs]
    return []


def _show(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def _markdown(columns: list[str], lines: Iterable[list[str]]) -> list[str]:
    text = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for line in lines:
        padded = [*line, *[""] * (len(columns) - len(line))]
        text.append(f"| {' | '.join(padded)} |")
    return text
