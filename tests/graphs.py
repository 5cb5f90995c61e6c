"""Small models for tests of the server: real ONNX files, written without torch and so within milliseconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.reference import run_model
from models.spec import Layer, ModelSpec
from service.manifest import METADATA_KEY, LayerSpec, Manifest, StateSpec, TensorSpec

Array = NDArray[Any]
Weights = dict[str, Array]

INPUT, HIDDEN, OUTPUT = 3, 5, 2
SPEC = ModelSpec((Layer("lstm", INPUT, HIDDEN),), head_size=OUTPUT)


def weights(seed: int = 0) -> Weights:
    """Random weights of an LSTM 3->5 with a head of 2, in the canonical layout, float32."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return random.uniform(-0.8, 0.8, shape).astype(np.float32)

    return {
        "layers.0.W_x": draw(4 * HIDDEN, INPUT),
        "layers.0.W_h": draw(4 * HIDDEN, HIDDEN),
        "layers.0.b": draw(4 * HIDDEN),
        "head.W": draw(OUTPUT, HIDDEN),
        "head.b": draw(OUTPUT),
    }


def expected(x: Array, seed: int = 0) -> Array:
    """What the model of that seed gives for one sequence [T, 3], by the float64 reference: [T, 2]."""
    exact = {name: array.astype(np.float64) for name, array in weights(seed).items()}
    y, _ = run_model(SPEC, exact, x[None].astype(np.float64))
    return np.asarray(y[0])


def write_lstm(repository: Path, name: str = "lstm", version: int = 1, seed: int = 0) -> Path:
    """Write the model of a seed into a repository, time-major, with its manifest; return the file."""
    w = weights(seed)

    def onnx_order(array: Array) -> Array:
        i, f, c, o = np.split(array, 4)
        return np.concatenate([i, o, f, c])

    initializers = {
        "W": onnx_order(w["layers.0.W_x"])[None],
        "R": onnx_order(w["layers.0.W_h"])[None],
        "B": np.concatenate([onnx_order(w["layers.0.b"]), np.zeros(4 * HIDDEN, np.float32)])[None],
        "head_W": w["head.W"].T.copy(),
        "head_b": w["head.b"],
        "direction_axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R", "B", "lengths", "h0", "c0"], ["Y", "hT", "cT"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["Y", "direction_axis"], ["h"]),
        helper.make_node("MatMul", ["h", "head_W"], ["product"]),
        helper.make_node("Add", ["product", "head_b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lstm",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "N", INPUT]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["N"]),
            helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, "N", HIDDEN]),
            helper.make_tensor_value_info("c0", TensorProto.FLOAT, [1, "N", HIDDEN]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", "N", OUTPUT]),
            helper.make_tensor_value_info("hT", TensorProto.FLOAT, [1, "N", HIDDEN]),
            helper.make_tensor_value_info("cT", TensorProto.FLOAT, [1, "N", HIDDEN]),
        ],
        [numpy_helper.from_array(array, key) for key, array in initializers.items()],
    )
    manifest = Manifest(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, None, INPUT), batch_axis=1, time_axis=0),),
        lengths="lengths",
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, None, OUTPUT), batch_axis=1, time_axis=0),),
        states=tuple(
            StateSpec(name=s, input=f"{s}0", output=f"{s}T", dtype="float32", shape=(1, None, HIDDEN), batch_axis=1)
            for s in ("h", "c")
        ),
        streamable=True,
        layers=(LayerSpec(cell="lstm", input_size=INPUT, hidden_size=HIDDEN),),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: manifest.model_dump_json()})
    path = repository / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    return path


def replace_lstm(repository: Path, name: str, version: int, seed: int) -> Path:
    """Put the model of another seed under a number that is taken; return the file."""
    shutil.rmtree(repository / name / str(version))
    return write_lstm(repository, name, version, seed)


def write_broken(repository: Path, name: str, version: int) -> Path:
    """Write a file that is no model, also over one that is; return it."""
    path = repository / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a model")
    return path
