"""What the command line prints: what was compared, and what a precision costs and gains.

Owns tables and lines. Must not know how any of it was measured.
"""

from __future__ import annotations

from rich.table import Table

from service.manifest import LayerSpec, Parity


def parity_table(parity: Parity) -> Table:
    """One line for each row of the verification; an error over its bound stands out."""
    table = Table(title=f"Largest errors against {parity.reference}", caption=parity.provider)
    table.add_column("compared")
    for heading in ("batch", "steps", "outputs", "states", "bound"):
        table.add_column(heading, justify="right")
    for row in parity.rows:
        errors = (f"{e:.1e}" if e <= row.bound else f"[bold red]{e:.1e}[/]" for e in (row.outputs, row.states))
        table.add_row(row.case, str(row.batch), str(row.steps), *errors, f"{row.bound:.0e}")
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
    """One layer in one line."""
    kind = "with peepholes, " if layer.peepholes else ""
    kind += f"reset {layer.reset}, " if layer.cell == "gru" else ""
    kind += "bidirectional, " if layer.bidirectional else ""
    return f"layer {number}: {layer.cell} {layer.input_size} -> {layer.hidden_size}, {kind}lowered to {layer.lowering}"
