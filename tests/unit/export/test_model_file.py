"""A file leaves export only if its graph computes what it was made from; verified again, it is judged by itself."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import export.model_file
from export import ExportError, VerificationFailed, export_model
from export.describe import read_manifest
from export.graph import build_graph
from export.model_file import make_model_file, verify_file
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec
from service.errors import LoadError
from service.manifest import METADATA_KEY
from service.settings import Settings
from service.versions.loading import load_model
from tests.unit.export.sabotage import (
    LSTM_SABOTAGE,
    MANIFEST_SABOTAGE,
    SCAN_SABOTAGE,
    Sabotage,
    break_gate_order,
    drop_lengths,
    drop_linear_before_reset,
    nudge_a_weight,
    scan_past_lengths,
    with_manifest,
    with_tensor,
)
from tests.unit.models.drawn import draw_weights

LSTM = ModelSpec((Layer("lstm", 4, 4), Layer("lstm", 4, 4)), head_size=3)
GRU = ModelSpec((Layer("gru", 4, 4, reset="after"),))
SABOTAGE = [
    *((LSTM, "operator", sabotage) for sabotage in LSTM_SABOTAGE),
    *((LSTM, "scan", sabotage) for sabotage in SCAN_SABOTAGE),
    (GRU, "operator", drop_linear_before_reset),
]
NAMES = [f"{lowering}, {sabotage.__name__}" for _, lowering, sabotage in SABOTAGE]


def model(spec: ModelSpec) -> SequenceModel:
    """A model with random weights."""
    return SequenceModel.from_weights(spec, draw_weights(spec.weight_shapes, dtype=np.float32))


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelSpec, str], Path]:
    """Gives the path of a good file for a model and a lowering, each exported once."""
    folder = tmp_path_factory.mktemp("good")

    def path(spec: ModelSpec, lowering: Any) -> Path:
        file: Path = folder / str(hash(spec)) / lowering / "1" / "model.onnx"
        if not file.exists():
            export_model(model(spec), file.parents[2], lowering, lowering=lowering)
        return file

    return path


@pytest.mark.parametrize(("spec", "lowering", "sabotage"), SABOTAGE, ids=NAMES)
def test_a_wrong_graph_is_not_written(
    spec: ModelSpec, lowering: Any, sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the lowering fails verification, the error says where, and nothing is on the disk."""

    def wrong(*arguments: Any) -> onnx.ModelProto:
        graph = build_graph(*arguments)
        sabotage(graph)
        return graph

    monkeypatch.setattr(export.model_file, "build_graph", wrong)
    with pytest.raises(VerificationFailed, match=r"verification failed in .* rows") as failed:
        export_model(model(spec), tmp_path / "models", "wrong", lowering=lowering)
    assert failed.value.parity is not None
    assert any(not row.within for row in failed.value.parity.rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("spec", "lowering", "sabotage"), SABOTAGE, ids=NAMES)
def test_a_tampered_file_is_found_out(
    spec: ModelSpec, lowering: Any, sabotage: Sabotage, good_file: Callable[[ModelSpec, str], Path], tmp_path: Path
) -> None:
    """A file whose graph was changed fails by its errors; one whose weights were changed by their digest."""
    path = good_file(spec, lowering)
    assert_verifies_as_recorded(path)
    tampered = onnx.load(path)
    sabotage(tampered)
    (tmp_path / "tampered.onnx").write_bytes(tampered.SerializeToString())
    weights_changed = sabotage in (nudge_a_weight, break_gate_order)
    says = "weights are not those that the file was exported with" if weights_changed else "verification failed in"
    with pytest.raises(VerificationFailed, match=says):
        verify_file(tmp_path / "tampered.onnx")


@pytest.mark.parametrize(("sabotage", "says"), MANIFEST_SABOTAGE.values(), ids=MANIFEST_SABOTAGE.keys())
def test_a_manifest_that_does_not_fit_is_found_out(
    sabotage: Sabotage, says: str, good_file: Callable[[ModelSpec, str], Path], tmp_path: Path
) -> None:
    """What the server goes by is held against the graph: names, axes, sizes, dtypes, what can be streamed."""
    tampered = onnx.load(good_file(LSTM, "operator"))
    sabotage(tampered)
    (tmp_path / "tampered.onnx").write_bytes(tampered.SerializeToString())
    with pytest.raises(VerificationFailed, match=says):
        verify_file(tmp_path / "tampered.onnx")


