"""Where a graph's inputs and outputs have their batch and their time.

Owns the evidence: what recurrent operators take, what is a state's only free axis, what sizes are called. Must not know
how a proposal is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from export.inspect.anatomy import Anatomy, Tensor
from export.inspect.roles import Roles
from export.inspect.shapes import Axis, shape_text

_BATCHES = re.compile(r"^(n|b|bs|bsz|batch.*)$")
_TIMES = re.compile(r"^(t|time.*|seq.*|steps?|(num_?)?(frames|samples)|len|length)$")


@dataclass(frozen=True)
class Axes:
    """Where a tensor has batch and time; None where it has none.

    Attributes:
        batch: its axis.
        time: its axis.
        unclear: what could not be told; None where all could.
        like: an input of as many axes, of which all is known: an unclear output may be like it.
    """

    batch: int | None = None
    time: int | None = None
    unclear: str | None = None
    like: str | None = None


def find_axes(anatomy: Anatomy, roles: Roles) -> dict[str, Axes]:
    """Find batch and time of every input and output that could have them, by its name."""
    tensors = {tensor.name: tensor for tensor in (*anatomy.inputs, *anatomy.optional, *anatomy.outputs)}
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

    found: dict[str, Axes] = {}
    for name in (*states, *roles.either, *roles.sequences):
        one_free_is_batch = rows_are_free and name not in states
        found[name] = _axes_of(tensors[name], batches, times, one_free_is_batch, ("", name) in entries)
    for name in (*roles.outputs, *roles.maybe):
        axes = _axes_of(tensors[name], batches, times, rows_are_free and not steps_are_free, False)
        lacks = (rows_are_free and _size(tensors[name], axes.batch) != (None,)) or (
            steps_are_free and axes.time is None
        )
        if axes.unclear is None and lacks and any(axis.claimed for axis in tensors[name].axes or ()):
            said = shape_text(tensors[name].axes)
            axes = Axes(unclear=f"the file says {said}, which may be an example's sizes")
        if axes.unclear is None and steps_are_free and axes.time is None:
            axes = _in_place_of_time(tensors[name], axes, [(tensors[x], found[x]) for x in roles.sequences])
        if axes.unclear is not None:
            alike = (x for x in roles.sequences if not found[x].unclear and _rank(tensors[x]) == _rank(tensors[name]))
            axes = Axes(unclear=axes.unclear, like=next(alike, None))
        found[name] = axes
    return found


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


def _in_place_of_time(tensor: Tensor, axes: Axes, sequences: list[tuple[Tensor, Axes]]) -> Axes:
    """The axes of an output without a time axis, unless it is a sequence's length in an example that stands there."""
    for x, its in sequences:
        if its.time is not None and its.batch == axes.batch and _rank(x) == _rank(tensor):
            size = (tensor.axes or ())[its.time].size
            if size is not None and size > 1:
                return Axes(unclear=f"a fixed {size} stands where its sequence has time, an example's it may be")
    return axes


def _free(tensor: Tensor) -> list[tuple[int, Axis]]:
    return [(number, axis) for number, axis in enumerate(tensor.axes or ()) if axis.size is None]


def _size(tensor: Tensor, axis: int | None) -> tuple[int | None, ...]:
    """The size of an axis, or nothing where there is none."""
    return () if axis is None or tensor.axes is None else (tensor.axes[axis].size,)


def _rank(tensor: Tensor) -> int:
    return -1 if tensor.axes is None else len(tensor.axes)
