"""Who is who among a graph's inputs and outputs: sequences, lengths, constants, and which states belong together.

Owns the evidence and what follows from it. The dataflow is proof. A shape that fits one tensor alone is taken with
a name that speaks of a state. Anything else is left open: h and c of one shape, swapped, give wrong numbers and no
error, and so does a signal that is taken for a state because it comes out as it went in. Must not know how a proposal
is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from export.inspect.anatomy import Anatomy, Tensor
from export.inspect.cells import find_cells
from export.inspect.shapes import Axis

_STATES = re.compile(r"(^|_)(h|c|hx|cx|hc|hh|cc)\d*(_|$)|state|hidden|cell|cache|memory|buffer")
_SEQUENCES = re.compile(
    r"^(x|inputs?|data|src|source|tokens?|(input_)?ids)$|audio|signal|wav|speech|pcm|feat|frame|sample"
)
_LISTED = 4
_MARKS = r"(in|input|out|output|new|next|prev|previous|old|init|initial|last|final|n|t|\d+)"


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
        constants: inputs that are the same in every run, or, among ``either``, could be; with the values that the
            graph compares them with.
        states: the pairs that are certain.
        open: an input whose state is not certain, with the outputs that it could end as, likelier names first.
        either: inputs that could be sequences: instead of a state where they are open too, or of a constant.
        outputs: what is served.
        maybe: outputs that could be a state's just as well.
    """

    sequences: list[str] = field(default_factory=list)
    lengths: list[str] = field(default_factory=list)
    constants: dict[str, list[int]] = field(default_factory=dict)
    states: list[Pair] = field(default_factory=list)
    open: dict[str, list[str]] = field(default_factory=dict)
    either: set[str] = field(default_factory=set)
    outputs: list[str] = field(default_factory=list)
    maybe: list[str] = field(default_factory=list)


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
        else:
            left.append(tensor)
    _pair_by_flow(anatomy, [*left, *anatomy.optional], roles)
    # Of weights that could be given too, nobody has to hear.
    left += [tensor for tensor in anatomy.optional if _STATES.search(tensor.name.lower())]
    _pair_by_cell(anatomy, left, roles)
    taken = {pair.input for pair in roles.states} | roles.open.keys()
    ended = {pair.output for pair in roles.states} | {name for names in roles.open.values() for name in names}
    outputs = [tensor for tensor in anatomy.outputs if tensor.name not in ended]
    _pair_by_shape(anatomy, [tensor for tensor in left if tensor.name not in taken], outputs, roles)
    ended = {pair.output for pair in roles.states}
    unsure = {name for names in roles.open.values() for name in names}
    roles.outputs = [tensor.name for tensor in anatomy.outputs if tensor.name not in ended | unsure]
    roles.maybe = [tensor.name for tensor in anatomy.outputs if tensor.name in unsure - ended]
    return roles


