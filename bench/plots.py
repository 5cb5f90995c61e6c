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
    "bare": "#8a7f9e",
    "echo": "#b9b4c7",
    "compute": "#5c5470",
}
STYLE: Any = {
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
    with pyplot.rc_context(STYLE):
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
    count = len(results.curves)
    figure, panels = pyplot.subplots(1, count, figsize=(4.8 * count, 4.8), layout="constrained", squeeze=False)
    labels: dict[str, Any] = {}
    for axes, (curve, points) in zip(panels[0], results.curves, strict=True):
        for subject in curve.subjects:
            _line(axes, subject, [point for point in points if point.subject == subject])
        logarithmic(axes.xaxis)
        logarithmic(axes.yaxis)
        axes.set_xlabel("steps that fall due in a second")
        axes.set_title(_curve_title(curve), loc="left", fontsize=10)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    panels[0][0].set_ylabel("milliseconds from due to answered")
    figure.legend(handles=labels.values(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    title = "Latency against throughput: rates rise until one is not kept up with (hollow)"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def _line(axes: Any, subject: str, points: list[Point]) -> None:
    rates = [point.rate for point in points]
    hollow = [number for number, point in enumerate(points) if not point.kept_up]
    full = [number for number, point in enumerate(points) if point.kept_up]
    for name, style in (("p50_ms", "-"), ("p99_ms", "--")):
        values = [point.figures[name] for point in points]
        label = f"{NAMES[subject].removeprefix('peer: ')}, {name.partition('_')[0]}"
        axes.plot(rates, values, style, marker="o", markersize=4, markevery=full, color=_COLOURS[subject], label=label)
        # A second line without a stroke: one line has one kind of marker.
        axes.plot(rates, values, "o", markersize=5, markevery=hollow, fillstyle="none", color=_COLOURS[subject])


def _curve_title(curve: Curve) -> str:
    chunks = f"{curve.chunks} chunk{'s' if curve.chunks > 1 else ''} a message"
    return f"{curve.model.title}\n{curve.sessions} sessions, {chunks}"


def logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


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
    _across(axes, found, [_COLOURS["conveyor"]] * len(found), "{:.1f}")
    logarithmic(axes.xaxis)
    axes.set_xlabel("rows that one run of the model answered, on average")
    axes.set_title("Rows per tick", loc="left", weight="bold")
    return figure


def _cost(results: Results) -> Any:
    """The server's CPU per step, of those who are measured in some cases."""
    from matplotlib import pyplot

    wanted = [(SMALL, 64, 1), (SMALL, 64, 64), (LARGE, 64, 64), (LARGE, 256, 64)]
    shown = [(case, bars) for case in wanted if (bars := _bars(results, *case))]
    if not shown:
        return None
    heights = [len(bars) + 1.5 for _, bars in shown]
    figure, panels = pyplot.subplots(
        len(shown),
        1,
        figsize=(9, 0.36 * sum(heights) + 0.8),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, ((model, sessions, chunks), bars) in zip(panels[:, 0], shown, strict=True):
        _across(axes, [(NAMES[name], value) for name, value in bars], [_COLOURS[name] for name, _ in bars], "{:,.3g}")
        each = f"{chunks} chunk{'s' if chunks > 1 else ''} a message"
        axes.set_title(f"{model.title}, {sessions} sessions, {each}", loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("microseconds of CPU per step")
    figure.suptitle("What a step costs", x=0.01, ha="left", weight="bold")
    return figure


def _across(axes: Any, bars: list[tuple[str, float]], colours: list[str], form: str) -> None:
    """Bars from left to right, the first on top, each with its number."""
    at = range(len(bars))
    axes.barh(at, [value for _, value in bars], color=colours)
    axes.set_yticks(at, [name for name, _ in bars])
    for height, (_, value) in zip(at, bars, strict=True):
        axes.text(value, height, " " + form.format(value), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _bars(results: Results, model: Model, sessions: int, chunks: int) -> list[tuple[str, float]]:
    for case, measured in results.cases:
        if (case.model, case.sessions, case.chunks, case.steps) == (model, sessions, chunks, 1):
            return [(one.subject, one.median("cpu_us_per_step")) for one in measured if one.runs]
    return []
