"""The recurrent path: which nodes are on it, what follows from where they run, and what CUDA is known to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.engines.provider import CPU, CUDA, assignment
from service.graphs.recurrent_path import Assigned, name_nodes, obstacles, recurrent_path, told

H = 4
FLOAT = TensorProto.FLOAT


def value(name: str, *shape: Any, element: int = FLOAT) -> Any:
    """A tensor's name, dtype and axes."""
    return helper.make_tensor_value_info(name, element, shape or None)


def model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[str], **constants: Any) -> Any:
    """A graph of some nodes."""
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", list(inputs), [helper.make_empty_tensor_value_info(y) for y in outputs])
    graph.initializer.extend(initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def streaming(*nodes: Any, **constants: Any) -> Any:
    """A graph that takes a sequence, lengths and a state."""
    inputs = [value("x", "T", "N", H), value("lengths", "N", element=TensorProto.INT32), value("h", "N", H)]
    return model(nodes, inputs, ["y"], **constants)


def node(operator: str, inputs: str, outputs: str, name: str | None = None, **attributes: Any) -> Any:
    """A node, with its tensors' names between spaces; "-" for one that is left out."""
    given = ["" if one == "-" else one for one in inputs.split()]
    return helper.make_node(operator, given, outputs.split(), name=name, **attributes)


def test_shape_arithmetic_is_beside_the_path() -> None:
    """What depends on the sizes of a sequence alone is beside it, and what that is joined with again is on it."""
    path = recurrent_path(
        streaming(
            node("Shape", "x", "sizes", "shape"),
            node("Gather", "sizes zero", "T", "pick"),
            node("Cast", "lengths", "wide", "widen", to=TensorProto.INT64),
            node("Relu", "x", "positive", "relu"),
            node("Reshape", "positive sizes", "again", "reshape"),
            node("Add", "again T", "y", "add"),
            zero=np.int64(0),
        ),
        ["x", "h"],
    )
    assert path.beside == {"shape", "pick", "widen"}
    assert path.on.keys() == {"relu", "reshape", "add"}


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN", "DynamicQuantizeLSTM", "If", "Loop", "Scan"])
def test_recurrence_and_control_flow_are_always_on_it(operator: str) -> None:
    """Whatever they take, and with them what depends on them."""
    path = recurrent_path(streaming(node(operator, "c", "a", "one"), node("Tanh", "a", "y", "after")), ["x", "h"])
    assert path.on.keys() == {"one", "after"}


def test_bodies() -> None:
    """A node in a body is on the path where what its body is given is, by name, in order, or from the step before."""
    body = helper.make_graph(
        [
            node("Shape", "step", "sizes", "sizes of a step"),
            node("Add", "still one", "next", "counts"),
            node("Mul", "begun step", "grown", "grows"),
            node("Neg", "grown_before", "late", "in the second step"),
            node("Tanh", "outside", "seen", "from outside"),
            node("Identity", "sizes", "each", "of sizes"),
        ],
        "body",
        [value("still"), value("grown_before"), value("begun"), value("step")],
        [value("next"), value("grown"), value("late"), value("each"), value("seen")],
    )
    path = recurrent_path(
        streaming(
            node("Relu", "x", "outside", "relu"),
            node("Scan", "zero zero h x", "a b c y d", "scan", body=body, num_scan_inputs=1),
            zero=np.float32(0),
            one=np.float32(1),
        ),
        ["x", "h"],
    )
    assert path.on.keys() == {"relu", "scan", "grows", "in the second step", "from outside"}
    assert path.beside == {"sizes of a step", "counts", "of sizes"}


def test_loops() -> None:
    """Of a Loop's body the number of the step and the condition are beside the path, what is carried may be on it."""
    body = helper.make_graph(
        [
            node("Add", "number number", "twice", "number"),
            node("Identity", "going", "still", "condition"),
            node("Tanh", "carried", "after", "state"),
        ],
        "body",
        [value("number"), value("going"), value("carried")],
        [value("still"), value("after"), value("twice")],
    )
    path = recurrent_path(streaming(node("Loop", "ten yes h", "y each", "loop", body=body)), ["x", "h"])
    assert path.on.keys() == {"loop", "state"}
    assert path.beside == {"number", "condition"}


def test_what_runs_elsewhere() -> None:
    """Each node of the path that onnxruntime has put on another provider is told by its path; so is one it has made."""
    body = helper.make_graph([node("Tanh", "s", "a", "squash")], "body", [value("s"), value("i")], [value("a")])
    path = recurrent_path(
        streaming(
            node("Shape", "x", "sizes", "shape"),
            node("Scan", "h x", "y", "scan", body=body, num_scan_inputs=1),
        ),
        ["x", "h"],
    )
    fine = [Assigned("shape", "Shape", CPU), Assigned("scan", "Scan", CUDA), Assigned("squash", "Tanh", CUDA)]
    assert path.elsewhere(fine, CUDA) == []
    assert path.elsewhere([*fine[:2], Assigned("squash", "Tanh", CPU)], CUDA) == [
        f"node 'scan/body/squash' (Tanh) is run by {CPU}"
    ]
    assert path.elsewhere([*fine, Assigned("scan/fused", "Gemm", CPU)], CUDA) == [
        f"node 'scan/fused' (Gemm) is run by {CPU}"
    ]


def test_the_record_of_onnxruntime() -> None:
    """Nodes are known again by the names that they were given, in bodies too; on the CPU alone nothing is on CUDA."""
    body = helper.make_graph(
        [node("Add", "s i", "b"), node("Tanh", "b", "a")],
        "body",
        [value("s", "N", H), value("i", "N", H)],
        [value("a", "N", H)],
    )
    made = streaming(
        node("Shape", "x", "sizes"),
        node("Scan", "h x", "hT", "scan", body=body, num_scan_inputs=1),
        node("Shape", "lengths", "more", "scan"),
        node("Neg", "hT", "y"),
    )
    name_nodes(made)
    names = [one.name for one in made.graph.node]
    assert len(set(names)) == 4
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=[CPU])
    path = recurrent_path(made, ["x", "h"])
    assert path.elsewhere(assignment(session), CPU) == []
    elsewhere = path.elsewhere(assignment(session), CUDA)
    assert sorted(one.partition(") ")[0] for one in elsewhere) == [
        "node 'Neg[3]' (Neg",
        "node 'scan' (Scan",
        "node 'scan/body/Add[0]' (Add",
        "node 'scan/body/Tanh[1]' (Tanh",
    ]


def test_obstacles() -> None:
    """A node that cuDNN lacks is named with its path and the attribute for which it does; what CUDA has is not."""
    body = helper.make_graph(
        [node("GRU", "s W R", "a b", "inner", hidden_size=H)], "body", [value("s"), value("i")], [value("b")]
    )
    made = streaming(
        node("LSTM", "x W R B - h c", "a", "plain", hidden_size=H),
        node("LSTM", "x W R B - h c P", "b", "peeping", hidden_size=H),
        node("Scan", "h x", "y", "scan", body=body, num_scan_inputs=1),
        node("RNN", "x W R", "d", "relu", hidden_size=H, activations=["Relu"]),
    )
    why = "would run on the CPU:"
    assert obstacles(made) == [
        f"node 'peeping' (LSTM) {why} peepholes (input P): cuDNN has none",
        f"node 'scan/body/inner' (GRU) {why} linear_before_reset=0: cuDNN resets after the recurrent product",
        f"node 'relu' (RNN) {why} activations=Relu: cuDNN has the usual ones alone",
    ]


def test_many_reasons() -> None:
    """The first few are told, and how many more there are."""
    assert told(["a", "b"]) == "a; b"
    assert told(list("abcde")) == "a; b; c; and 2 more"
