"""Draws what came out of the demo: how the prediction sharpens row by row, and how fast the rows were answered.

Owns the look of one PNG. Must not know how the results were measured.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from demo.digits import CLASSES, ROWS, VALUES
from demo.results import Results

INK, PALE, FAINT, PAPER = "#22223b", "#5d5a69", "#e0dace", "#fbf9f4"
RIGHT, WRONG = "#0f8b8d", "#e76f51"
PIXELS = LinearSegmentedColormap.from_list("ink on paper", ["#f4f0e7", "#9a93b0", INK])

_SHOWN = 5
"""Images in the film strips."""
_PITCH_X, _PITCH_Y, _BARS = 11.1, 16.2, 4.2
"""Distance of the film's cells and the height of their bars, in pixels of an image."""


def draw(results: Results, path: Path) -> None:
    """Draws the picture and writes it as PNG, 1650 x 1100 pixels."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(15, 10), dpi=110, facecolor=PAPER)
        count, sessions = len(results.digits.labels), results.sessions
        figure.text(0.035, 0.945, "A digit, one row at a time", fontsize=24, weight="bold")
        figure.text(
            0.035,
            0.915,
            f"{count} handwritten digits that the LSTM had not seen. Each is a session: its rows arrive one by one, "
            f"{sessions} sessions live at a time, and the server names the digit anew after every row.",
            fontsize=10.5,
            color=PALE,
        )
        _film(figure.add_axes((0.035, 0.135, 0.555, 0.745)), results)
        _accuracy(figure.add_axes((0.655, 0.61, 0.315, 0.235)), results)
        _latency(figure.add_axes((0.655, 0.365, 0.315, 0.15)), results)
        _ticks(figure.add_axes((0.655, 0.135, 0.315, 0.135)), results)
        _figures(figure, results)
        figure.savefig(path)


def _film(axes: Axes, results: Results) -> None:
    """Some images, as much of them as had arrived, and beneath each state the probability of every digit."""
    axes.set(xlim=(-4, ROWS * _PITCH_X - 2), ylim=(_SHOWN * _PITCH_Y + 2.6, -3), aspect="equal")
    axes.axis("off")
    caption = (
        f"{_SHOWN} of the {len(results.digits.labels)} images: those whose answer changed most often and ended right, "
        "no two of one digit.\n"
        "The bars say how likely the server holds each digit, 0 to 9, to be; the tallest is its answer:"
    )
    axes.text(0, _SHOWN * _PITCH_Y, caption, va="top", linespacing=1.5, fontsize=9, color=PALE)
    for x, word, colour in ((80.0, "right", RIGHT), (85.7, "wrong", WRONG)):
        place = (x, _SHOWN * _PITCH_Y + 2.45)
        axes.text(*place, word, va="top", ha="right", fontsize=9, weight="bold", color=colour)
    probabilities = results.probabilities
    for row in range(ROWS):
        text = "1 row" if row == 0 else f"{row + 1} rows"
        axes.text(row * _PITCH_X + VALUES / 2, -1.2, text, ha="center", fontsize=9, color=PALE)
    for line, index in enumerate(_telling(results)):
        label = int(results.digits.labels[index])
        top = line * _PITCH_Y
        axes.text(-2.6, top + ROWS / 2, str(label), ha="center", va="center", fontsize=19, weight="bold", color=INK)
        for row in range(ROWS):
            _frame(axes, row * _PITCH_X, top, results.digits.images[index], row + 1)
            _bars(axes, row * _PITCH_X, top + ROWS + _BARS + 0.7, probabilities[index, row], label)


def _frame(axes: Axes, left: float, top: float, image: np.ndarray, arrived: int) -> None:
    """The rows that have arrived; a thin line under the newest; the rest is still blank."""
    axes.add_patch(Rectangle((left, top), VALUES, ROWS, facecolor="none", edgecolor=FAINT, linewidth=0.9))
    axes.imshow(
        image[:arrived], cmap=PIXELS, vmin=0, vmax=1, extent=(left, left + VALUES, top + arrived, top), zorder=2
    )
    axes.plot([left, left + VALUES], [top + arrived] * 2, color=RIGHT, linewidth=1.6, zorder=3, solid_capstyle="butt")


def _bars(axes: Axes, left: float, base: float, probabilities: np.ndarray, label: int) -> None:
    """One bar for each digit; the likeliest in colour, with its name."""
    width, best = VALUES / CLASSES, int(probabilities.argmax())
    colour = RIGHT if best == label else WRONG
    axes.plot([left, left + VALUES], [base] * 2, color=FAINT, linewidth=0.9)
    for digit, probability in enumerate(probabilities):
        height = float(probability) * _BARS
        axes.add_patch(
            Rectangle(
                (left + (digit + 0.12) * width, base - height),
                0.76 * width,
                height,
                facecolor=colour if digit == best else "#cfc9d6",
            )
        )
    axes.text(left + (best + 0.5) * width, base + 0.25, str(best), ha="center", va="top", fontsize=8, color=colour)


def _telling(results: Results) -> list[int]:
    """The images to show: of as many digits, the one each that ends right after the most changes of mind."""
    answers = results.outputs.argmax(axis=2)
    changes = (answers[:, 1:] != answers[:, :-1]).sum(axis=1)
    ends_right = answers[:, -1] == results.digits.labels
    certain = results.probabilities.max(axis=2)[:, -1]
    best: dict[int, int] = {}
    for index in np.lexsort((-certain, -changes, ~ends_right)):
        best.setdefault(int(results.digits.labels[index]), int(index))
    shown = list(best.values())[:_SHOWN]
    return sorted(shown, key=lambda index: int(results.digits.labels[index]))


def _accuracy(axes: Axes, results: Results) -> None:
    rows, accuracy = np.arange(1, ROWS + 1), results.accuracy * 100
    _plain(axes, "Accuracy after each row", "rows arrived", "%")
    axes.axhline(100 / CLASSES, color=PALE, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.text(ROWS + 0.3, 100 / CLASSES + 2, "guessing", ha="right", fontsize=8, color=PALE)
    axes.fill_between(rows, accuracy, color=RIGHT, alpha=0.10, linewidth=0)
    axes.plot(rows, accuracy, color=RIGHT, linewidth=2.2, marker="o", markersize=6, markeredgecolor=PAPER)
    for row, value in zip(rows, accuracy, strict=True):
        axes.annotate(
            f"{value:.1f}",
            (row, value),
            xytext=(-7, 4) if row < ROWS / 2 else (0, 8),
            textcoords="offset points",
            ha="right" if row < ROWS / 2 else "center",
            fontsize=8.5,
            weight="bold" if row == ROWS else "normal",
        )
    axes.set(xlim=(0.3, ROWS + 0.4), ylim=(0, 113), xticks=rows, yticks=[0, 25, 50, 75, 100])


def _latency(axes: Axes, results: Results) -> None:
    milliseconds = results.latencies_s.ravel() * 1e3
    _plain(axes, "Time from a row to its answer", "milliseconds; the slowest 0.3% may lie beyond", "rows")
    # Room to the right of p99 for its name, and above the tallest bar for both.
    p50, p99 = results.latency_ms(50), results.latency_ms(99)
    end = max(float(np.percentile(milliseconds, 99.7)), 1.35 * p99)
    counts, _, _ = axes.hist(milliseconds, bins=70, range=(0, end), color="#b9b2c9", linewidth=0)
    axes.set(xlim=(0, end), ylim=(0, 1.35 * np.max(counts)))
    for name, value, colour in (("p50", p50, RIGHT), ("p99", p99, WRONG)):
        side = "right" if value == p50 > 0.25 * end else "left"
        axes.axvline(value, color=colour, linewidth=1.5)
        axes.annotate(
            f"{name}  {value:.1f} ms",
            (value, 0.87),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if side == "right" else 5, 0),
            textcoords="offset points",
            ha=side,
            color=colour,
            fontsize=8.5,
            weight="bold",
        )


def _ticks(axes: Axes, results: Results) -> None:
    _plain(axes, "Rows that one run of the model answered", "rows in a tick", "ticks")
    bounds = [bound for bound, count in sorted(results.tick_rows.items()) if count]
    shown = [bound for bound in sorted(results.tick_rows) if bound <= max(bounds, default=1)]
    names = [str(b) if b <= 2 else f"{b // 2 + 1}–{b}" for b in shown]
    counts = [results.tick_rows[bound] for bound in shown]
    axes.bar(names, counts, color=RIGHT, width=0.72)
    for place, count in enumerate(counts):
        axes.text(place, count + 0.04 * max(counts, default=1), str(count), ha="center", fontsize=8.5)
    axes.set_ylim(0, 1.22 * max(counts, default=1))


def _plain(axes: Axes, title: str, x: str, y: str) -> None:
    """Gives the axes a title and the labels of the two axes, and takes away what is only decoration."""
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", fontsize=11.5, weight="bold", color=INK, pad=10)
    axes.set_xlabel(x, color=PALE, fontsize=8.5)
    axes.set_ylabel(y, color=PALE, fontsize=8.5)
    axes.tick_params(colors=PALE, length=0, labelsize=8.5)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _figures(figure: Figure, results: Results) -> None:
    """The numbers that matter, large, along the lower edge."""
    figures = (
        (f"{results.accuracy[-1]:.1%}", "named rightly after the last row"),
        (_power_of_ten(results.largest_error), "largest error against NumPy, relative beyond 1"),
        (f"{results.steps_per_second:,.0f}", f"steps per second, {results.sessions} sessions at a time"),
        (f"{results.latency_ms(50):.1f} / {results.latency_ms(99):.1f} ms", "from a row to its answer, p50 / p99"),
        (f"{results.rows_per_tick:.1f}", "rows per tick, on average"),
    )
    figure.add_artist(matplotlib.lines.Line2D([0.035, 0.97], [0.098] * 2, color=FAINT, linewidth=1))
    for place, (value, meaning) in enumerate(figures):
        x = 0.035 + place * 0.2
        figure.text(x, 0.050, value, fontsize=19, weight="bold", color=INK)
        figure.text(x, 0.027, meaning, fontsize=8.5, color=PALE)


def _power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
