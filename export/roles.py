"""Who is who among a graph's inputs and outputs: sequences, lengths, constants, and which states belong together.

Owns the evidence and what follows from it. The dataflow is proof. A shape that fits one tensor alone is taken with
a name that says the same. Anything else is left open: h and c of one shape, swapped, give wrong numbers and no error.
Must not know how a proposal is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from export.anatomy import Anatomy, Axis, Tensor

_STATES = re.compile(r"(^|_)(h|c|hx|cx|hc|hh|cc)(_|$)|state|hidden|cell|cache|memory|buffer")
_SEQUENCES = re.compile(
    r"^(x|inputs?|data|src|source|tokens?|(input_)?ids)$|audio|signal|wav|speech|pcm|feat|frame|sample"
)
_BATCHES = re.compile(r"^(n|b|bs|bsz|batch.*)$")
_TIMES = re.compile(r"^(t|time.*|seq.*|steps?|(num_?)?frames|len|length)$")
_MARKS = r"(in|input|out|output|new|next|prev|previous|old|init|initial|last|final|n|t|\d+)"


@dataclass(frozen=True)
class Axes:
    """Where a tensor has batch and time; None where it has none. ``unclear`` says what could not be told."""

    batch: int | None = None
    time: int | None = None
    unclear: str | None = None


@dataclass(frozen=True)
class Pair:
    """A state: the input that begins it, the output that ends it, and how that is known."""

    input: str
    output: str
    evidence: str


@dataclass
class Roles:
    """What every input and output is.

    Attributes:
        sequences: inputs that come with every call.
        lengths: inputs that say how many steps of each row are valid.
        constants: inputs that are the same in every run, with the values that the graph compares them with.
        states: the pairs that are certain.
        open: an input whose state is not certain, with the outputs that it could end as, likelier names first.
        either: of those, the ones that could be sequences just as well.
        outputs: what is served.
        maybe: outputs that could be a state's just as well.
        axes: of all these inputs and outputs.
    """

    sequences: list[str] = field(default_factory=list)
    lengths: list[str] = field(default_factory=list)
    constants: dict[str, list[int]] = field(default_factory=dict)
    states: list[Pair] = field(default_factory=list)
    open: dict[str, list[str]] = field(default_factory=dict)
    either: set[str] = field(default_factory=set)
    outputs: list[str] = field(default_factory=list)
    maybe: list[str] = field(default_factory=list)
    axes: dict[str, Axes] = field(default_factory=dict)


def assign(anatomy: Anatomy) -> Roles:
    """Find out who is who."""
    roles = Roles()
    flow = anatomy.flow
    lengths = set(flow.lengths)
    left = []
    for tensor in anatomy.inputs:
        value = ("", tensor.name)
        if lengths & flow.carries(value):
            roles.lengths.append(tensor.name)
        elif tensor.axes == () or (_is_one(tensor) and tensor.dtype.startswith("int")):
            roles.constants[tensor.name] = _compared(anatomy, tensor)
        else:
            left.append(tensor)
    _pair_by_flow(anatomy, left, roles)
    taken = {pair.input for pair in roles.states} | roles.open.keys()
    ended = {pair.output for pair in roles.states} | {name for names in roles.open.values() for name in names}
    outputs = [tensor for tensor in anatomy.outputs if tensor.name not in ended]
    _pair_by_shape(anatomy, [tensor for tensor in left if tensor.name not in taken], outputs, roles)
    ended = {pair.output for pair in roles.states}
    unsure = {name for names in roles.open.values() for name in names}
    roles.outputs = [tensor.name for tensor in anatomy.outputs if tensor.name not in ended | unsure]
    roles.maybe = [tensor.name for tensor in anatomy.outputs if tensor.name in unsure - ended]
    _find_axes(anatomy, roles)
    return roles


def _pair_by_flow(anatomy: Anatomy, inputs: list[Tensor], roles: Roles) -> None:
    flow = anatomy.flow
    tensors = {x.name: x for x in inputs}
    begins = {x.name: _numbers(anatomy, flow.carries(("", x.name)), "entry") for x in inputs}
    carried = {memory.exit: flow.carries(memory.exit) for memory in flow.memories if memory.exit}
    carried |= {memory.every: flow.carries(memory.every) for memory in flow.memories if memory.every}

    def ends(x: Tensor, how: str) -> list[tuple[str, int]]:
        found = []
        for y in anatomy.outputs:
            for number in sorted(begins[x.name]):
                value = getattr(flow.memories[number], how)
                if _alike(x, y) and value and ("", y.name) in carried[value]:
                    found.append((y, number))
                    break
        # One whose axes are said, and fit, comes before one of which nothing is known.
        said = [(y.name, number) for y, number in found if y.axes is not None]
        return said or [(y.name, number) for y, number in found]

    # Y holds h after every step, and the last of them is a state; but only where no Y_h says so.
    ended = {x.name: ends(x, "exit") or ends(x, "every") for x in inputs if begins[x.name]}
    for name, found in ended.items():
        shared = [other for other, theirs in ended.items() if {y for y, _ in theirs} & {y for y, _ in found}]
        if len(found) == 1 and shared == [name]:
            output, number = found[0]
            memory = flow.memories[number]
            what = memory.ends if ends(tensors[name], "exit") else "last step of Y"
            evidence = f"{name} reaches {memory.begins} of {memory.node}; {output} is its {what}"
            roles.states.append(Pair(name, output, evidence))
        elif found:
            roles.open[name] = _by_name(name, (y for y, _ in found))


def _pair_by_shape(anatomy: Anatomy, inputs: list[Tensor], outputs: list[Tensor], roles: Roles) -> None:
    fits = {x.name: [y.name for y in outputs if _alike(x, y)] for x in inputs}
    for x in inputs:
        if not fits[x.name] or _is_sequence(anatomy, x):
            fits.pop(x.name)
            roles.sequences.append(x.name)
    for name, candidates in fits.items():
        rivals = [other for other, theirs in fits.items() if set(theirs) & set(candidates)]
        named = _STATES.search(name.lower()) or _stem(name) == _stem(candidates[0])
        if len(candidates) == 1 and rivals == [name] and named:
            only = f"{candidates[0]} alone has the shape and dtype of {name}, and their names say state"
            roles.states.append(Pair(name, candidates[0], only))
        else:
            roles.open[name] = _by_name(name, candidates)
            if not _STATES.search(name.lower()):
                roles.either.add(name)
    # Something has to be the sequence: where only one input can be, it is.
    if not roles.sequences and len(roles.either) == 1:
        (name,) = roles.either
        roles.sequences.append(name)
        roles.either.clear()
        del roles.open[name]


def _is_sequence(anatomy: Anatomy, x: Tensor) -> bool:
    if _SEQUENCES.search(x.name.lower()):
        return True
    depends = anatomy.flow.depends(("", x.name))
    return not _STATES.search(x.name.lower()) and any(value in depends for value in anatomy.flow.features)


def _find_axes(anatomy: Anatomy, roles: Roles) -> None:
    tensors = {tensor.name: tensor for tensor in (*anatomy.inputs, *anatomy.outputs)}
    states = [pair.input for pair in roles.states] + [name for name in roles.open if name not in roles.either]
    batches, times = _evident_names(anatomy)
    for name in states:
        # A state's only free axis is its batch: nothing else of it may change from run to run.
        free = _free(tensors[name])
        if len(free) == 1:
            batches.add(str(free[0][1].name))
    batches, times = batches - times, times - batches
    rows_are_free = any(_free(tensors[name]) for name in states)
    steps_are_free = any(axis.name in times for name in roles.sequences for _, axis in _free(tensors[name]))
    entries = {memory.entry for memory in anatomy.flow.memories if memory.recurrent}
    for name in (*states, *roles.either, *roles.sequences, *roles.outputs, *roles.maybe):
        tensor = tensors[name]
        direct = ("", name) in entries
        one_free = rows_are_free and (name in roles.sequences or not steps_are_free)
        roles.axes[name] = _axes_of(tensor, batches, times, one_free, direct)


def _evident_names(anatomy: Anatomy) -> tuple[set[str], set[str]]:
    """The names of sizes that are batch or time by what the operators take, else by what they are called."""
    flow = anatomy.flow
    batches: set[str | None] = set()
    times: set[str | None] = set()
    for value in flow.features:
        axes = anatomy.inferred.get(value[1], ()) if not value[0] else ()
        if len(axes) == 3:
            times.add(axes[0].name)
            batches.add(axes[1].name)
    for value in flow.scanned:
        axes = anatomy.inferred.get(value[1], ()) if not value[0] else ()
        times |= {axis.name for axis in axes[:1]}
    for value in flow.lengths:
        axes = anatomy.inferred.get(value[1], ()) if not value[0] else ()
        batches |= {axis.name for axis in axes[:1]}
    called = {
        str(axis.name) for tensor in (*anatomy.inputs, *anatomy.outputs) for _, axis in _free(tensor) if axis.name
    }
    by_flow = batches | times
    batches |= {name for name in called - by_flow if _BATCHES.match(name.lower())}
    times |= {name for name in called - by_flow if _TIMES.match(name.lower())}
    return {name for name in batches if name}, {name for name in times if name}


def _axes_of(tensor: Tensor, batches: set[str], times: set[str], one_free_is_batch: bool, direct: bool) -> Axes:
    if tensor.axes is None:
        return Axes(unclear="the file does not say its axes")
    free = _free(tensor)
    if not free:
        ones = [number for number, axis in enumerate(tensor.axes) if axis.size == 1]
        # The operators' own states are [directions, N, H].
        return Axes(1 if direct and 1 in ones else ones[0] if ones else None)
    batch = [number for number, axis in free if axis.name in batches]
    time = [number for number, axis in free if axis.name in times]
    if len(batch) <= 1 and len(time) <= 1 and len(free) == len(batch) + len(time):
        if not batch:
            ones = [number for number, axis in enumerate(tensor.axes) if axis.size == 1]
            batch = ones[:1]
        return Axes(batch[0] if batch else None, time[0] if time else None)
    if len(free) == 1 and one_free_is_batch:
        return Axes(free[0][0])
    return Axes(
        unclear=f"which of its free axes {', '.join(str(number) for number, _ in free)} is batch, and which time"
    )


def _free(tensor: Tensor) -> list[tuple[int, Axis]]:
    return [(number, axis) for number, axis in enumerate(tensor.axes or ()) if axis.size is None]


def _is_one(tensor: Tensor) -> bool:
    return tensor.axes is not None and all(axis.size == 1 for axis in tensor.axes)


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether an output can come back as an input."""
    if x.dtype != y.dtype or x.axes is None:
        return False
    if y.axes is None:
        return True
    return len(x.axes) == len(y.axes) and all(
        one == other or other == Axis() or (one.size is None and one.name == f"{x.name}.{number}")
        for number, (one, other) in enumerate(zip(x.axes, y.axes, strict=True))
    )


def _numbers(anatomy: Anatomy, values: set[tuple[str, str]], what: str) -> set[int]:
    return {number for number, memory in enumerate(anatomy.flow.memories) if getattr(memory, what) in values}


def _compared(anatomy: Anatomy, tensor: Tensor) -> list[int]:
    flow = anatomy.flow
    found = {
        constant
        for value in flow.carries(("", tensor.name))
        for other in flow.comparisons.get(value, ())
        for constant in anatomy.constants.get(other[1], [])
    }
    return sorted(found)


def _by_name(name: str, candidates: Iterable[str]) -> list[str]:
    return sorted(candidates, key=lambda candidate: _stem(candidate) != _stem(name))


def _stem(name: str) -> str:
    """A name without what tells an input from an output: h of h_in, hT, next_h."""
    stem = name.lower()
    for pattern in (rf"[_.\W]{_MARKS}$", rf"^{_MARKS}[_.\W]", r"(in|out|0|n|t)$"):
        stem = re.sub(pattern, "", stem) or stem
    return stem
