"""LSTM cells out of ordinary operators, as exporters write a single step: which state is c, and which is h.

Owns their form: ``c = f * c + ...`` and ``h = o * tanh(c)``, where f comes out of h and the input. Swapped states have
the shapes of right ones, but not their places in it. Must not know what names mean, nor shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from export.inspect.dataflow import Dataflow, Operation, Value

MAX_CELLS = 100
"""Cells that are looked into."""


@dataclass(frozen=True)
class Cell:
    """One cell, by the names of the graph's inputs and outputs.

    Attributes:
        c_in: what the forget gate multiplies.
        c_out: what becomes of it.
        h_out: outputs that are a gate times the tanh of that.
        h_in: inputs that the forget gate comes out of, without passing another cell: h, and what the cell takes.
        takes: whether it comes out of more than one input at all. One that does not has no h beside what it takes.
    """

    c_in: str
    c_out: frozenset[str]
    h_out: frozenset[str]
    h_in: frozenset[str]
    takes: bool


def find_cells(flow: Dataflow, inputs: Iterable[str], outputs: Iterable[str]) -> list[Cell]:
    """All cells whose c is an input and an output of the graph.

    Args:
        flow: how values move through the graph.
        inputs: the names of its inputs.
        outputs: those of its outputs.
    """
    given = {name: flow.carries(("", name)) for name in inputs}
    held = {value: name for name, values in given.items() for value in values}
    updates = [update for _, update in zip(range(MAX_CELLS), _updates(flow.operations, held), strict=False)]
    if not updates:
        return []
    ends = [_hidden(flow, each.cell) for each in updates]
    # h of one layer is what the next one takes, so the way from an input to its own gate ends at any cell.
    walls = {each.cell for each in updates}.union(*ends)
    of_cells = {each.name for each in updates}
    others = [name for name in given if name not in of_cells]
    apart = {name: flow.depends(("", name), walls) for name in others}
    reached = {name: flow.depends(("", name)) for name in others}
    return [
        Cell(
            each.name,
            frozenset(name for name in outputs if ("", name) in flow.carries(each.cell)),
            frozenset(name for name in outputs for h in hidden if ("", name) in flow.carries(h)),
            frozenset(name for name, values in apart.items() if each.gate in values),
            sum(each.gate in values for values in reached.values()) > 1,
        )
        for each, hidden in zip(updates, ends, strict=True)
    ]


@dataclass(frozen=True)
class _Update:
    name: str
    gate: Value
    cell: Value


def _updates(operations: Iterable[Operation], held: dict[Value, str]) -> Iterator[_Update]:
    """Sums of something and an input of the graph times something that is none."""
    kept: dict[Value, tuple[str, Value]] = {}
    for each in operations:
        if each.operator == "Mul":
            for gate, state in (each.inputs, each.inputs[::-1]):
                if state in held and gate not in held:
                    kept[each.output] = held[state], gate
        elif each.operator == "Add":
            for term in each.inputs:
                if term in kept:
                    yield _Update(*kept[term], each.output)


def _hidden(flow: Dataflow, cell: Value) -> set[Value]:
    """What a tanh of the cell state is multiplied to."""
    values = flow.carries(cell)
    bent = {each.output for each in flow.operations if each.operator == "Tanh" and values & set(each.inputs)}
    return {each.output for each in flow.operations if each.operator == "Mul" and bent & set(each.inputs)}
