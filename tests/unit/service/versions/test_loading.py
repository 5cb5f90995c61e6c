"""From a file to a graph: what is read for it, what tells it from others, what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from pydantic import create_model

from service.engines.engine import Engine
from service.errors import LoadError
from service.manifest import Manifest
from service.settings import Settings
from service.versions.loading import load_model
from tests.any_graphs import CASES, CELL, Case, model, place
from tests.graph_variants import write_int8
from tests.graphs import write_lstm

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = Settings(threads=1)
STEP: Case = next(case for case in CASES if case.name == "[N, H], no time axis")
FILES: Case = next(case for case in CASES if case.files)


def digest(path: Path) -> str:
    """What tells the model from any other."""
    return load_model(path, SETTINGS).graph.digest


def test_a_file_that_was_exported_here(tmp_path: Path) -> None:
    """Known by its bytes, as before; and by the same where a description says only how to serve it."""
    path = write_lstm(tmp_path)
    assert digest(path) == Engine(path).digest
    (tmp_path / "lstm/model.yaml").write_text("versions: {latest: 3}\nstrict: true")
    assert digest(path) == Engine(path).digest


def test_a_manifest_and_a_description_of_one_graph(tmp_path: Path) -> None:
    """Which of them counts is not guessed."""
    path = write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text(STEP.description)
    with pytest.raises(LoadError, match=r"the file has a manifest inside, and model\.yaml describes its graph too"):
        load_model(path, SETTINGS)


def test_operators_that_nobody_knows(tmp_path: Path) -> None:
    """A file with a description is refused for them by name, before onnxruntime sees it."""
    graph = model(STEP.graph.replace("MatMul(x, W)", "my.ops.Magic(x, W)"), STEP.weights)
    graph.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    path = place(tmp_path, "any", graph, STEP.description)
    with pytest.raises(LoadError, match=r"is a Magic of domain 'my\.ops', which onnxruntime does not bring along"):
        load_model(path, SETTINGS)


def test_neither(tmp_path: Path) -> None:
    """Both ways are told."""
    path = place(tmp_path, "any", model(STEP.graph, STEP.weights), "strict: true")
    with pytest.raises(
        LoadError, match=r"no manifest .* no model\.yaml .*python -m export, .*python -m export inspect"
    ):
        load_model(path, SETTINGS)


def test_what_changes_the_results_changes_the_digest(tmp_path: Path) -> None:
    """The graph, a constant, an initial state: sessions go on in the same model alone. How it is served is no part."""
    path = FILES.write(tmp_path)
    yaml = path.parent.parent / "model.yaml"
    described = yaml.read_text()
    first = digest(path)
    yaml.write_text(described + "tolerance: 1e-3\nversions: [1]\nrow_by_row: true")
    assert digest(path) == first
    yaml.write_text(described.replace("value: 2", "value: 3"))
    second = digest(path)
    yaml.write_text(described)
    np.save(path.parent.parent / "h0.npy", np.zeros((1, 1, 4), np.float32))
    third = digest(path)
    np.save(path.parent.parent / "h0.npy", FILES.files["h0.npy"])
    assert digest(path) == first
    other = onnx.load(path)
    other.producer_name = "another"
    onnx.save(other, path)
    assert len({first, second, third, digest(path)}) == 4


def outside(folder: Path, location: str) -> Path:
    """The model with its recurrent weights outside the file."""
    content = model(STEP.graph, STEP.weights)
    (weight,) = [tensor for tensor in content.graph.initializer if tensor.name == "R"]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    path = place(folder, "any", content, STEP.description)
    CELL["R"].tofile(path.parent / "weights.bin")
    return path


def test_external_data(tmp_path: Path) -> None:
    """Beside the file it is read, counts towards the limit, and is part of what the model is."""
    path = outside(tmp_path, "weights.bin")
    graph = load_model(path, SETTINGS).graph
    x, h = np.ones((1, 1, 3), np.float32), np.ones((1, 4), np.float32)
    (y,), _ = graph.run({"x": x, "h": h, str(graph.manifest.lengths): np.array([1], np.int32)})
    expected = np.tanh(x[0] @ CELL["W"] + h @ CELL["R"]) @ CELL["V"]
    np.testing.assert_allclose(y[:, 0].astype(np.float64), expected, rtol=0, atol=1e-6)
    size = path.stat().st_size + CELL["R"].nbytes
    load_model(path, Settings(threads=1, max_model_bytes=size))
    with pytest.raises(LoadError, match=f"the model has {size} bytes; this server loads up to {size - 1}"):
        load_model(path, Settings(threads=1, max_model_bytes=size - 1))
    (CELL["R"] * 2).tofile(path.parent / "weights.bin")
    assert digest(path) != graph.digest


@pytest.mark.parametrize("with_manifest", [False, True], ids=["described", "with a manifest"])
@pytest.mark.parametrize("location", ["../weights.bin", "link.bin", "/etc/hostname", "none.bin"])
def test_external_data_elsewhere(tmp_path: Path, location: str, with_manifest: bool) -> None:
    """Refused before onnxruntime sees it, whoever says of himself that he wrote the file."""
    path = outside(tmp_path, location)
    os.symlink("/etc/hostname", path.parent / "link.bin")
    shutil.copy(path.parent / "weights.bin", path.parent.parent / "weights.bin")
    if with_manifest:
        content = onnx.load(path, load_external_data=False)
        entries = onnx.load(write_lstm(tmp_path)).metadata_props
        content.metadata_props.extend(entries)
        path.write_bytes(content.SerializeToString())
        (path.parent.parent / "model.yaml").unlink()
    with pytest.raises(
        LoadError, match=r"the external data of tensor 'R', .* (outside the model's|a link out|missing)"
    ):
        load_model(path, SETTINGS)


def test_a_file_over_the_limit(tmp_path: Path) -> None:
    """Told before it is read."""
    path = tmp_path / "large/1/model.onnx"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(
        LoadError, match=r"the model has 5368709120 bytes; this server loads up to 4294967296 \(--max-m"
    ):
        load_model(path, SETTINGS)


def test_what_is_audited_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the numbers that were found, and each reservation."""
    case = next(case for case in CASES if case.name == "rows that are mixed")
    load_model(case.write(tmp_path), SETTINGS)
    said = capsys.readouterr().out
    assert "model audited" in said
    assert "row_by_row=True" in said
    assert "chunks=0.0" in said
    assert "model served with a reservation" in said


