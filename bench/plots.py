"""Results in pictures, as SVG that looks the same wherever the same figures are drawn. Measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import Curve
from bench.measure import Point
from bench.models import LARGE, SMALL, Model
from bench.report import NAMES
from bench.results import Results

_COLOURS = {
    "conveyor": "#0f8b8d",
    "inference": "#7cc6c3",
    "loop": "#ec9a29",
    "triton": "#a8201a",
    "echo": "#b9b4c7",
    "compute": "#5c5470",
}
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    # A ground of its own reads on a dark page and on a light one.
    "figure.facecolor": "#faf9f5",
    "axes.facecolor": "#faf9f5",
    "svg.fonttype": "none",
    "svg.hashsalt": "conveyor",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures for which there are figures.

    Returns:
        The files.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    files = []
    with pyplot.rc_context(_STYLE):
        for name, figure in (("latency", _latency(results)), ("rows", _rows(results)), ("cost", _cost(results))):
            if figure is not None:
                files.append(folder / f"{name}.svg")
                figure.savefig(files[-1], metadata={"Date": None})
                pyplot.close(figure)
    return files


def _latency(results: Results) -> Any:
    """Latency against throughput: one panel a curve, p50 drawn through and p99 dashed."""
    from matplotlib import pyplot

    if not results.curves:
        return None
    figure, panels = pyplot.subplots(
        1, len(results.curves), figsize=(5.2 * len(results.curves), 4.8), layout="constrained", squeeze=False
    )
    for axes, (curve, points) in zip(panels[0], results.curves, strict=True):
        for subject in curve.subjects:
            _line(axes, subject, [point for point in points if point.subject == subject])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("steps answered per second")
        axes.set_title(_curve_title(curve), loc="left", fontsize=10)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    panels[0][0].set_ylabel("milliseconds from due to answered")
    figure.suptitle(
        "Latency against throughput: rates rise until one does not keep up (hollow)", x=0.01, ha="left", weight="bold"
    )
    return figure


def _line(axes: Any, subject: str, points: list[Point]) -> None:
    for name, style in (("p50_ms", "-"), ("p99_ms", "--")):
        axes.plot(
            [point.figures["steps_per_s"] for point in points],
            [point.figures[name] for point in points],
            style,
            color=_COLOURS[subject],
            label=f"{NAMES[subject].removeprefix('peer: ')}, {name.partition('_')[0]}",
        )
        for point in points:
            axes.plot(
                [point.figures["steps_per_s"]],
                [point.figures[name]],
                "o",
                color=_COLOURS[subject],
                markersize=4,
                fillstyle="full" if point.kept_up else "none",
            )


def _curve_title(curve: Curve) -> str:
    chunks = f"{curve.chunks} chunk{'s' if curve.chunks > 1 else ''} a message"
    return f"{curve.model.title}\n{curve.sessions} sessions, {chunks}"


def _rows(results: Results) -> Any:
    """Rows per tick of every case."""
    from matplotlib import pyplot

    found = [
        (case.title, one.median("rows_per_tick"))
        for case, measured in results.cases
        for one in measured
        if one.subject == "conveyor" and one.runs
    ]
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(11, 0.36 * len(found) + 1.5), layout="constrained")
    axes.barh([title for title, _ in found], [value for _, value in found], color=_COLOURS["conveyor"])
    for at, (_, value) in enumerate(found):
        axes.text(value, at, f" {value:.1f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("rows that one run of the model answered, on average")
    axes.set_title("Rows per tick", loc="left", weight="bold")
    axes.grid(axis="y", visible=False)
    return figure


def _cost(results: Results) -> Any:
    """The server's CPU per step, of those who are measured in some cases."""
    from matplotlib import pyplot

    wanted = [(SMALL, 64, 1), (SMALL, 64, 64), (LARGE, 64, 64), (LARGE, 256, 64)]
    shown = [(case, bars) for case in wanted if (bars := _bars(results, *case))]
    if not shown:
        return None
    figure, panels = pyplot.subplots(
        1, len(shown), figsize=(3.5 * len(shown), 4.8), layout="constrained", squeeze=False
    )
    for axes, ((model, sessions, chunks), bars) in zip(panels[0], shown, strict=True):
        names = [NAMES[subject].replace(": ", ":\n").replace(", ", ",\n") for subject, _ in bars]
        axes.bar(names, [value for _, value in bars], color=[_COLOURS[subject] for subject, _ in bars])
        for at, (_, value) in enumerate(bars):
            axes.text(at, value, f"{value:,.3g}", ha="center", va="bottom", fontsize=9)
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
        axes.set_title(f"{model.title}\n{sessions} sessions, {chunks} a message", loc="left", fontsize=10)
        axes.grid(axis="x", visible=False)
    panels[0][0].set_ylabel("microseconds of CPU per step")
    figure.suptitle("What a step costs", x=0.01, ha="left", weight="bold")
    return figure


def _bars(results: Results, model: Model, sessions: int, chunks: int) -> list[tuple[str, float]]:
    for case, measured in results.cases:
        if (case.model, case.sessions, case.chunks, case.steps) == (model, sessions, chunks, 1):
            return [(one.subject, one.median("cpu_us_per_step")) for one in measured if one.runs]
    return []
