"""A model.yaml for a graph, as far as the graph says what must stand in it.

Owns the text. What is not certain stands in it as a comment that begins with ``decide:``, for which the server refuses
the file until somebody has decided and deleted it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from export.inspect.anatomy import Anatomy
from export.inspect.axes import Axes, find_axes
from export.inspect.roles import Roles, assign
from export.show import printable
from service.graphs.description import UNDECIDED

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAKEN = re.compile(r"(?i:yes|no|on|off|true|false|null)")


@dataclass(frozen=True)
class Proposal:
    """A model.yaml to begin with.

    Attributes:
        text: the file's.
        evidence: how each state's pair is known, one sentence each.
        decisions: what was left open, one sentence each; the server refuses the file until none is.
    """

    text: str
    evidence: list[str]
    decisions: list[str]


def propose(anatomy: Anatomy) -> Proposal:
    """Say what can be said of a graph."""
    roles = assign(anatomy)
    evidence = [pair.evidence for pair in roles.states]
    axes = find_axes(anatomy, roles)
    lines = [
        *_inputs(anatomy, roles, axes),
        *_states(anatomy, roles, axes),
        *_outputs(roles, axes),
        *_streamable(anatomy, roles, axes),
    ]
    text = "\n".join(lines) + "\n"
    decisions = [match[1] for match in UNDECIDED.finditer(text)]
    return Proposal(text, evidence, decisions)


def _inputs(anatomy: Anatomy, roles: Roles, axes: dict[str, Axes]) -> Iterator[str]:
    yield "inputs:"
    for line in anatomy.lengths:
        yield f"  # decide: whether to serve it at all: {printable(line)}"
    if not roles.sequences and not roles.either:
        yield "  # decide: no input of the graph looks like a sequence"
    for name in roles.sequences:
        if name in anatomy.steps:
            yield f"  # decide: whether this is meant: {printable(anatomy.steps[name])}"
        yield from _with_axes(name, axes)
    for name in sorted(roles.either):
        here = "a sequence or a constant" if name in roles.constants else "a sequence"
        below = ", or a state, as below" if name in roles.open else ""
        yield f"  # decide: whether {quoted(name)} is {here}, as here{below}"
        yield f"  # {quoted(name)}: {_axes(axes[name])}"
        if name in roles.constants:
            yield f"  # {quoted(name)}: {{role: constant, value: null}}"
    for name in roles.lengths:
        yield f"  {quoted(name)}: {{role: lengths}}"
    for name, compared in roles.constants.items():
        if name in roles.either:
            continue
        known = f"; the graph compares it with {', '.join(map(str, compared))}" if compared else ""
        yield f"  # decide: the value of {quoted(name)}, the same in every run{known}"
        yield f"  {quoted(name)}: {{role: constant, value: null}}"


def _states(anatomy: Anatomy, roles: Roles, axes: dict[str, Axes]) -> Iterator[str]:
    optional = {tensor.name for tensor in anatomy.optional}
    if roles.states or roles.open:
        yield "states:"
    for pair in roles.states:
        if axes[pair.input].unclear:
            yield f"  # decide: batch_axis of {quoted(pair.input)}: {axes[pair.input].unclear}"
        yield f"  {_state(pair.input, pair.output, axes[pair.input])}"
    for name, candidates in roles.open.items():
        ends = " or ".join(map(quoted, candidates))
        if name not in roles.either:
            yield f"  # decide: whether {quoted(name)} ends as {ends}; a swapped pair gives wrong numbers and no error"
        for candidate in candidates:
            yield f"  # {_state(name, candidate, axes[name])}"
        if name in optional:
            yield f"  - {{input: {quoted(name)}, output: decide}}  # it has a value, and nobody would miss it"


def _outputs(roles: Roles, axes: dict[str, Axes]) -> Iterator[str]:
    yield "outputs:"
    if not roles.outputs:
        yield "  # decide: which outputs are served; each of them could be a state's"
    for name in roles.outputs:
        yield from _with_axes(name, axes)
    for name in roles.maybe:
        yield f"  # {quoted(name)}: {_axes(axes[name])}  # if no state ends as it"


def _streamable(anatomy: Anatomy, roles: Roles, axes: dict[str, Axes]) -> Iterator[str]:
    has_time = any(axes[name].time is not None for name in roles.sequences)
    if anatomy.backward and has_time:
        yield "streamable: false  # it reads sequences from the end, too"
    elif anatomy.hidden and has_time:
        yield "streamable: false  # it has states that no input carries, so that every chunk would begin anew"


def _with_axes(name: str, axes: dict[str, Axes]) -> Iterator[str]:
    one = axes[name]
    if one.unclear:
        like = f"; {quoted(one.like)} has {_axes(axes[one.like])}" if one.like else ""
        yield f"  # decide: {quoted(name)}: {one.unclear}{like}"
    yield f"  {quoted(name)}: {_axes(one)}"


def _axes(axes: Axes) -> str:
    """The keys of a tensor's axes; words that the server refuses where they are not known."""
    if axes.unclear:
        return "{time_axis: decide, batch_axis: decide}"
    pairs = (("time_axis", axes.time), ("batch_axis", axes.batch))
    return "{" + ", ".join(f"{key}: {axis}" for key, axis in pairs if axis is not None) + "}"


def _state(begin: str, end: str, axes: Axes) -> str:
    batch = "" if axes.batch is None else f", batch_axis: {axes.batch}"
    batch = ", batch_axis: decide" if axes.unclear else batch
    return f"- {{input: {quoted(begin)}, output: {quoted(end)}{batch}}}"


def quoted(name: str) -> str:
    """A name as it can stand in YAML and in a terminal: one line, nothing that is not printed."""
    if _PLAIN.fullmatch(name) and not _TAKEN.fullmatch(name):
        return name
    text: str = yaml.safe_dump(name, default_style='"', width=float("inf"))
    return text.strip()