@pytest.mark.parametrize("recorded", [1e9, 1.0], ids=["a bound of anything", "a bound of 1"])
def test_a_recorded_bound_hides_nothing(
    recorded: float, good_file: Callable[[ModelSpec, str], Path], tmp_path: Path
) -> None:
    """A wrong graph whose manifest records a loose bound fails as any other: the file does not set its own bound."""
    tampered = onnx.load(good_file(LSTM, "operator"))
    drop_lengths(tampered)
    parity = read_manifest(tampered).parity
    assert parity is not None
    rows = [{**row.model_dump(), "bound": recorded} for row in parity.rows]
    with_manifest(parity={**parity.model_dump(), "rows": rows})(tampered)
    (tmp_path / "tampered.onnx").write_bytes(tampered.SerializeToString())
    says = r"largest error of 1000000000.0 was allowed" if recorded > 1 else r"the bound 2.0e-06"
    with pytest.raises(ExportError, match=says):
        verify_file(tmp_path / "tampered.onnx")


def test_a_state_that_begins_elsewhere_is_found_out(tmp_path: Path) -> None:
    """Learned initial states stand in the manifest, and belong to the weights that the digest is of."""
    spec = ModelSpec((Layer("lstm", 4, 4, learned_initial_state=True),))
    file = onnx.load(export_model(model(spec), tmp_path, "learned"))
    ones = base64.b64encode(np.ones((1, 4), np.float32).tobytes()).decode()
    with_tensor("states", initial=ones)(file)
    (tmp_path / "tampered.onnx").write_bytes(file.SerializeToString())
    with pytest.raises(VerificationFailed, match="weights are not those that the file was exported with"):
        verify_file(tmp_path / "tampered.onnx")


