"""A graph whose loops are written out computes what it did, and nothing in it loops or asks for the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from service.errors import LoadError
from service.graphs.unrolled import MAX_STEPS, unroll
from service.manifest import Manifest, StateSpec, TensorSpec

GRAPH = """<ir_version: 9, opset_import: ["" : 18]>
    looped (float[T, N, 2] x, float[N, 2] s0) => (float[T, N, 2] y, float[T, N, 2] z, float[N, 2] sT) {
        steps = Shape <start = 0, end = 1> (x)
        float_steps = Cast <to = 1> (steps)
        w = Mul(x, float_steps)
        sT, y, z = Scan <num_scan_inputs = 2, scan_input_directions = [0, 1], scan_output_directions = [0, 1],
                         body = step (float[N, 2] s, float[N, 2] a, float[N, 2] b)
                             => (float[N, 2] after, float[N, 2] sum, float[N, 2] s2) {
                             half = Constant <value_float = 0.5> ()
                             scaled = Mul(s, half)
                             sum = Add(scaled, a)
                             after = Sub(sum, b)
                             s2 = Identity(s)
                         }> (s0, x, w)
    }
"""
MANIFEST = Manifest(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, None, 2), batch_axis=1, time_axis=0),),
    outputs=tuple(
        TensorSpec(name=name, dtype="float32", shape=(None, None, 2), batch_axis=1, time_axis=0) for name in "yz"
    ),
    states=(StateSpec(name="s", input="s0", output="sT", dtype="float32", shape=(None, 2), batch_axis=0),),
    streamable=True,
)


def looped() -> Any:
    """A sum that forgets, over x forward and a multiple of it backward, with an output in each direction."""
    model = onnx.parser.parse_model(GRAPH)
    # Weights inside of a loop, too, as some exporters put them there.
    body = scan(model).attribute
    inner = next(attribute.g for attribute in body if attribute.name == "body")
    inner.initializer.append(onnx.numpy_helper.from_array(np.array([1.0, 3.0], np.float32), "weights"))
    inner.node.append(onnx.helper.make_node("Mul", ["sum", "weights"], ["weighted"]))
    inner.output[1].name = "weighted"
    return model


def scan(model: Any) -> Any:
    """Its loop."""
    return next(node for node in model.graph.node if node.op_type == "Scan")


def run(model: Any, steps: int) -> list[Any]:
    """Outputs and the final state of 3 rows."""
    random = np.random.default_rng(0)
    feeds = {
        "x": random.standard_normal((steps, 3, 2)).astype(np.float32),
        "s0": random.standard_normal((3, 2)).astype(np.float32),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(["y", "z", "sT"], feeds)
    return results


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_same_is_computed(steps: int) -> None:
    """Both directions of inputs and outputs, weights inside and outside of the loop, a state handed on."""
    model = looped()
    unroll(model, MANIFEST, steps)
    onnx.checker.check_model(model)
    assert not {node.op_type for node in model.graph.node} & {"Scan", "Shape"}
    for got, expected in zip(run(model, steps), run(looped(), steps), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_run_takes_that_many_steps() -> None:
    """It says so of its inputs and outputs, and onnxruntime refuses others."""
    model = looped()
    unroll(model, MANIFEST, 2)
    sizes = {value.name: value.type.tensor_type.shape.dim[0].dim_value for value in model.graph.output}
    assert sizes == {"y": 2, "z": 2, "sT": 0}
    with pytest.raises(Exception, match="Got invalid dimensions for input: x"):
        run(model, 3)


def with_another_axis(model: Any) -> None:
    """The loop runs over rows."""
    scan(model).attribute.append(onnx.helper.make_attribute("scan_input_axes", [1, 1]))


def with_a_loop_inside(model: Any) -> None:
    """The loop holds another."""
    body = next(attribute.g for attribute in scan(model).attribute if attribute.name == "body")
    body.node[0].attribute.append(onnx.helper.make_attribute("then_branch", onnx.GraphProto()))


def with_a_branch(model: Any) -> None:
    """The graph branches."""
    node = onnx.helper.make_node("If", ["x"], ["v"], "branch", then_branch=onnx.GraphProto())
    model.graph.node.append(node)


def of_an_old_opset(model: Any) -> None:
    """Its operators are of another time."""
    model.opset_import[0].version = 12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_another_axis, "runs over another axis than the first"),
        (with_a_loop_inside, "holds loops, branches or sparse weights of its own"),
        (with_a_branch, "node 'branch' is a If, and no more than Scan can be written out"),
        (of_an_old_opset, "of opset 12, and loops can be written out from opset 13 on"),
    ],
)
def test_what_cannot_be_written_out(change: Callable[[Any], None], says: str) -> None:
    """It is told what stands in the way."""
    model = looped()
    change(model)
    with pytest.raises(LoadError, match=says):
        unroll(model, MANIFEST, 2)


@pytest.mark.parametrize("steps", [0, MAX_STEPS + 1])
def test_numbers_of_steps_that_cannot_be(steps: int) -> None:
    """None, and more than would be cut without the host."""
    with pytest.raises(LoadError, match=f"{steps} steps a run: expected 1 to {MAX_STEPS}"):
        unroll(looped(), MANIFEST, steps)
    with pytest.raises(LoadError, match="2 steps a run: expected 1 to 1"):
        unroll(looped(), MANIFEST.model_copy(update={"steps_per_run": 1}), 2)
