"""How values move through an ONNX graph: which of its inputs begins which memory, and which output ends it.

A memory is what a recurrent node hands from step to step: h and c of an LSTM, h of a GRU or RNN, each carried value of
a Loop or Scan. Owns the walk, through bodies and functions. Must not know what is made of it.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from service.graphs.placement import CPU_ONLY, RECURRENT

Value = tuple[str, str]
"""A tensor: the path of the body that it is made in, and its name there."""

MAX_NODES = 100_000
"""Nodes that are walked, a function's again for each call: more is not followed."""

MAX_DEPTH = 30
"""Functions that call each other; deeper ones are not followed."""

# What hands its data on as it is, rearranged at most: the inputs that are data, None for all of them.
_CARRIERS: dict[str, tuple[int, ...] | None] = {
    "Cast": (0,),
    "CastLike": (0,),
    "Concat": None,
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
_KEPT = ("Add", "Mul", "Tanh")
_X, _LENGTHS, _H, _C = 0, 4, 5, 6


@dataclass(frozen=True)
class Memory:
    """What a node hands from step to step.

    Attributes:
        node: the node's operator and path, for people.
        begins: what its first value is called, ``initial_h`` say.
        ends: what its last value is called, ``Y_h`` say.
        entry: the tensor that it begins with; None where the node says none, which stands for zeros.
        exit: the tensor that it ends as; None where nobody takes it.
        every: the tensor that holds it after every step; None where there is none.
        recurrent: whether it is an LSTM's, GRU's or RNN's, rather than a Loop's or Scan's.
    """

    node: str
    begins: str
    ends: str
    entry: Value | None
    exit: Value | None
    every: Value | None = None
    recurrent: bool = True


@dataclass(frozen=True)
class Operation:
    """A sum, a product by element or a tanh: what cells out of ordinary operators are known by."""

    operator: str
    inputs: tuple[Value, ...]
    output: Value


@dataclass
class Dataflow:
    """The values of a graph, and what they become.

    Attributes:
        memories: of all its nodes.
        features: what recurrent nodes take as X, ``[T, N, I]``.
        scanned: what a Scan takes a step of at a time, ``[T, ...]``.
        lengths: what they take as sequence_lens.
        comparisons: the constants that a value is compared with, by the value.
        operations: sums, products by element and tanhs, in the file's order.
        whole: False where there were too many nodes to follow them all.
    """

    memories: list[Memory] = field(default_factory=list)
    features: list[Value] = field(default_factory=list)
    scanned: list[Value] = field(default_factory=list)
    lengths: list[Value] = field(default_factory=list)
    comparisons: dict[Value, list[Value]] = field(default_factory=lambda: defaultdict(list))
    operations: list[Operation] = field(default_factory=list)
    whole: bool = True
    _carried: dict[Value, list[Value]] = field(default_factory=lambda: defaultdict(list))
    _used: dict[Value, list[Value]] = field(default_factory=lambda: defaultdict(list))

    def carries(self, value: Value) -> set[Value]:
        """All tensors that hold the value or parts of it, as they are."""
        return _reach(value, self._carried)

    def depends(self, value: Value, walls: Set[Value] = frozenset()) -> set[Value]:
        """All tensors that depend on the value, by ways that do not go through any of ``walls``."""
        return _reach(value, self._used, walls)


def follow(model: Any) -> Dataflow:
    """Walk through a model.

    Args:
        model: an onnx ModelProto.
    """
    flow = Dataflow()
    functions = {(function.domain, function.name): function for function in model.functions}
    walk = _Walk(flow, functions)
    walk.body(model.graph, "", ChainMap())
    return flow


class _Walk:
    def __init__(self, flow: Dataflow, functions: Mapping[tuple[str, str], Any]) -> None:
        self._flow = flow
        self._functions = functions
        self._left = MAX_NODES
        self._calls: list[tuple[str, str]] = []

    def body(self, graph: Any, path: str, outer: ChainMap[str, Value]) -> ChainMap[str, Value]:
        """Walk through a graph or function; return the tensors of its names."""
        names = outer.new_child()
        # Paths are for people: nodes of one name have the same.
        scope = f"{path}#{self._left}" if path else ""
        for given in (*graph.input, *getattr(graph, "initializer", ())):
            name = given if isinstance(given, str) else given.name
            names[name] = (scope, name)
        for index, node in enumerate(graph.node):
            self._left -= 1
            if self._left < 0:
                self._flow.whole = False
                break
            for name in node.output:
                names[name] = (scope, name)
            self._node(node, f"{path}{node.name or f'{node.op_type}[{index}]'}", names)
        return names

    def _node(self, node: Any, path: str, names: ChainMap[str, Value]) -> None:
        inputs = [names.get(name) if name else None for name in node.input]
        outputs = [names[name] if name else None for name in node.output]
        _through(self._flow._used, (path, f"used#{self._left}"), inputs, outputs)
        if node.domain in ("", "ai.onnx") and node.op_type in _CARRIERS:
            data = _CARRIERS[node.op_type]
            held = [value for number, value in enumerate(inputs) if data is None or number in data]
            _through(self._flow._carried, (path, f"carried#{self._left}"), held, outputs)
        if node.domain in ("", "ai.onnx") and node.op_type in _KEPT and len(outputs) == 1 and outputs[0]:
            operands = tuple(value for value in inputs if value)
            self._flow.operations.append(Operation(node.op_type, operands, outputs[0]))
        if node.op_type in ("Equal", "Less", "Greater") and len(inputs) == 2:
            for one, other in (inputs, inputs[::-1]):
                if one and other:
                    self._flow.comparisons[one].append(other)
        if node.op_type in (*RECURRENT, *CPU_ONLY):
            self._recurrent(node, path, inputs, outputs)
        elif (node.domain, node.op_type) in self._functions:
            self._call(node, path, inputs, outputs)
        else:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self._inside(node, attribute.g, f"{path}/{attribute.name}/", inputs, outputs, names)
        self._carried_by_loops(node, path, inputs, outputs)

    def _recurrent(self, node: Any, path: str, inputs: list[Value | None], outputs: list[Value | None]) -> None:
        kinds = [("h", _H), ("c", _C)] if "LSTM" in node.op_type else [("h", _H)]
        for number, (kind, at) in enumerate(kinds, start=1):
            self._flow.memories.append(
                Memory(
                    f"{node.op_type} {path!r}",
                    f"initial_{kind}",
                    f"Y_{kind}",
                    entry=_at(inputs, at),
                    exit=_at(outputs, number),
                    every=_at(outputs, 0) if kind == "h" else None,
                )
            )
        self._flow.features += [x for x in [_at(inputs, _X)] if x]
        self._flow.lengths += [x for x in [_at(inputs, _LENGTHS)] if x]

    def _inside(
        self,
        node: Any,
        body: Any,
        path: str,
        inputs: list[Value | None],
        outputs: list[Value | None],
        names: ChainMap[str, Value],
    ) -> None:
        inner = self.body(body, path, names)
        results = [inner.get(result.name) for result in body.output]
        if node.op_type == "Loop":
            # The body has the step's number and the condition before what is carried, and gives the condition back.
            given, results = [None, None, *inputs[2:]], results[1:]
        else:
            given = inputs if node.op_type == "Scan" else []
        for graph in (self._flow._used, self._flow._carried):
            _connect(graph, zip(given, [inner[each.name] for each in body.input], strict=False))
            _connect(graph, zip(results, outputs, strict=False))

    def _carried_by_loops(self, node: Any, path: str, inputs: list[Value | None], outputs: list[Value | None]) -> None:
        if node.op_type == "Loop":
            carried = inputs[2:]
        elif node.op_type == "Scan":
            scanned = next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)
            carried = inputs[: max(0, len(inputs) - scanned)]
            if not any(attribute.name == "scan_input_axes" for attribute in node.attribute):
                self._flow.scanned += [value for value in inputs[len(carried) :] if value]
        else:
            return
        for number, entry in enumerate(carried):
            what = f"carried value {number}"
            self._flow.memories.append(
                Memory(f"{node.op_type} {path!r}", what, what, entry, _at(outputs, number), recurrent=False)
            )

    def _call(self, node: Any, path: str, inputs: list[Value | None], outputs: list[Value | None]) -> None:
        key = (node.domain, node.op_type)
        if len(self._calls) == MAX_DEPTH:
            self._flow.whole = False
            return
        self._calls.append(key)
        function = self._functions[key]
        inner = self.body(function, f"{path}/", ChainMap())
        self._calls.pop()
        for graph in (self._flow._used, self._flow._carried):
            _connect(graph, zip(inputs, [inner[name] for name in function.input], strict=False))
            _connect(graph, zip([inner.get(name) for name in function.output], outputs, strict=False))


def _at(values: list[Value | None], index: int) -> Value | None:
    return values[index] if index < len(values) else None


def _through(
    graph: dict[Value, list[Value]], node: Value, inputs: Iterable[Value | None], outputs: Iterable[Value | None]
) -> None:
    """Connect all inputs with all outputs, by way of the node: pair by pair there could be too many."""
    _connect(graph, ((value, node) for value in inputs))
    _connect(graph, ((node, value) for value in outputs))


def _connect(graph: dict[Value, list[Value]], pairs: Iterable[tuple[Value | None, Value | None]]) -> None:
    for one, other in pairs:
        if one is not None and other is not None:
            graph[one].append(other)


def _reach(value: Value, graph: Mapping[Value, list[Value]], walls: Set[Value] = frozenset()) -> set[Value]:
    found, waiting = {value}, [value]
    while waiting:
        for each in graph.get(waiting.pop(), ()):
            if each not in found and each not in walls:
                found.add(each)
                waiting.append(each)
    return found