def test_a_wrong_graph_for_cuda_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the form for CUDA alone is wrong, neither file is on the disk, and the error says which it was."""

    def wrong(spec: ModelSpec, weights: Any, lowerings: Any, *dtype: Any) -> onnx.ModelProto:
        graph = build_graph(spec, weights, lowerings, *dtype)
        if "scan" in lowerings:
            scan_past_lengths(graph)
        return graph

    monkeypatch.setattr(export.model_file, "build_graph", wrong)
    with pytest.raises(VerificationFailed, match=r"in the form for CUDA, which --devices cpu does without, verif"):
        export_model(model(ModelSpec((Layer("gru", 4, 4),))), tmp_path / "models", "wrong")
    assert list(tmp_path.iterdir()) == []


def test_several_precisions_of_one_model(tmp_path: Path) -> None:
    """Each in a file of its own, as it is alone; the path is that of the first."""
    path = export_model(model(ModelSpec((Layer("lstm", 4, 4),))), tmp_path, "both", precision=("int8", "float32"))
    files = {file.name: read_manifest(onnx.load(file)).precision for file in path.parent.iterdir()}
    assert (path.name, files) == ("model.onnx", {"model.onnx": "int8", "model.float32.onnx": "float32"})
    assert_verifies_as_recorded(path.with_name("model.float32.onnx"))


def test_a_damaged_file_is_not_served(tmp_path: Path) -> None:
    """Whatever its precision and its device: a bit of a weight that is turned is found at load, and by verify."""
    spec = ModelSpec((Layer("lstm_peephole", 4, 4),))
    settings = Settings(threads=1, device="cpu")
    path = export_model(model(spec), tmp_path, "all", precision=("float32", "float16", "int8"))
    names = {"model.onnx", "model.cuda.onnx", "model.float16.onnx", "model.int8.onnx"}
    assert {file.name for file in path.parent.iterdir()} == names
    for name in sorted(names):
        file = path.with_name(name)
        load_model(file, settings)
        weights = max((each.raw_data for each in onnx.load(file).graph.initializer), key=len)
        content = bytearray(file.read_bytes())
        content[content.index(weights)] ^= 1
        file.write_bytes(content)
        with pytest.raises(LoadError, match=f"^{re.escape(name)} is not what was written: "):
            load_model(file, settings)
        with pytest.raises(VerificationFailed):
            verify_file(file)


def assert_verifies_as_recorded(path: Path) -> None:
    """Verified again, the file gives what its manifest records, but for the module, which is not in it."""
    recorded = read_manifest(onnx.load(path)).parity
    assert recorded is not None
    assert recorded.rows[0].case == "the module itself"
    assert verify_file(path).rows == recorded.rows[1:]


def without_manifest(file: onnx.ModelProto) -> None:
    """Not exported here."""
    del file.metadata_props[:]


def with_another_format(file: onnx.ModelProto) -> None:
    """From another time."""
    onnx.helper.set_model_props(file, {METADATA_KEY: '{"format": 2}'})


def without_a_weight(file: onnx.ModelProto) -> None:
    """A weight under another name."""
    next(tensor for tensor in file.graph.initializer if tensor.name == "layers.0.R").name = "R"


def with_external_data(file: onnx.ModelProto) -> None:
    """A weight that stands elsewhere on the disk."""
    tensor = file.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere")


def with_external_data_in_a_node(file: onnx.ModelProto) -> None:
    """The same, in a constant inside of a loop."""
    tensor = onnx.TensorProto(name="inner", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere")
    body = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "body", [], [])
    file.graph.node.append(onnx.helper.make_node("Loop", ["", "", "x"], ["z"], body=body))


def with_half_a_weight(file: onnx.ModelProto) -> None:
    """A weight with fewer bytes than its shape says."""
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "layers.0.R")
    tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]


def with_words(file: onnx.ModelProto) -> None:
    """An initializer that holds no numbers."""
    file.graph.initializer.append(
        onnx.TensorProto(name="words", data_type=onnx.TensorProto.STRING, dims=[1], string_data=[b"word"])
    )


def with_half_a_kernel(file: onnx.ModelProto) -> None:
    """A name as int8 kernels have it, without a scale."""
    file.graph.initializer.append(onnx.helper.make_tensor("foo_quantized", onnx.TensorProto.INT8, [1], [1]))


def with_an_unknown_dtype(file: onnx.ModelProto) -> None:
    """A weight of a kind that there is not."""
    next(tensor for tensor in file.graph.initializer if tensor.name == "layers.0.R").data_type = 99


def without_rows(file: onnx.ModelProto) -> None:
    """A record of a verification in which nothing was compared."""
    with_manifest(parity={"reference": "NumPy float64", "provider": "none", "rows": []})(file)


def with_an_unknown_operator(file: onnx.ModelProto) -> None:
    """A graph that nothing can run."""
    next(node for node in file.graph.node if node.op_type == "LSTM").op_type = "LTSM"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_manifest, "was not exported here"),
        (with_another_format, "manifest does not hold to the format"),
        (without_a_weight, "does not hold the model that its manifest tells of.*R"),
        (with_external_data, "one file holds everything"),
        (with_external_data_in_a_node, "one file holds everything"),
        (with_half_a_weight, "does not hold the model that its manifest tells of"),
        (with_words, "does not hold the model that its manifest tells of"),
        (with_half_a_kernel, "does not hold the model .* foo_quantized has no foo_scale"),
        (with_an_unknown_dtype, "does not hold the model that its manifest tells of"),
        (without_rows, "records a verification in which nothing was compared"),
        (with_an_unknown_operator, "onnxruntime refuses the graph"),
    ],
)
def test_a_damaged_file_is_refused(
    damage: Sabotage, says: str, good_file: Callable[[ModelSpec, str], Path], tmp_path: Path
) -> None:
    """A file that cannot be verified at all gets an error that says why."""
    damaged = onnx.load(good_file(LSTM, "operator"))
    damage(damaged)
    (tmp_path / "damaged.onnx").write_bytes(damaged.SerializeToString())
    with pytest.raises(ExportError, match=says) as refused:
        verify_file(tmp_path / "damaged.onnx")
    assert not isinstance(refused.value, VerificationFailed)


@pytest.mark.parametrize(("content", "says"), [(b"\xff\xff", "is not an ONNX file"), (None, "No such file")])
def test_no_onnx_file(content: bytes | None, says: str, tmp_path: Path) -> None:
    """What is no ONNX file, or no file, is refused as that."""
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=says):
        verify_file(path)


def test_given_data_is_verified_too(good_file: Callable[[ModelSpec, str], Path]) -> None:
    """Given sequences get rows of their own, whole, cut and alone, and are held to the same bound."""
    x = np.random.default_rng(0).standard_normal((3, 5, 4))
    data = {"x": x, "lengths": np.array([5, 1, 3])}
    rows = verify_file(good_file(LSTM, "operator"), data).rows[-3:]
    cases = ["given data", "given data, whole against chunked", "given data, alone against batched"]
    assert [(row.case, row.batch, row.steps, row.within) for row in rows] == [(case, 3, 5, True) for case in cases]
    with pytest.raises(VerificationFailed):
        verify_file(good_file(LSTM, "operator"), data, max_error=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(
            (Layer("gru", 3, 4, bidirectional=True, learned_initial_state=True), Layer("lstm_peephole", 8, 5)),
            vocabulary_size=7,
            head_size=2,
            head_on="last",
        ),
        ModelSpec((Layer("lstm", 3, 4, learned_initial_state=True), Layer("lstm_coupled", 4, 4, bias=False))),
        ModelSpec((Layer("rnn", 3, 1),), head_size=1),
    ],
    ids=["everything", "learned and zero states", "sizes of 1"],
)
def test_models_of_many_parts(spec: ModelSpec, tmp_path: Path) -> None:
    """Embedding, mixed cells, learned initial states and a head on the last step verify, from the file too."""
    assert_verifies_as_recorded(export_model(model(spec), tmp_path, "many"))


def test_the_file_says_nothing_of_where_it_was_made(good_file: Callable[[ModelSpec, str], Path]) -> None:
    """No path, user or source line of the machine is in the file."""
    assert str(Path(__file__).parents[3]).encode() not in good_file(LSTM, "operator").read_bytes()


def test_auto_takes_scan_for_rnn_and_says_so() -> None:
    """The RNN operator's results depend on the batch in their last bits; "auto" avoids it, and says so."""
    spec = ModelSpec((Layer("rnn", 3, 4), Layer("lstm", 4, 4)))
    made = make_model_file(model(spec))
    assert [layer.lowering for layer in made.manifest.layers] == ["scan", "operator"]
    (note,) = made.notes
    assert "layer 1 (rnn) is lowered to Scan" in note


