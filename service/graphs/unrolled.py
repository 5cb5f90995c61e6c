"""A graph of a fixed number of steps, without loops: each ``Scan`` written out, step after step.

Owns that rewriting. What a CUDA graph captures has no control flow, and nothing that works out sizes on the host: so
the number of steps is written into the graph too, from where onnxruntime works out when it loads the graph what follows
from it. Must not know devices, onnxruntime or sessions.

Every ``Scan`` is taken to run over the steps; a graph with another one fails when it is loaded or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.errors import LoadError
from service.manifest import Manifest

MAX_STEPS = 32
"""Into more parts than these onnxruntime's CUDA ``Split`` cuts by a table that it copies from the host."""
_LEAST_OPSET = 13
"""From which on axes are inputs of Squeeze and Unsqueeze."""
_EQUAL_PARTS_BY_NUMBER = 18
"""From which on Split wants to be told how many parts it cuts."""


def unroll(model: Any, manifest: Manifest, steps: int) -> None:
    """Rewrite a graph in its place, so that a run takes exactly so many steps.

    Args:
        model: the onnx ModelProto.
        manifest: what the graph is served as.
        steps: from 1 to ``MAX_STEPS``.

    Raises:
        LoadError: if it cannot be rewritten; the text says why.
    """
    if not 1 <= steps <= (manifest.steps_per_run or MAX_STEPS):
        raise LoadError(f"{steps} steps a run: expected 1 to {manifest.steps_per_run or MAX_STEPS}")
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < _LEAST_OPSET:
        raise LoadError(f"the graph is of opset {opset}, and loops can be written out from opset {_LEAST_OPSET} on")
    graph = model.graph
    timed = _fix_time(graph, manifest, steps)
    nodes: list[Any] = []
    for index, node in enumerate(graph.node):
        if _is_steps(node, timed):
            _add_constant(graph, node.output[0], [steps])
        elif node.op_type == "Scan" and node.domain in ("", "ai.onnx"):
            nodes += _Unrolling(graph, node, f"conveyor.scan.{index}", steps, opset).nodes()
        elif _holds_graph(node):
            raise LoadError(
                f"node {node.name or index!r} is a {node.op_type}, and no more than Scan can be written out"
            )
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