def test_onnx_is_not_imported_for_files_that_were_exported_here(tmp_path: Path) -> None:
    """It takes half a second, and a server with such models alone starts without it."""
    code = (
        "import sys; from pathlib import Path; from service.versions.loading import load_model; "
        "from service.settings import Settings; load_model(Path(sys.argv[1]), Settings()); "
        "sys.exit('onnx' in sys.modules)"
    )
    for path, imported in ((write_lstm(tmp_path), 0), (STEP.write(tmp_path), 1)):
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == imported, done.stderr


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("model.yaml", "", r"; model\.yaml is there, and says nothing of inputs, states and outputs$"),
        ("model.yml", STEP.description, r"; there is model\.yml, which is not read: expected any/model\.yaml$"),
        ("1/model.yaml", STEP.description, r"; there is 1/model\.yaml, which is not read: expected any/model\.yaml$"),
    ],
)
def test_a_description_that_is_not_read(tmp_path: Path, name: str, text: str, says: str) -> None:
    """An empty one, and those under a name or in a place where none is looked for."""
    path = place(tmp_path, "any", model(STEP.graph, STEP.weights))
    (tmp_path / "any" / name).write_text(text)
    with pytest.raises(LoadError, match=says):
        load_model(path, SETTINGS)


ENDLESS = """g (float[N, 3] x, float[N, 4] h) => (float[N, 2] y, float[N, 4] h_next) {
    a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)
    t = Loop (trips, yes, s) <
        body = again (int64 i, bool go, float[N, 4] before) => (bool go_on, float[N, 4] after) {
            go_on = Identity(go)  after = Tanh(before)
        }
    >
    h_next = Tanh(t)  y = MatMul(h_next, V)
}"""


