"""The recurrent path of a graph: the nodes that states and sequences go through, and what of it CUDA does not run.

Owns the walk from the inputs, through bodies, and what follows from where onnxruntime has put each node. Shape
arithmetic is beside the path: onnxruntime puts it on the CPU by itself, where it costs little and changes nothing.
Takes an onnx ModelProto as it is, without importing onnx. Must not know onnxruntime or sessions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.graphs.onnx_file import nodes_of
from service.graphs.placement import CONTROL_FLOW, CPU_ONLY, RECURRENT, Attribute, place

_ALWAYS = (*RECURRENT, *CPU_ONLY, *CONTROL_FLOW)
_WALLS = ("Shape", "Size")
"""What tells of a tensor nothing of its contents."""
_SHOWN = 3
_FIELDS = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints", 8: "strings"}
"""Where an AttributeProto holds its value, by its type (onnx.proto)."""


class Assigned(NamedTuple):
    """Where onnxruntime has put a node, by its own record.

    Attributes:
        name: of the node; one that an optimizer made has a name of its own.
        operator: its type.
        provider: the execution provider.
    """

    name: str
    operator: str
    provider: str


@dataclass(frozen=True)
class RecurrentPath:
    """Which nodes are on the path.

    Attributes:
        on: those that are: their paths in the file, by their names.
        beside: names of those that are not.
    """

    on: dict[str, str]
    beside: frozenset[str]

    def elsewhere(self, assigned: Iterable[Assigned], provider: str) -> list[str]:
        """Return what of the path does not run on a provider, each with the provider that it runs on.

        A node that the file does not have was made by an optimizer, out of others that may have been on the path.

        Args:
            assigned: every node that onnxruntime has put somewhere.
            provider: the one that all of it is meant for.
        """
        return [
            f"node {self.on.get(one.name, one.name)!r} ({one.operator}) is run by {one.provider}"
            for one in assigned
            if one.provider != provider and one.name not in self.beside
        ]


def name_nodes(model: Any) -> None:
    """Give each node that has no name, or one that another has too, a name of its own: onnxruntime's record has names.

    Args:
        model: an onnx ModelProto, which is changed.
    """
    taken: set[str] = set()
    # What has a name keeps it, wherever it stands.
    nameless = []
    for node in nodes_of(model):
        if node.proto.name and node.proto.name not in taken:
            taken.add(node.proto.name)
        else:
            nameless.append(node)
    for number, node in enumerate(nameless):
        name = node.proto.name or node.path.rpartition("/")[2]
        node.proto.name = name if name not in taken else f"{name}#{number}"
        taken.add(node.proto.name)


def recurrent_path(model: Any, sources: Collection[str]) -> RecurrentPath:
    """Follow what comes in.

    Args:
        model: an onnx ModelProto, whose nodes have names of their own.
        sources: the graph's inputs that hold sequences and states.
    """
    found: dict[str, bool] = {}
    _walk(model.graph, set(sources), found)
    paths = {node.proto.name: node.path for node in nodes_of(model)}
    # What a function is made of is known after onnxruntime has put it in the place of its calls, under other names.
    on = {name: paths[name] for name, carries in found.items() if carries}
    return RecurrentPath(on, frozenset(found.keys() - on.keys()))


def obstacles(model: Any) -> list[str]:
    """Return which nodes CUDA would leave to the CPU, told from the file alone, and for which attribute.

    Args:
        model: an onnx ModelProto.
    """
    found = []
    for node in nodes_of(model):
        attributes = {attribute.name: _value(attribute) for attribute in node.proto.attribute}
        placement = place(node.proto.op_type, attributes, list(node.proto.input))
        if placement.runs_on != "cuda":
            where = "would run on the CPU" if placement.runs_on else "cannot be run"
            found.append(f"node {node.path!r} ({node.proto.op_type}) {where}: {placement.reason}")
    return found


def told(reasons: Sequence[str]) -> str:
    """The first few of some reasons, as one."""
    more = len(reasons) - _SHOWN
    return "; ".join(reasons[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _walk(graph: Any, carrying: set[str], found: dict[str, bool]) -> set[str]:
    """Go through the nodes of a graph in order; return the tensors there that hold what came in, or follow from it.

    Args:
        graph: an onnx GraphProto.
        carrying: those that do at its beginning, of the graphs around it too.
        found: whether each node is on the path, by its name; added to.
    """
    carrying = set(carrying)
    for node in graph.node:
        for body in _bodies(node):
            _walk_body(node, body, carrying, found)
        holds = node.op_type not in _WALLS and any(name in carrying for name in node.input)
        found[node.name] = holds or node.op_type in _ALWAYS
        if found[node.name]:
            carrying.update(filter(None, node.output))
    return carrying


def _walk_body(node: Any, body: Any, carrying: set[str], found: dict[str, bool]) -> None:
    """Go through the body of a node until no step of it hands more to the next one than the step before."""
    # A Loop's body gets the step's number and the condition first, and gives the condition back first.
    given = {"Scan": list(node.input), "Loop": [None, None, *list(node.input)[2:]]}.get(node.op_type, [])
    back = {"Scan": 0, "Loop": 1}.get(node.op_type, 0)
    own = {value.name for value in (*body.input, *body.initializer)}
    inside = {one.name for one, outer in zip(body.input, given, strict=False) if outer in carrying}
    # Of an outer name that the body uses anew it has another tensor.
    outer = carrying - own
    while True:
        carried = _walk(body, outer | inside, found)
        results = [value.name in carried for value in body.output][back:]
        handed = [value.name for value in body.input][2 * back :]
        if node.op_type not in ("Scan", "Loop"):
            return
        memories = len(handed) if back else len(handed) - _scanned(node)
        more = {name for name, holds in list(zip(handed, results, strict=False))[:memories] if holds} - inside
        if not more:
            return
        inside |= more


def _scanned(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "num_scan_inputs"), 0)


def _bodies(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _value(attribute: Any) -> Attribute:
    field = _FIELDS.get(attribute.type)
    if field is None:
        return None
    value = getattr(attribute, field)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, int | float):
        return value
    return [each.decode(errors="replace") if isinstance(each, bytes) else each for each in value]