def test_float16() -> None:
    """Inputs, outputs, states and weights are float16; the loss is measured and stays within its bound."""
    made = make_model_file(model(LSTM), precision="float16")
    manifest = made.manifest
    assert {tensor.dtype for tensor in (*manifest.inputs, *manifest.outputs)} == {"float16"}
    assert {state.dtype for state in manifest.states} == {"float16"}
    assert made.manifest.parity is not None
    errors = [max(row.outputs, row.states) for row in made.manifest.parity.rows[1:]]
    assert 2e-6 < max(errors) <= 5e-3
    assert len(made.content) < len(made.baseline)


@pytest.mark.parametrize("head_on", ["every", "last"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_int8(bidirectional: bool, head_on: Any, tmp_path: Path) -> None:
    """LSTMs become DynamicQuantizeLSTM; what one row's company costs it is measured and recorded, not hidden."""
    first = Layer("lstm_peephole", 4, 32, bidirectional=bidirectional)
    second = Layer("lstm_coupled", first.output_size, 32, bidirectional=bidirectional)
    spec = ModelSpec((first, second), head_size=3, head_on=head_on)
    torch.manual_seed(0)
    path = export_model(SequenceModel(spec), tmp_path, "small", precision="int8")
    file = onnx.load(path)
    assert [node.op_type for node in file.graph.node].count("DynamicQuantizeLSTM") == 2
    parity = read_manifest(file).parity
    assert parity is not None
    shared = [row for row in parity.rows if row.case == "alone against batched"]
    assert max(row.states for row in shared) > 2e-6
    assert [row.bound for row in parity.rows] == [2e-6] + [5e-2] * (len(parity.rows) - 1)
    assert verify_file(path).rows


def test_the_limit_counts_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coupled cell's three gates become an LSTM's four with two biases: that is what has to fit into the file."""
    spec = ModelSpec((Layer("lstm_coupled", 3, 4),), head_size=2)
    stored = 4 * (16 * 3 + 16 * 4 + 32 + 2 * 4 + 2)
    assert make_model_file(model(spec)).manifest.layers[0].lowering == "operator"
    monkeypatch.setattr(export.model_file, "MAX_BYTES", stored - 1)
    with pytest.raises(ExportError, match=f"the weights take {stored} bytes in float32, one .onnx file holds"):
        make_model_file(model(spec))
    made = make_model_file(model(spec), "scan")
    weights = [
        t for t in onnx.load_from_string(made.content).graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    ]
    assert sum(len(tensor.raw_data) for tensor in weights) == 4 * (12 * 3 + 12 * 4 + 12 + 2 * 4 + 2)


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (nn.Linear(3, 4), {}, "got a Linear, expected a SequenceModel"),
        (nn.LSTM(3, 4, proj_size=2), {}, "projection"),
        (nn.LSTM(3, 4).bfloat16(), {}, "is torch.bfloat16, expected float16, float32 or float64"),
        (nn.GRU(3, 4), {"precision": "int8"}, "layer 1 is a gru: onnxruntime has an int8 form of LSTM"),
        (nn.LSTM(3, 4), {"precision": "int8", "lowering": "scan"}, "int8 needs the LSTM operator"),
        (nn.LSTM(3, 4), {"max_error": float("inf")}, "a largest error of inf was allowed"),
        (nn.LSTM(3, 4), {"data": {"y": np.zeros(1)}}, r"got \['y'\], expected an array 'x'"),
        (nn.LSTM(3, 4), {"data": {"x": np.zeros((2, 5, 2))}}, r"shape \(2, 5, 2\), expected numbers \[N, T, 3\]"),
        (nn.LSTM(3, 4), {"data": {"x": np.zeros((2, 5, 3)), "lengths": np.array([0, 6])}}, "each from 1 to T = 5"),
    ],
)
def test_what_cannot_be_exported(module: nn.Module, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Every refusal says what was wrong and what was expected; nothing is written."""
    with pytest.raises(ExportError, match=says):
        export_model(module, tmp_path / "models", "no", **options)
    assert list(tmp_path.iterdir()) == []
