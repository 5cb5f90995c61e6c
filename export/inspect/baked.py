"""Sizes that a file fixes and a server would want free, one sentence each.

Owns how they are told from sizes that are fixed for good. Must not know how axes are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from export.inspect.dataflow import Dataflow, Value
from export.inspect.shapes import Axis, shape_text
from service.graphs.placement import CPU_ONLY, RECURRENT

_KEEPS_AXES = ("Cast", "Identity")


def baked_outputs(
    said: Mapping[str, tuple[Axis, ...] | None], inferred: Mapping[str, tuple[Axis, ...]]
) -> Iterator[str]:
    """Outputs that the file calls of other sizes than the graph gives them."""
    for name, axes in said.items():
        known = inferred.get(name, ())
        if (
            axes
            and len(axes) == len(known)
            and any(a.size and a.size != b.size for a, b in zip(axes, known, strict=True))
        ):
            yield f"output {name!r} is said to be {shape_text(axes)}; the graph gives {shape_text(known)}"


def baked_states(flow: Dataflow, inferred: Mapping[str, tuple[Axis, ...]], given: set[Value]) -> Iterator[str]:
    """Initial states of recurrent nodes that are constants, for a batch of one size; ``given`` depends on inputs."""
    for memory in flow.memories:
        if not memory.recurrent or memory.entry is None or memory.entry in given or memory.entry[0]:
            continue
        axes = inferred.get(memory.entry[1], ())
        if len(axes) == 3 and axes[1].size is not None:
            yield (
                f"{memory.begins} of {memory.node} is a constant of shape {shape_text(axes)}: "
                f"a batch of {axes[1].size} is baked in"
            )


def baked_shapes(
    graph: Any, constants: Mapping[str, list[int]], inferred: Mapping[str, tuple[Axis, ...]], varied: set[Value]
) -> Iterator[str]:
    """Nodes that make fixed sizes of what comes from free ones, which is in ``varied``."""
    for index, node in enumerate(graph.node):
        if node.op_type not in ("Reshape", "Expand") or len(node.input) != 2:
            continue
        wanted, now = constants.get(node.input[1], []), inferred.get(node.input[0])
        fixed = now is not None and all(axis.size is not None for axis in now)
        if len(wanted) < 2 or min(wanted) < 1 or fixed or ("", node.input[0]) not in varied:
            continue
        if node.op_type == "Reshape" or max(wanted) > 1:
            name = node.name or f"{node.op_type}[{index}]"
            yield f"{node.op_type} {name!r} makes {wanted} of what comes in: no size is free there"


def baked_lengths(
    graph: Any, constants: Mapping[str, list[int]], inferred: Mapping[str, tuple[Axis, ...]]
) -> Iterator[str]:
    """Reshapes that leave one size open where several come in free: the others are those of an example.

    Such a graph runs at other sizes too, as long as the product of all fits, and gives wrong numbers then.
    """
    for index, node in enumerate(graph.node):
        if node.op_type != "Reshape" or len(node.input) != 2:
            continue
        wanted, now = constants.get(node.input[1], []), inferred.get(node.input[0], ())
        free = [axis for axis in now if axis.size is None]
        if wanted.count(-1) != 1 or 0 in wanted or len(free) < 2 or not all(axis.name for axis in free):
            continue
        fixed = math.prod(axis.size for axis in now if axis.size is not None)
        if fixed % -math.prod(wanted):
            yield (
                f"Reshape {node.name or f'Reshape[{index}]'!r} makes {wanted} of {shape_text(now)}, so that a size of "
                "the export's example is fixed; export again so that it is free, from torch with batch_first=True"
            )


def baked_steps(graph: Any, inferred: Mapping[str, tuple[Axis, ...]]) -> dict[str, str]:
    """Inputs of the graph whose time is fixed, because a recurrent node takes so many steps of them in a run.

    Returns:
        What to say of each, by the input's name.
    """
    producers = {name: node for node in graph.node for name in node.output}
    inputs = {value.name for value in graph.input}
    found: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        axes = inferred.get(node.input[0], ()) if node.op_type in (*RECURRENT, *CPU_ONLY) else ()
        if len(axes) != 3 or (axes[0].size or 1) == 1:
            continue
        name, time = _back_to_input(node.input[0], 0, producers)
        if name in inputs:
            found.setdefault(
                name,
                f"{axes[0].size} steps a run, as axis {time} of {name!r} is the time of {node.op_type} "
                f"{node.name or f'{node.op_type}[{index}]'!r}: a step here is a block of {axes[0].size}; "
                "export with a dynamic time axis to change that",
            )
    return found


def _back_to_input(name: str, axis: int, producers: Mapping[str, Any]) -> tuple[str, int]:
    """The tensor that one is a rearrangement of, and where an axis of it stands there."""
    while (node := producers.get(name)) is not None:
        if node.op_type == "Transpose":
            permutation = next((list(each.ints) for each in node.attribute if each.name == "perm"), None)
            if permutation is None or axis >= len(permutation):
                break
            axis = permutation[axis]
        elif node.op_type not in _KEEPS_AXES:
            break
        name = node.input[0]
    return name, axis