class _Unrolling:
    """One Scan about to be written out; its names begin with ``here``."""

    def __init__(self, graph: Any, node: Any, here: str, steps: int, opset: int) -> None:
        self._graph, self._node, self._here, self._steps, self._opset = graph, node, here, steps, opset
        attributes = {attribute.name: attribute for attribute in node.attribute}
        self._body = attributes["body"].g
        self._scanned = attributes["num_scan_inputs"].i
        self._states = len(node.input) - self._scanned
        self._backward_in = _integers(attributes, "scan_input_directions", self._scanned)
        self._backward_out = _integers(attributes, "scan_output_directions", len(node.output) - self._states)
        axes = [*_integers(attributes, "scan_input_axes", 0), *_integers(attributes, "scan_output_axes", 0)]
        if any(axes):
            raise LoadError(f"Scan {node.name!r} runs over another axis than the first")
        if self._body.sparse_initializer or any(_holds_graph(inner) for inner in self._body.node):
            raise LoadError(f"Scan {node.name!r} holds loops, branches or sparse weights of its own")

    def nodes(self) -> list[Any]:
        """The nodes that stand for it; what is constant within goes to the graph."""
        from onnx import helper

        nodes: list[Any] = []
        constant = {}
        for tensor in self._body.initializer:
            constant[tensor.name] = f"{self._here}.{tensor.name}"
            self._graph.initializer.add().CopyFrom(tensor)
            self._graph.initializer[-1].name = constant[tensor.name]
        self._first = f"{self._here}.first"
        _add_constant(self._graph, self._first, [0])
        parts = [self._cut(nodes, index) for index in range(self._scanned)]
        state = list(self._node.input[: self._states])
        outputs: list[list[str]] = [[] for _ in self._backward_out]
        for step in range(self._steps):
            given = [part[-1 - step if back else step] for part, back in zip(parts, self._backward_in, strict=True)]
            results = self._step(nodes, step, constant, [*state, *given])
            state = results[: self._states]
            for collected, result in zip(outputs, results[self._states :], strict=True):
                collected.append(result)
        for name, value in zip(self._node.output, state, strict=False):
            if name:
                nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}.after"))
        served = self._node.output[self._states :]
        for name, collected, back in zip(served, outputs, self._backward_out, strict=True):
            if name:
                nodes += self._join(name, collected[::-1] if back else collected)
        return nodes

    def _step(self, nodes: list[Any], step: int, constant: dict[str, str], given: list[str]) -> list[str]:
        """Add one step's nodes; returns its states and outputs."""
        names = {**constant, **dict(zip((value.name for value in self._body.input), given, strict=True))}
        for index, inner in enumerate(self._body.node):
            copy = type(inner)()
            copy.CopyFrom(inner)
            copy.name = f"{self._here}.{step}.{index}.{inner.name}"
            copy.input[:] = [names.get(name, name) for name in inner.input]
            names |= {name: f"{self._here}.{step}.{name}" for name in inner.output if name}
            copy.output[:] = [names[name] if name else "" for name in inner.output]
            nodes.append(copy)
        return [names.get(value.name, value.name) for value in self._body.output]

    def _cut(self, nodes: list[Any], index: int) -> list[str]:
        """What goes in at each step, without the axis of time."""
        from onnx import helper

        value = self._node.input[self._states + index]
        parts = [f"{self._here}.in.{index}.{step}" for step in range(self._steps)]
        with_time = [value] if self._steps == 1 else [f"{part}.with_time" for part in parts]
        if self._steps > 1:
            number: dict[str, Any] = {"num_outputs": self._steps} if self._opset >= _EQUAL_PARTS_BY_NUMBER else {}
            nodes.append(helper.make_node("Split", [value], with_time, name=f"{self._here}.split.{index}", **number))
        for part, each in zip(parts, with_time, strict=True):
            nodes.append(helper.make_node("Squeeze", [each, self._first], [part], name=f"{part}.squeeze"))
        return parts

    def _join(self, name: str, values: list[str]) -> list[Any]:
        """An output of all steps."""
        from onnx import helper

        with_time = [name] if len(values) == 1 else [f"{name}.{step}" for step in range(len(values))]
        nodes = [
            helper.make_node("Unsqueeze", [value, self._first], [each], name=f"{each}.unsqueeze")
            for value, each in zip(values, with_time, strict=True)
        ]
        return nodes if len(values) == 1 else [*nodes, helper.make_node("Concat", with_time, [name], axis=0)]


def _integers(attributes: Any, name: str, length: int) -> list[int]:
    return list(attributes[name].ints) if name in attributes else [0] * length


def _holds_graph(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _fix_time(graph: Any, manifest: Manifest, steps: int) -> dict[str, int]:
    """Say of inputs and outputs how many steps there are; returns the axis of time of those that have one."""
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    timed = {}
    for value in (*graph.input, *graph.output):
        spec = specs.get(value.name)
        if spec is None or spec.time_axis is None or spec.time_axis in spec.absent:
            continue
        axes = [axis for axis in range(len(spec.shape)) if axis not in spec.absent]
        timed[value.name] = axes.index(spec.time_axis)
        size = value.type.tensor_type.shape.dim[timed[value.name]]
        size.Clear()
        size.dim_value = steps
    return timed


def _is_steps(node: Any, timed: Mapping[str, int]) -> bool:
    """Whether a node asks how many steps there are. onnxruntime knows only where it knows the other axes too."""
    if node.op_type != "Shape" or node.input[0] not in timed:
        return False
    slices = {attribute.name: attribute.i for attribute in node.attribute}
    axis = timed[node.input[0]]
    return (slices.get("start", 0), slices.get("end")) == (axis, axis + 1)


def _add_constant(graph: Any, name: str, values: list[int]) -> None:
    from onnx import TensorProto, helper

    graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
