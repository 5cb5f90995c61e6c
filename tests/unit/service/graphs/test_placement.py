"""Where nodes run: the rules, and as far as the CPU goes, that onnxruntime holds to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from service.graphs.placement import Placement, place

PEEPHOLES = ["X", "W", "R", "B", "", "h", "c", "P"]


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs"),
    [
        ("LSTM", {"hidden_size": 4}, ["X", "W", "R"]),
        ("LSTM", {"direction": "bidirectional", "activations": 2 * ["Sigmoid", "Tanh", "Tanh"]}, ["X", "W", "R"]),
        ("LSTM", {"input_forget": 0}, [*PEEPHOLES[:7], ""]),
        ("GRU", {"linear_before_reset": 1}, ["X", "W", "R"]),
        ("RNN", {"activations": ["Tanh"]}, ["X", "W", "R"]),
        ("Scan", {"num_scan_inputs": 1}, ["h", "x"]),
        ("MatMul", {}, ["a", "b"]),
    ],
)
def test_what_runs_on_both(operator: str, attributes: dict[str, Any], inputs: list[str]) -> None:
    """The usual forms run on the device that they are meant for."""
    assert place(operator, attributes, inputs, device="cuda") == Placement("cuda")
    assert place(operator, attributes, inputs, device="cpu") == Placement("cpu")


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "names"),
    [
        ("LSTM", {}, PEEPHOLES, "peepholes"),
        ("LSTM", {"input_forget": 1}, [], "input_forget=1"),
        ("LSTM", {"clip": 3.0}, [], "clip"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, [], "activations=Sigmoid,Relu,Tanh"),
        ("GRU", {}, [], "linear_before_reset=0"),
        ("GRU", {"linear_before_reset": 1, "activation_alpha": [0.1]}, [], "activation_alpha"),
        ("RNN", {"activations": ["Relu"]}, [], "activations=Relu"),
        ("DynamicQuantizeLSTM", {}, [], "DynamicQuantizeLSTM"),
    ],
)
def test_what_falls_back(operator: str, attributes: dict[str, Any], inputs: list[str], names: str) -> None:
    """What cuDNN lacks runs on the CPU, and the reason names the attribute."""
    meant_for_cuda = place(operator, attributes, inputs, device="cuda")
    assert meant_for_cuda.runs_on == "cpu"
    assert meant_for_cuda.reason is not None
    assert names in meant_for_cuda.reason
    assert place(operator, attributes, inputs, device="cpu") == Placement("cpu")


def test_every_reason_is_told() -> None:
    """Two reasons to fall back are both named."""
    reason = place("GRU", {"clip": 1.0}).reason
    assert reason is not None
    assert "clip" in reason
    assert "linear_before_reset=0" in reason


def test_float64_runs_on_cuda_alone() -> None:
    """Where cuDNN takes it, that is; else nowhere."""
    assert place("LSTM", {}, dtype="float64", device="cuda") == Placement("cuda")
    assert place("LSTM", {"clip": 1.0}, dtype="float64", device="cuda").runs_on is None


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_the_cpu_does_what_is_said(operator: str, layout: int, dtype: str) -> None:
    """A node of that layout and dtype runs in onnxruntime on the CPU if and only if its placement says so."""
    attributes: dict[str, Any] = {"hidden_size": 2} | ({"layout": 1} if layout else {})
    said = place(operator, attributes, ["x", "W", "R"], dtype, device="cpu").runs_on
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}.get(
        dtype, TensorProto.BFLOAT16
    )
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "W", "R"], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", element, [None, None, 3])],
        [helper.make_tensor_value_info("y", element, None)],
        [
            helper.make_tensor("W", element, [1, gates * 2, 3], np.zeros(gates * 6)),
            helper.make_tensor("R", element, [1, gates * 2, 2], np.zeros(gates * 4)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def run() -> None:
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.zeros((1, 1, 3), dtype if dtype != "bfloat16" else np.float32)})

    if said == "cpu":
        run()
    else:
        assert said is None
        with pytest.raises(Exception, match=r"layout|support|implementation"):
            run()
