"""Look into an .onnx file before it is served: ``python -m export inspect FILE``.

Owns the order of what is looked at, and what is printed of it. Must not know how any of it is found out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.describe import read_manifest
from export.errors import ExportError
from export.inspect.anatomy import Anatomy, Recurrence, dissect, shape_text
from export.inspect.proposal import Proposal, propose, quoted
from export.show import layer_line, parity_table
from export.versions import write_file
from service.description import NAME, parse
from service.errors import LoadError
from service.manifest import METADATA_KEY, Manifest
from service.onnx_file import OnnxFile
from service.placement import Placement
from service.presented import present

MAX_TENSORS = 1_000
MAX_LINES = 100
PLAIN_WIDTH = 160
"""Columns of a table that is not printed to a terminal."""


def inspect(path: Path, write: bool, console: Console) -> bool:
    """Print what a file holds, and a model.yaml for it.

    Args:
        path: the .onnx file.
        write: whether to write the proposal as NAME/model.yaml.
        console: where to.

    Returns:
        Whether nothing is left to decide.

    Raises:
        ExportError: it is no such file, its manifest does not hold to the format, or there is no place to write to.
    """
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    if not path.is_file():
        raise ExportError(f"{path} is not a file")
    place = _place(path) if write else None
    try:
        file = OnnxFile(path)
    except LoadError as error:
        raise ExportError(str(error)) from error
    _check(file)
    if METADATA_KEY in file.metadata:
        _print_own(file, read_manifest(file.model), console)
        if place is not None:
            raise ExportError(f"nothing is written: {path} says of itself what a {NAME} would")
        return True
    anatomy = dissect(file)
    _print_anatomy(path, anatomy, console)
    proposal = propose(anatomy)
    _print_proposal(proposal, console)
    if place is not None:
        write_file(place, f"# Proposed by python -m export inspect.\n{proposal.text}".encode())
        console.print(f"[green]written[/] {place}", highlight=False, soft_wrap=True)
    if proposal.decisions:
        console.print(f"The server refuses it until each line with {'decide:'!r} is decided and gone.")
        return False
    _print_refusal(file, proposal, console)
    return True


def _check(file: OnnxFile) -> None:
    """Refuse what no exporter writes, and what could not be printed."""
    graph, name = file.model.graph, file.path.name
    if not graph.node:
        raise ExportError(f"{name} is not an onnx file: it holds no nodes")
    if len(graph.input) + len(graph.output) > MAX_TENSORS:
        raise ExportError(f"{name} has more than {MAX_TENSORS} inputs and outputs")
    # protobuf gives bytes for a text that is none.
    values = [text for value in (*graph.input, *graph.output) for text in _texts(value)]
    nodes = [text for node in file.nodes() for text in _node_texts(node.proto)]
    if not all(isinstance(text, str) for text in (*values, *nodes)):
        raise ExportError(f"{name} is damaged: it has names that are not text")


def _texts(value: Any) -> Iterator[object]:
    yield value.name
    yield from (axis.dim_param for axis in value.type.tensor_type.shape.dim)


def _node_texts(node: Any) -> Iterator[object]:
    yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    yield from (attribute.name for attribute in node.attribute)


def _place(path: Path) -> Path:
    version = path.resolve().parent
    place = version.parent / NAME
    if not version.name.isdecimal():
        raise ExportError(f"--write needs a file of a repository, NAME/VERSION/{path.name}, and writes NAME/{NAME}")
    if place.exists():
        raise ExportError(f"{place} is there already")
    return place


def _print_own(file: OnnxFile, manifest: Manifest, console: Console) -> None:
    table = _table("Exported here", "", "", "dtype", "axes", "batch", "time")
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
        console.print(layer_line(number, layer), highlight=False, markup=False)
    if manifest.parity is not None:
        console.print(parity_table(manifest.parity))
    _print_recurrences(dissect(file).recurrences, console)
    console.print(f"Its manifest says what a {NAME} would: none is needed.")


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


def _print_anatomy(path: Path, anatomy: Anatomy, console: Console) -> None:
    opsets = ", ".join(f"{printable(domain)} {version}" for domain, version in anatomy.opsets.items())
    lines = [
        f"{printable(path.name)}: made by {printable(anatomy.producer) or 'nobody who says so'}, operators of {opsets}",
        f"{anatomy.initializers} initializers of {anatomy.initializer_bytes:,} bytes together",
        *(f"external data in {printable(location)}" for location in anatomy.external),
    ]
    _print_lines(lines, console)
    table = _table("What goes in and comes out", "", "", "dtype", "axes")
    for kind, tensors in (("input", anatomy.inputs), ("output", anatomy.outputs)):
        for tensor in tensors:
            table.add_row(kind, escape(quoted(tensor.name)), tensor.dtype, escape(printable(shape_text(tensor.axes))))
    console.print(table)
    _print_recurrences(anatomy.recurrences, console)
    _print_lines((f"baked in: {line}" for line in anatomy.baked), console)
    says = "begins anew in every run: no input of the graph carries its state"
    _print_lines((f"hidden: {node} {says}" for node in anatomy.hidden), console)
    if not anatomy.flow.whole:
        _print_lines(["the graph has more nodes than are followed; what stands below may lack evidence"], console)


def _print_recurrences(recurrences: list[Recurrence], console: Console) -> None:
    if not recurrences:
        console.print("No recurrent nodes: if it has states, ordinary operators compute them.")
        return
    table = _table("Recurrent nodes and bodies, and where onnxruntime runs them", "node", "attributes", "CPU", "CUDA")
    for each in recurrences[:MAX_LINES]:
        attributes = (f"{name}={_value(value)}" for name, value in each.attributes.items())
        table.add_row(
            escape(printable(f"{each.operator} {each.path}")),
            escape(printable(", ".join(attributes))),
            _where(each.cpu, "cpu"),
            _where(each.cuda, "cuda"),
        )
    console.print(table)
    if len(recurrences) > MAX_LINES:
        console.print(f"and {len(recurrences) - MAX_LINES} more")


def _where(placement: Placement, device: str) -> str:
    if placement.runs_on == device:
        return "[green]runs[/]"
    what = "refused" if placement.runs_on is None else "falls back to the CPU"
    return f"[red]{what}[/]: {escape(printable(placement.reason or ''))}"


def _print_proposal(proposal: Proposal, console: Console) -> None:
    _print_lines((f"paired: {line}" for line in proposal.evidence), console)
    console.print(f"\nA {NAME} for it:\n")
    console.print(proposal.text, markup=False, highlight=False, soft_wrap=True)


def _print_refusal(file: OnnxFile, proposal: Proposal, console: Console) -> None:
    try:
        present(parse(proposal.text), file.signature, file.path.parent, file.initializer)
    except LoadError as error:
        _print_lines([f"The server would refuse it all the same: {printable(str(error))}"], console)


def _print_lines(lines: Iterable[str], console: Console) -> None:
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


def printable(text: str) -> str:
    """A text of the file as it can stand in a terminal: one line, nothing that a terminal would obey, not too long."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:500])
    return shown if len(text) <= 500 else f"{shown}..."