def test_a_run_that_does_not_end(tmp_path: Path) -> None:
    """It is interrupted: nothing of it goes on."""
    weights = CELL | {"trips": np.array(1 << 40), "yes": np.array(True)}
    path = place(tmp_path, "any", model(ENDLESS, weights), STEP.description)
    with pytest.raises(LoadError, match=r"^the model was not loaded within 0\.1 s \(--load-timeout-s\)$"):
        load_model(path, Settings(threads=1, load_timeout_s=0.1))


@pytest.mark.parametrize(
    ("graph", "what"),
    [
        (
            """g (float[N, 4000000000] x, float[N, 4] h) => (float[N, 4] y, float[N, 4] h_next) {
                h_next = Tanh(h)  y = Identity(h_next)
            }""",
            "one step of its inputs",
        ),
        (
            """g (float[N, 3] x, float[N, 4000000000] h) => (float[N, 3] y, float[N, 4000000000] h_next) {
                h_next = Identity(h)  y = Identity(x)
            }""",
            "the states of a row",
        ),
    ],
)
def test_sizes_that_no_request_has(tmp_path: Path, graph: str, what: str) -> None:
    """Refused before memory is taken for them."""
    path = place(tmp_path, "any", model(graph), STEP.description)
    with pytest.raises(LoadError, match=f"{what} would take 16000000000 bytes; this server takes up to 67108864"):
        load_model(path, SETTINGS)


def test_a_state_that_is_an_output_too(tmp_path: Path) -> None:
    """A bare cell: its new h is what it gives, and what goes in again."""
    graph = """g (float[N, 3] x, float[N, 4] h) => (float[N, 4] h_next) {
        a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)  h_next = Tanh(s)
    }"""
    described = STEP.description.replace("y:", "h_next:")
    graph_alone = load_model(place(tmp_path, "any", model(graph, CELL), described), SETTINGS).graph
    x = np.ones((2, 1, 3), np.float32)
    lengths = np.ones(2, np.int32)
    (y,), (h,) = graph_alone.run({"x": x, "h": np.zeros((2, 4), np.float32), "conveyor.lengths": lengths})
    np.testing.assert_allclose(np.asarray(h, np.float32), np.tanh(x[:, 0] @ CELL["W"]), atol=1e-6)
    np.testing.assert_array_equal(y[:, 0], h)


def test_what_manifests_get_some_day_changes_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that has its default: sessions outlive the release that adds it."""
    path = STEP.write(tmp_path)
    before = digest(path)
    later = create_model("Manifest", __base__=Manifest, another=(str | None, None))
    monkeypatch.setattr("service.graphs.presented.Manifest", later)
    assert digest(path) == before


def test_a_precision_of_a_models_own(tmp_path: Path) -> None:
    """The file of the precision that is asked for, or model.onnx where that has it; model.onnx where none is."""
    path = write_lstm(tmp_path)
    small = write_int8(path)
    for said, file, precision in (
        ("", path, "float32"),
        ("precision: float32", path, "float32"),
        ("precision: int8", small, "int8"),
    ):
        (tmp_path / "lstm/model.yaml").write_text(said)
        loaded = load_model(path, SETTINGS)
        assert (loaded.path, loaded.graph.manifest.precision) == (file, precision)
        assert loaded.graph.digest == Engine(file).digest


def test_a_precision_that_is_not_there(tmp_path: Path) -> None:
    """It is told which there is; also where a file has another than its name says."""
    path = write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text("precision: int8")
    with pytest.raises(
        LoadError,
        match=r"^model\.yaml asks for precision int8; model\.onnx is float32 and there is no model\.int8\.onnx beside",
    ):
        load_model(path, SETTINGS)
    shutil.copy(path, path.with_name("model.int8.onnx"))
    with pytest.raises(LoadError, match=r"^model\.yaml asks for precision int8; model\.int8\.onnx is float32$"):
        load_model(path, SETTINGS)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(tmp_path: Path, threads: int) -> None:
    """A run has as many as are asked for: one is the caller's own, the others are onnxruntime's."""
    path = write_lstm(tmp_path)
    before = len(os.listdir("/proc/self/task"))
    loaded = load_model(path, SETTINGS, threads)
    assert loaded.threads == threads
    for _ in range(1000):
        # Those that have been joined may still be on their way out of the system.
        if (more := len(os.listdir("/proc/self/task")) - before) <= threads - 1:
            break
    assert more == threads - 1
