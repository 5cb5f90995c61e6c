"""What the command line prints: what was compared, and what a precision costs and gains.

Owns tables and lines, and that no text out of a file speaks to the terminal. Must not know how any of it was measured.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.manifest import LayerSpec, Parity


def parity_table(parity: Parity) -> Table:
    """One line for each row of the verification; an error over its bound stands out."""
    table = Table(title=f"Largest errors against {plain(parity.reference)}", caption=plain(parity.provider))
    table.add_column("compared")
    for heading in ("batch", "steps", "outputs", "states", "bound"):
        table.add_column(heading, justify="right")
    for row in parity.rows:
        errors = (f"{e:.1e}" if e <= row.bound else f"[bold red]{e:.1e}[/]" for e in (row.outputs, row.states))
        table.add_row(plain(row.case), str(row.batch), str(row.steps), *errors, f"{row.bound:.0e}")
    return table


def cost_table(precision: str, before: dict[str, float], after: dict[str, float], loss: float) -> Table:
    """What a precision gains and costs: each measure in float32 and in it, and the largest error beside them.

    Args:
        precision: its name.
        before: the measures in float32, by what they are.
        after: the same in this precision.
        loss: the largest error of the verification.
    """
    table = Table(title=f"float32 against {precision}", caption=f"Largest error: {loss:.1e}. CPU, one step a run.")
    table.add_column("")
    for heading in ("float32", precision, "ratio"):
        table.add_column(heading, justify="right")
    for what, value in before.items():
        table.add_row(what, f"{value:,.0f}", f"{after[what]:,.0f}", f"{after[what] / value:.2f}")
    return table


def layer_line(number: int, layer: LayerSpec) -> str:
    """One layer in one line, as markup."""
    kind = "with peepholes, " if layer.peepholes else ""
    kind += f"reset {layer.reset}, " if layer.cell == "gru" else ""
    kind += "bidirectional, " if layer.bidirectional else ""
    return plain(
        f"layer {number}: {layer.cell} {layer.input_size} -> {layer.hidden_size}, {kind}lowered to {layer.lowering}"
    )


def print_written(path: Path, console: Console, what: str = "written") -> None:
    """Say that a file is there, or what else was done with it."""
    console.print(f"[green]{what}[/] {escape(str(path))}", highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Any text as it can stand in markup: it is neither markup nor what a terminal would obey."""
    return escape(printable(text))


def printable(text: str, length: int = 500) -> str:
    """A text of a file as it can stand in a terminal: one line, nothing that a terminal would obey, not too long."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:length])
    return shown if len(text) <= length else f"{shown}..."