def _pair_by_flow(anatomy: Anatomy, inputs: list[Tensor], roles: Roles) -> None:
    flow = anatomy.flow
    tensors = {tensor.name: tensor for tensor in (*anatomy.outputs, *inputs)}
    begins = {x.name: _numbers(anatomy, flow.carries(("", x.name)), "entry") for x in inputs}
    carried = {memory.exit: flow.carries(memory.exit) for memory in flow.memories if memory.exit}
    carried |= {memory.every: flow.carries(memory.every) for memory in flow.memories if memory.every}

    def ends(x: Tensor, how: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for y in anatomy.outputs:
            for number in sorted(begins[x.name]):
                value = getattr(flow.memories[number], how)
                if _alike(x, y, ones_may_be_free=True) and value and ("", y.name) in carried[value]:
                    found.setdefault(y.name, []).append(number)
        # One whose axes are said, and fit, comes before one of which nothing is known.
        said = {name: numbers for name, numbers in found.items() if tensors[name].axes is not None}
        return said or found

    # Y holds h after every step, and the last of them is a state; but only where no Y_h says so.
    ended = {x.name: ends(x, "exit") or ends(x, "every") for x in inputs if begins[x.name]}
    for name, found in ended.items():
        shared = [other for other, theirs in ended.items() if theirs.keys() & found.keys()]
        if len(found) == 1 and shared == [name]:
            ((output, numbers),) = found.items()
            memories = [flow.memories[number] for number in numbers]
            last = ends(tensors[name], "exit")
            begun = _listed(f"{memory.begins} of {memory.node}" for memory in memories)
            become = _listed(memory.ends if last else "last step of Y" for memory in memories)
            roles.states.append(Pair(name, output, f"{name} reaches {begun}; {output} is its {become}"))
        elif found:
            roles.open[name] = _by_name(name, found)


def _pair_by_cell(anatomy: Anatomy, inputs: list[Tensor], roles: Roles) -> None:
    """Pair h and c of LSTM cells out of ordinary operators."""
    tensors = {x.name: x for x in inputs} | {y.name: y for y in anatomy.outputs}
    taken = {name for pair in roles.states for name in (pair.input, pair.output)} | roles.open.keys()
    cells = [
        cell
        for cell in find_cells(anatomy.flow, [x.name for x in inputs], [y.name for y in anatomy.outputs])
        if len(cell.c_out) == len(cell.h_out) == 1 and not taken & {cell.c_in, *cell.c_out, *cell.h_out}
    ]
    used = [name for cell in cells for name in (cell.c_in, *cell.c_out, *cell.h_out)]
    for cell in cells:
        (c_out,), (h_out,) = cell.c_out, cell.h_out
        certain = all(used.count(name) == 1 for name in (cell.c_in, c_out, h_out))
        if not certain or _SEQUENCES.search(cell.c_in.lower()) or not _alike(tensors[cell.c_in], tensors[c_out]):
            continue
        said = f"{c_out} is {cell.c_in} times a gate, and more"
        roles.states.append(Pair(cell.c_in, c_out, f"{said}: c of an LSTM cell"))
        # Where x is as wide as h, nothing but its name tells the two apart.
        begins = [name for name in cell.h_in if _alike(tensors[name], tensors[h_out])]
        taken = {pair.input for pair in roles.states}
        begins = [name for name in begins if name not in taken and not _SEQUENCES.search(name.lower())]
        if len(begins) > 1:
            begins = [name for name in begins if _STATES.search(name.lower())]
        if len(begins) == 1 and cell.takes:
            (h_in,) = begins
            said = f"{h_out} is a gate times the tanh of {c_out}, and the gates come out of {h_in}"
            roles.states.append(Pair(h_in, h_out, f"{said}: h of an LSTM cell"))


def _pair_by_shape(anatomy: Anatomy, inputs: list[Tensor], outputs: list[Tensor], roles: Roles) -> None:
    fits = {x.name: [y.name for y in outputs if _alike(x, y)] for x in inputs}
    for x in inputs:
        if _is_small(x):
            _place_small(anatomy, x, fits, roles)
        elif x in anatomy.optional:
            if not fits[x.name]:
                fits.pop(x.name)
        elif not fits[x.name] or _is_sequence(anatomy, x):
            fits.pop(x.name)
            roles.sequences.append(x.name)
    for name, candidates in fits.items():
        rivals = [other for other, theirs in fits.items() if set(theirs) & set(candidates)]
        if len(candidates) == 1 and rivals == [name] and _STATES.search(name.lower()):
            only = f"{candidates[0]} alone has the shape and dtype of {name}, and by name they are a state"
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
        roles.constants.pop(name, None)
        roles.open.pop(name, None)


def _place_small(anatomy: Anatomy, x: Tensor, fits: dict[str, list[str]], roles: Roles) -> None:
    """Tell constants from counters and from tokens: a rate, a position and a word can all be one number."""
    if fits[x.name] and _STATES.search(x.name.lower()):
        return
    if x not in anatomy.optional:
        roles.constants[x.name] = _compared(anatomy, x)
        if fits[x.name] or _SEQUENCES.search(x.name.lower()):
            roles.either.add(x.name)
    if not fits[x.name]:
        fits.pop(x.name)


def _is_sequence(anatomy: Anatomy, x: Tensor) -> bool:
    if _SEQUENCES.search(x.name.lower()):
        return True
    depends = anatomy.flow.depends(("", x.name))
    return not _STATES.search(x.name.lower()) and any(value in depends for value in anatomy.flow.features)


def _is_small(tensor: Tensor) -> bool:
    """Whether it is a number, or an integer in axes of one: what is the same in every run most often is."""
    if tensor.axes is None or any(axis.size != 1 for axis in tensor.axes):
        return False
    return not tensor.axes or tensor.dtype.startswith("int")


def _alike(x: Tensor, y: Tensor, ones_may_be_free: bool = False) -> bool:
    """Whether an output can come back as an input.

    Args:
        x: the input.
        y: the output.
        ones_may_be_free: whether the output may have any size where the input has 1: a state of one row whose sequence
            takes many.
    """
    if x.dtype != y.dtype or x.axes is None:
        return False
    if y.axes is None:
        return True
    return len(x.axes) == len(y.axes) and all(
        (one.size == other.size and one.name == other.name)
        or other == Axis()
        or (ones_may_be_free and one.size == 1 and other.size is None)
        or (one.size is None and (other.claimed or one.name == f"{x.name}.{number}"))
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


def _listed(names: Iterable[str]) -> str:
    each = list(dict.fromkeys(names))
    return " and ".join(each if len(each) <= _LISTED else [*each[:_LISTED], f"{len(each) - _LISTED} more"])


def _stem(name: str) -> str:
    """A name without what tells an input from an output: h of h_in, hT, next_h."""
    stem = name.lower()
    for pattern in (rf"[_.\W]{_MARKS}$", rf"^{_MARKS}[_.\W]", r"(in|out|0|n|t)$"):
        stem = re.sub(pattern, "", stem) or stem
    return stem
