"""Sizes that a file fixes and a server would want free, one sentence each.

Owns how they are told from sizes that are fixed for good. Must not know how axes are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from export.inspect.dataflow import Dataflow, Value
from export.inspect.shapes import Axis, shape_text


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
