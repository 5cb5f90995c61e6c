"""The engine with real files: what it runs, and each file that it refuses, with what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from service.engines.engine import Engine
from service.errors import LoadError
from service.manifest import METADATA_KEY
from tests.graphs import HIDDEN, INPUT, expected, write_lstm

Facts = dict[str, Any]


def rewritten(folder: Path, change: Callable[[Facts], None]) -> Path:
    """The LSTM's file with another manifest."""
    path = write_lstm(folder)
    model = onnx.load(path)
    (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    manifest = json.loads(entry.value)
    change(manifest)
    entry.value = json.dumps(manifest)
    onnx.save(model, path)
    return path


def test_runs_the_graph(tmp_path: Path) -> None:
    """Outputs and states come back in the manifest's order and the graph's axes, and equal the reference."""
    engine = Engine(write_lstm(tmp_path), "cpu", threads=1)
    assert engine.provider == "CPUExecutionProvider"
    x = np.random.default_rng(0).standard_normal((7, INPUT)).astype(np.float32)
    zeros = np.zeros((1, 1, HIDDEN), np.float32)
    lengths = np.array([7], np.int32)
    (y,), (h, c) = engine.run({"x": x[:, None], "lengths": lengths, "h0": zeros, "c0": zeros})
    assert h.shape == c.shape == (1, 1, HIDDEN)
    np.testing.assert_allclose(y[:, 0].astype(np.float64), expected(x).astype(np.float64), rtol=0, atol=2e-6)
    # The states are those of the whole, in their order: going on from them is going on.
    (rest,), _ = engine.run({"x": x[:, None], "lengths": lengths, "h0": h, "c0": c})
    np.testing.assert_allclose(
        rest[:, 0].astype(np.float64), expected(np.concatenate([x, x]))[7:].astype(np.float64), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read model.onnx: No such file"),
        (b"", "onnxruntime cannot load model.onnx: "),
        (b"hello, world", "onnxruntime cannot load model.onnx: "),
    ],
    ids=["missing", "empty", "something else"],
)
def test_refuses_what_is_no_model(tmp_path: Path, content: bytes | None, says: str) -> None:
    """Named, with the reason."""
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadError, match=says):
        Engine(path)


def test_refuses_a_truncated_model(tmp_path: Path) -> None:
    """A copy that was cut off."""
    path = write_lstm(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LoadError, match="onnxruntime cannot load"):
        Engine(path)


def test_refuses_a_model_without_manifest(tmp_path: Path) -> None:
    """A file from elsewhere: the error says how to make one that does."""
    path = write_lstm(tmp_path)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(LoadError, match=r"no manifest .*conveyor\.manifest.*python -m export"):
        Engine(path)


def replace(part: str, index: int, **change: Any) -> Callable[[Facts], None]:
    """A change of one tensor of the manifest."""
    return lambda manifest: manifest[part][index].update(change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.clear(), r"manifest is not valid: inputs: Field required"),
        (lambda m: m.update(format=9), r"manifest is not valid: format: Input should be 1"),
        (replace("inputs", 0, batch_axis=2), r"manifest is not valid: inputs\.0: .*axis 2 must exist"),
        (replace("inputs", 0, name="z"), r"graph's inputs \['x'\] are not in its manifest"),
        (lambda m: m.update(lengths=None), r"graph's inputs \['lengths'\] are not in its manifest"),
        (lambda m: m.update(states=m["states"][:1]), r"graph's inputs \['c0'\] are not in its manifest"),
        (lambda m: m["inputs"].append(m["inputs"][0] | {"name": "z"}), r"input 'z' is not in the graph, .*'x'"),
        (replace("outputs", 0, name="z"), r"output 'z' is not in the graph, which has \['cT', 'hT', 'y'\]"),
        (replace("states", 1, output="z"), r"output 'z' is not in the graph"),
        (replace("inputs", 0, dtype="float16"), r"input 'x' is float16 in the manifest and float32 in the graph"),
        (replace("outputs", 0, dtype="int64"), r"output 'y' is int64 in the manifest and float32 in the graph"),
        (replace("states", 0, dtype="float64"), r"input 'h0' is float64 in the manifest and float32 in the graph"),
        (replace("inputs", 0, shape=[None, None, 4]), r"input 'x' has shape .*4\) in the manifest and .*3\) in the"),
        (replace("inputs", 0, shape=[None, None, None]), r"input 'x' has shape .*None\) in the manifest and .*3\) in"),
        (replace("inputs", 0, shape=[None, None]), r"input 'x' has shape \(None, None\) in the manifest and"),
        (replace("outputs", 0, shape=[None, None, 9]), r"output 'y' has shape .*9\) in the manifest and .*2\) in the"),
        (replace("states", 0, shape=[2, None, 5]), r"input 'h0' has shape \(2, None, 5\) in the manifest and \(1, "),
    ],
    ids=[
        "empty",
        "format of the future",
        "malformed axis",
        "input misnamed",
        "lengths left out",
        "state left out",
        "input that is not there",
        "output misnamed",
        "state's output misnamed",
        "input's dtype",
        "output's dtype",
        "state's dtype",
        "input's size",
        "free where the graph is fixed",
        "number of axes",
        "output's size",
        "state's size",
    ],
)
def test_refuses_a_manifest_that_disagrees_with_its_graph(
    tmp_path: Path, change: Callable[[Facts], None], says: str
) -> None:
    """Each name, dtype and size is held against the graph; the error names the tensor and both sides."""
    with pytest.raises(LoadError, match=says):
        Engine(rewritten(tmp_path, change))


def test_refuses_a_fixed_batch(tmp_path: Path) -> None:
    """A graph that takes exactly one row cannot be batched, whatever its manifest says."""
    path = write_lstm(tmp_path)
    model = onnx.load(path)
    for value in [*model.graph.input, *model.graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "N":
                dimension.dim_value = 1
    onnx.save(model, path)
    with pytest.raises(LoadError, match=r"input 'x' has shape \(None, None, 3\) in the manifest and \(None, 1, 3\)"):
        Engine(path)


def test_refuses_an_operator_that_does_not_exist(tmp_path: Path) -> None:
    """The graph itself is wrong: onnxruntime's reason stands in the error."""
    node = helper.make_node("Lstm", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", "N", 3]) for name in "xy"]
    graph = helper.make_graph([node], "wrong", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(LoadError, match=r"onnxruntime cannot load model\.onnx: .*Lstm"):
        Engine(tmp_path / "model.onnx")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="CUDA starts here")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    """It fails, and says so, rather than to run on the CPU."""
    with pytest.raises(LoadError, match=r"CUDA was asked for and does not run model\.onnx: .+"):
        Engine(write_lstm(tmp_path), "cuda")
