"""The benchmark on a device, for people: tables for the terminal and for a page, and pictures. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.gpu_cases import Stack
from bench.gpu_floor import floor_s, link_s
from bench.gpu_results import TARGETS, Measured, Results
from bench.report import markdown, terminal

_TICKS = (
    "rows",
    "steps",
    "engine",
    "torch",
    "ratio",
    "with copies",
    "torch, copies",
    "ratio, copies",
    "p99",
    "torch's p99",
    "floor",
    "of the floor",
    "copies' floor",
)
_OTHERS = ("", "steps/s", "p50", "p99", "rows/tick", "over")
_TARGET = ("figure", "to reach", "measured", "")
_NAMES = {
    "engine": "engine on the device",
    "engine_cpu": "engine on the CPU, with the CPU's lowering",
    "service": "through the service",
}


def tick_lines(results: Results, stack: Stack) -> list[list[str]]:
    """A line for each shape of tick of a stack."""
    lines = []
    for one in results.ticks:
        if one.case.stack != stack:
            continue
        at_best = floor_s(one.case, results.rates)
        per_s = one.case.rows * one.case.steps
        lines.append(
            [
                f"{one.case.rows:,}",
                str(one.case.steps),
                _show(one.median("engine_device"), "{:,.0f}"),
                _show(one.median("torch_device"), "{:,.0f}"),
                _show(one.ratio("engine_device", "torch_device"), "{:.2f}"),
                _show(one.median("engine"), "{:,.0f}"),
                _show(one.median("torch"), "{:,.0f}"),
                _show(one.ratio("engine", "torch"), "{:.2f}"),
                _show(one.median("engine", "p99_ms"), "{:.3g} ms"),
                _show(one.median("torch", "p99_ms"), "{:.3g} ms"),
                f"{at_best * 1e3:.3g} ms",
                _show(one.median("engine_device") * at_best / per_s, "{:.0%}"),
                f"{link_s(one.case, results.rates) * 1e3:.3g} ms",
            ]
        )
    return lines


def other_lines(measured: Measured) -> list[list[str]]:
    """A line for each subject of a case; each one's steps per second over the next one's."""
    subjects = [*measured.runs, *measured.missing]
    lines = []
    for subject, other in zip(subjects, [*subjects[1:], ""], strict=True):
        if subject in measured.missing and subject not in measured.runs:
            lines.append([_NAMES[subject], f"not measured: {measured.missing[subject]}"])
            continue
        lines.append(
            [
                _NAMES[subject],
                f"{measured.median(subject):,.0f}",
                _show(measured.median(subject, "p50_ms"), "{:.3g} ms"),
                _show(measured.median(subject, "p99_ms"), "{:.3g} ms"),
                _show(measured.median(subject, "rows_per_tick"), "{:.1f}"),
                _show(measured.ratio(subject, other) if other else math.nan, "{:.3g}"),
            ]
        )
    return lines


def tick_table(results: Results, stack: Stack) -> Table:
    """One stack's ticks, for a terminal."""
    return terminal(f"{stack.title}: steps/s", _TICKS, tick_lines(results, stack))


def other_table(measured: Measured) -> Table:
    """One case, for a terminal."""
    return terminal(measured.case.title, _OTHERS, other_lines(measured))


def target_table(results: Results) -> Table:
    """What was to be reached, for a terminal."""
    return terminal("What was to be reached", _TARGET, [target.line(results) for target in TARGETS])


def page(results: Results, pictures: Sequence[str]) -> str:
    """The page with all tables, and links to pictures beside it."""
    text = ["# On a GPU: every figure", "", "Written by `python -m bench.gpu`;"]
    text += ["[performance.md](../../performance.md#on-a-gpu) says how to read it.", "", circumstances(results), ""]
    if results.device == "cuda":
        text += [*markdown(_TARGET, [target.line(results) for target in TARGETS]), ""]
    else:
        text += ["**Not run on a GPU.** Whether the benchmark works is all that this shows.", ""]
    text += [line for name in pictures for line in (f"![{name.partition('.')[0]}]({name})", "")]
    for stack in _stacks(results):
        text += [f"## {stack.title}: steps/s", "", *markdown(_TICKS, tick_lines(results, stack)), ""]
    for one in [*results.lowered, *results.served]:
        text += [f"## {one.case.title}", "", *markdown(_OTHERS, other_lines(one)), ""]
    return "\n".join(text)


def circumstances(results: Results) -> str:
    """Where it ran, how, and what the device did at most."""
    host = "; ".join(f"{name} {value}" for name, value in results.host.items())
    settings = "; ".join(f"{name}: {value}" for name, value in results.settings.items())
    rates = results.rates
    return (
        f"Host: {host}.\n\nSettings: {settings}. The whole benchmark took {results.took_s / 60:.1f} minutes.\n\n"
        f"Rates seen: {rates.memory_bytes_per_s / 1e9:,.0f} GB/s in the device's memory, "
        f"{rates.operations_per_s / 1e12:,.2f} T operations/s in float32, "
        f"{rates.up_bytes_per_s / 1e9:,.1f} GB/s up, {rates.down_bytes_per_s / 1e9:,.1f} GB/s down."
    )


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw steps per second against rows, a picture for each cell; return the files."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    from bench.plots import STYLE

    files = []
    with pyplot.rc_context(STYLE):
        for cell in dict.fromkeys(stack.cell for stack in _stacks(results)):
            stacks = [stack for stack in _stacks(results) if stack.cell == cell]
            figure, panels = pyplot.subplots(
                1, len(stacks), figsize=(4.2 * len(stacks), 4.2), layout="constrained", squeeze=False
            )
            for axes, stack in zip(panels[0], stacks, strict=True):
                _draw_stack(axes, results, stack)
            panels[0][0].set_ylabel("steps a second")
            handles, names = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
            files.append(folder / f"{cell}.svg")
            figure.savefig(files[-1], metadata={"Date": None})
            pyplot.close(figure)
    return files


def _draw_stack(axes: Any, results: Results, stack: Stack) -> None:
    from bench.plots import logarithmic

    found = [one for one in results.ticks if one.case.stack == stack]
    for steps, style in ((16, "-"), (1, "--")):
        ticks = [one for one in found if one.case.steps == steps]
        rows = [one.case.rows for one in ticks]
        said = f"{steps} step{'s' if steps > 1 else ''}"
        lines = {
            f"engine, {said}": ("#0f8b8d", [one.median("engine_device") for one in ticks]),
            f"torch, {said}": ("#ec9a29", [one.median("torch_device") for one in ticks]),
            f"floor, {said}": (
                "#b9b4c7",
                [one.case.rows * steps / floor_s(one.case, results.rates) for one in ticks],
            ),
        }
        for label, (colour, values) in lines.items():
            axes.plot(rows, values, style, marker="o", markersize=3, color=colour, label=label)
    axes.set_title(stack.title, loc="left", fontsize=10)
    axes.set_xlabel("rows of a tick")
    logarithmic(axes.xaxis)
    axes.set_yscale("log")


def _stacks(results: Results) -> Iterable[Stack]:
    return list(dict.fromkeys(one.case.stack for one in results.ticks))


def _show(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)
