"""What ``inspect`` prints of a file, so that nothing in the file speaks to the terminal.

Owns tables and lines. Must not know how any of it was found out, nor what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.inspect.anatomy import Anatomy, Recurrence
from export.inspect.proposal import Proposal, quoted
from export.inspect.shapes import shape_text
from export.show import layer_line, parity_table, plain, printable
from service.graphs.description import NAME
from service.graphs.placement import Placement
from service.manifest import Manifest

MAX_LINES = 100


def print_own(manifest: Manifest, recurrences: list[Recurrence], console: Console) -> None:
    """What a file says of itself, and where its nodes would run."""
    table = _table("What the file's manifest says", "", "", "dtype", "axes", "batch", "time")
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            table.add_row(kind, *_row(tensor.name, tensor.dtype, tensor.shape, tensor.batch_axis, tensor.time_axis))
    if manifest.lengths:
        table.add_row("lengths", *_row(manifest.lengths, manifest.lengths_dtype, (None,), 0, None))
    for state in manifest.states:
        names = f"{state.input} -> {state.output}"
        table.add_row("state", *_row(names, state.dtype, state.shape, state.batch_axis, None))
    console.print(table)
    for number, layer in enumerate(manifest.layers, start=1):
        console.print(layer_line(number, layer), highlight=False)
    if manifest.parity is not None:
        console.print(parity_table(manifest.parity))
    console.print("All of it is as the file says; python -m export verify FILE holds the file against it.")
    _print_recurrences(recurrences, console)


def _row(
    name: str, dtype: str, shape: Sequence[int | None], batch: int | None, time: int | None
) -> tuple[str, str, str, str, str]:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return (
        escape(quoted(name)),
        dtype,
        escape(f"[{sizes}]"),
        "" if batch is None else str(batch),
        "" if time is None else str(time),
    )


def print_anatomy(path: Path, anatomy: Anatomy, console: Console) -> None:
    """What a file holds."""
    opsets = ", ".join(f"{printable(domain)} {version}" for domain, version in anatomy.opsets.items())
    lines = [
        f"{printable(path.name)}: made by {printable(anatomy.producer) or 'nobody who says so'}, operators of {opsets}",
        f"{anatomy.initializers} initializers of {anatomy.initializer_bytes:,} bytes together",
        *(f"external data in {printable(location)}" for location in anatomy.external),
    ]
    print_lines(lines, console)
    table = _table("What goes in and comes out", "", "", "dtype", "axes")
    for kind, tensors in (("input", anatomy.inputs), ("output", anatomy.outputs)):
        for tensor in tensors:
            table.add_row(kind, escape(quoted(tensor.name)), tensor.dtype, plain(shape_text(tensor.axes)))
    console.print(table)
    _print_recurrences(anatomy.recurrences, console)
    baked = (*anatomy.baked, *anatomy.lengths, *anatomy.steps.values())
    print_lines((f"baked in: {line}" for line in baked), console)
    says = "begins anew in every run: no input of the graph carries its state"
    print_lines((f"hidden: {node} {says}" for node in anatomy.hidden), console)
    if not anatomy.flow.whole:
        print_lines(["the graph has more nodes than are followed; what stands below may lack evidence"], console)


def _print_recurrences(recurrences: list[Recurrence], console: Console) -> None:
    if not recurrences:
        console.print("No recurrent nodes: if it has states, ordinary operators compute them.")
        return
    table = _table("Recurrent nodes and bodies, and where onnxruntime runs them", "node", "attributes", "CPU", "CUDA")
    for each in recurrences[:MAX_LINES]:
        attributes = (f"{name}={_value(value)}" for name, value in each.attributes.items())
        table.add_row(
            plain(f"{each.operator} {each.path}"),
            plain(", ".join(attributes)),
            _where(each.cpu, "cpu"),
            _where(each.cuda, "cuda"),
        )
    console.print(table)
    if len(recurrences) > MAX_LINES:
        console.print(f"and {len(recurrences) - MAX_LINES} more")


def _where(placement: Placement, device: str) -> str:
    if placement.runs_on == device:
        return f"[green]{'runs' if device == 'cpu' else 'should run'}[/]"
    what = "refused" if placement.runs_on is None else "not on CUDA"
    return f"[red]{what}[/]: {plain(placement.reason or '')}"


def print_proposal(proposal: Proposal, console: Console) -> None:
    """The model.yaml that is proposed, and how its pairs are known."""
    print_lines((f"paired: {line}" for line in proposal.evidence), console)
    console.print(f"\nA {NAME} for it:\n")
    console.print(proposal.text, markup=False, highlight=False, soft_wrap=True)


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Lines that may hold what stands in the file."""
    for number, line in enumerate(lines):
        if number == MAX_LINES:
            console.print("and more")
            return
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
