"""What is exported for CUDA: which models have a file for it, and that it computes what the CPU's does.

Both are run on the CPU here; tests/gpu runs them on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export import ExportError, VerificationFailed, export_model
from export.describe import read_manifest
from export.inspect.anatomy import dissect
from export.model_file import make_model_file, make_model_files, verify_file
from export.verify import AGAINST_CPU
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec
from service.graphs.onnx_file import OnnxFile
from service.graphs.unrolled import unroll
from service.manifest import Manifest
from tests.unit.models.drawn import LAYERS, draw_weights

ONE_FORM = {"lstm", "lstm_coupled", "gru, reset after", "rnn, relu"}
"""The layers that are written for either device alike: as an operator, the last as a Scan."""

PEEPHOLES = Layer("lstm_coupled", 3, 4, peepholes=True)
MODELS = {name: (layer,) for name, layer in LAYERS.items() if layer.bias} | {
    "gru, both ways": (replace(LAYERS["gru, reset before"], bidirectional=True),),
    "coupled with peepholes, both ways": (replace(PEEPHOLES, bidirectional=True),),
    "gru, learned": (replace(LAYERS["gru, reset before"], learned_initial_state=True),),
    "coupled with peepholes, learned": (replace(PEEPHOLES, learned_initial_state=True),),
    "gru, no bias": (Layer("gru", 3, 4, bias=False),),
    "one of each": (Layer("rnn", 3, 4), Layer("lstm", 4, 5), Layer("gru", 5, 4), Layer("gru", 4, 4, reset="after")),
}


def model(*layers: Layer) -> SequenceModel:
    """A model with random weights and a head."""
    spec = ModelSpec(layers, head_size=2)
    return SequenceModel.from_weights(spec, draw_weights(spec.weight_shapes, dtype=np.float32))


def run(model: Path | bytes, manifest: Manifest, steps: int = 9) -> list[Any]:
    """Outputs and final states of 3 rows of up to so many steps, from random states."""
    random, dtype = np.random.default_rng(0), manifest.states[0].dtype
    lengths = np.array([steps, 1, (steps + 1) // 2], np.int32)
    feeds = {"x": random.standard_normal((steps, 3, 3)).astype(dtype), "lengths": lengths}
    for state in manifest.states:
        feeds[state.input] = random.uniform(-1, 1, [size or 3 for size in state.shape]).astype(dtype)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(["y", *(state.output for state in manifest.states)], feeds)
    return results


@pytest.mark.parametrize(("name", "layers"), MODELS.items(), ids=MODELS.keys())
def test_a_file_for_cuda(name: str, layers: tuple[Layer, ...], tmp_path: Path) -> None:
    """It is there where a device takes another form; of the same contract, weights and results, states too."""
    path = export_model(model(*layers), tmp_path, "model")
    for_cuda = path.with_name("model.cuda.onnx")
    assert {file.name for file in path.parent.iterdir()} == (
        {"model.onnx"} if name in ONE_FORM else {"model.onnx", "model.cuda.onnx"}
    )
    anatomy = dissect(OnnxFile(path if name in ONE_FORM else for_cuda))
    assert [(each.path, each.cuda.reason) for each in anatomy.recurrences if each.cuda.runs_on != "cuda"] == []
    if name in ONE_FORM:
        return
    ours, theirs = read_manifest(onnx.load(for_cuda)), read_manifest(onnx.load(path))
    apart = {"layers", "parity"}
    assert ours.model_dump(exclude=apart) == theirs.model_dump(exclude=apart)
    assert ours.weights_digest is not None

    assert ours.parity is not None
    against = [row for row in ours.parity.rows if row.case == AGAINST_CPU]
    assert {(row.batch, row.steps) for row in against} == {(N, T) for N in (1, 2, 7) for T in (1, 2, 33)}
    assert all(row.within and row.bound == (4e-6 if row in against else 2e-6) for row in ours.parity.rows)
    assert verify_file(for_cuda).rows == ours.parity.rows[1:]
    for got, expected in zip(run(for_cuda, ours), run(path, theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_layers_that_cudnn_has_stay_operators() -> None:
    """Of a stack only those it lacks are loops; the user is told which, and why, and nodes are named by the layer."""
    _, others = make_model_files(model(*MODELS["one of each"]))
    made = others["cuda"]
    recurrences = [node for node in onnx.load_from_string(made.content).graph.node if node.name.startswith("layers.")]
    assert [node.name for node in recurrences] == ["layers.0.RNN", "layers.1.LSTM", "layers.2.Scan", "layers.3.GRU"]
    assert [layer.lowering for layer in made.manifest.layers] == ["operator", "operator", "scan", "operator"]
    assert made.notes == (
        "layer 3 (gru) is lowered to Scan for CUDA: linear_before_reset=0: cuDNN resets after the recurrent product",
    )


@pytest.mark.parametrize("name", ["coupled with peepholes, learned", "gru, both ways", "lstm, relu", "rnn"])
def test_float16(name: str) -> None:
    """The file for CUDA has the first precision, in all that goes in and comes out, and stays within its bound."""
    first, others = make_model_files(model(*MODELS[name]), precisions=("float16",))
    assert others.keys() == {"cuda"}
    manifest = others["cuda"].manifest
    assert (manifest.precision, manifest.states) == ("float16", first.manifest.states)
    assert manifest.parity is not None
    assert {row.bound for row in manifest.parity.rows[1:]} == {5e-3, 1e-2}
    assert 2e-6 < manifest.parity.max_error <= 5e-3
    half, found = np.dtype(np.float16), onnx.load_from_string(others["cuda"].content)
    floats = {dtype for dtype in dtypes(found.graph) if np.issubdtype(dtype, np.floating)}
    assert floats == {half}


def dtypes(graph: onnx.GraphProto) -> set[np.dtype[Any]]:
    """Those of inputs, outputs and initializers, and of the same in the bodies of loops."""
    values = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    kinds = {*values, *(tensor.data_type for tensor in graph.initializer)} - {onnx.TensorProto.UNDEFINED}
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return {np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)) for kind in kinds}.union(*map(dtypes, bodies))


def test_a_bound_is_kept(tmp_path: Path) -> None:
    """Verified again, a file for CUDA is held to what it was exported with, not to what its two forms may differ by."""
    path = export_model(model(PEEPHOLES), tmp_path, "model", max_error=1e-6).with_name("model.cuda.onnx")
    bounds = {row.case: row.bound for row in verify_file(path).rows}
    assert bounds.pop(AGAINST_CPU) == 2e-6
    assert set(bounds.values()) == {1e-6}


def test_other_precisions_have_no_file_for_cuda() -> None:
    """The one that there is has the first; int8 beside it is for the CPU."""
    first, others = make_model_files(model(LAYERS["lstm_peephole"]), precisions=("float32", "int8"))
    assert {what: made.manifest.precision for what, made in others.items()} == {"int8": "int8", "cuda": "float32"}
    assert others["cuda"].manifest.weights_digest == first.manifest.weights_digest
    assert first.notes == ()
    assert others["int8"].notes == ("CUDA will not run this file: int8 is for the CPU alone",)


@pytest.mark.parametrize(
    ("options", "lowerings", "note"),
    [
        ({"devices": ("cpu",)}, ["operator"], None),
        ({"devices": ("cuda",)}, ["scan"], "layer 1 (lstm_peephole) is lowered to Scan for CUDA"),
        ({"lowering": "operator"}, ["operator"], "CUDA will not run this file: layer 1 (lstm_peephole) is an operator"),
        ({"lowering": "scan"}, ["scan"], None),
        ({"precisions": ("int8",)}, ["operator"], "CUDA will not run this file: int8 is for the CPU alone"),
    ],
    ids=["for the CPU", "for CUDA", "operators everywhere", "Scan everywhere", "int8"],
)
def test_one_file_alone(options: dict[str, Any], lowerings: list[str], note: str | None) -> None:
    """For one device, in a form asked for outright, or in int8, there is none for CUDA; and a note of that."""
    first, others = make_model_files(model(LAYERS["lstm_peephole"]), **options)
    assert ([layer.lowering for layer in first.manifest.layers], others) == (lowerings, {})
    assert [said.startswith(note or "") for said in first.notes] == [True] * (note is not None)


def test_int8_for_cuda_is_refused() -> None:
    """CUDA has no int8 kernel for a recurrence, and export says so."""
    with pytest.raises(ExportError, match="int8 is for the CPU: CUDA has no kernel for DynamicQuantizeLSTM"):
        make_model_files(model(LAYERS["lstm"]), precisions=("int8",), devices=("cuda",))


def test_a_file_for_cuda_beside_another_model(tmp_path: Path) -> None:
    """One that was left behind is found out when it is verified, though it is right in itself."""
    path = export_model(model(LAYERS["gru, reset before"]), tmp_path, "model")
    left = path.with_name("model.cuda.onnx").read_bytes()
    wider = model(Layer("gru", 3, 5))
    export_model(wider, tmp_path, "model", version=1, overwrite=True)
    path.with_name("model.cuda.onnx").write_bytes(left)
    with pytest.raises(VerificationFailed, match=r"model.onnx, beside it, is not the same model: weights_digest is"):
        verify_file(path.with_name("model.cuda.onnx"))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_same_without_loops(steps: int) -> None:
    """Written out for a CUDA graph, cells that are loops compute the same, ragged too, and nothing asks for sizes."""
    cells = (
        "coupled with peepholes, learned",
        "lstm_peephole",
        "gru, both ways",
        "gru, reset after, relu",
        "rnn, relu",
    )
    layers = [MODELS[cell][0] for cell in cells]
    sizes = [3, *(layer.output_size for layer in layers)]
    layers = [replace(layer, input_size=size) for layer, size in zip(layers, sizes, strict=False)]
    made = make_model_file(model(*layers), device="cuda")
    assert {layer.lowering for layer in made.manifest.layers} == {"scan"}

    graph = onnx.load_from_string(made.content)
    unroll(graph, made.manifest, steps)
    operators = {node.op_type for node in graph.graph.node}
    assert not operators & {"Scan", "Shape", "Size", "NonZero"}
    got, expected = (run(content, made.manifest, steps) for content in (graph.SerializeToString(), made.content))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
