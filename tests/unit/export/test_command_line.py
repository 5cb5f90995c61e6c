"""The command line: what it writes, prints and returns; a user's mistakes get a sentence and not a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

import export.speed
from export.__main__ import main
from export.describe import read_manifest
from export.named import load_named
from export.restore import restore
from models.spec import Layer, ModelSpec
from tests.unit.export.sabotage import nudge_a_weight, scan_past_lengths
from tests.unit.models.drawn import draw_weights

MODULE = """
import torch
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec

def lstm():
    return torch.nn.LSTM(3, 4)

def gru():
    return SequenceModel(ModelSpec((Layer("gru", 3, 4),), head_size=2))

def number():
    return 3

def strange():
    model = gru()
    torch.nn.init.constant_(model.head.b, float("nan"))
    return model

class Doubled(SequenceModel):
    def forward(self, *inputs):
        y, states = super().forward(*inputs)
        return 2 * y, states

def doubled():
    return Doubled(ModelSpec((Layer("gru", 3, 4),)))

def broken():
    raise RuntimeError("no data today")

ready = gru()
constant = 5
"""


@pytest.fixture(autouse=True)
def _user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module in the working folder."""
    (tmp_path / "user_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_export_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model is written where it was asked for, the table of errors is printed, and the file verifies."""
    np.savez("held-out.npz", x=np.random.default_rng(0).standard_normal((3, 5, 3)), lengths=np.array([5, 2, 1]))
    save_file(draw_weights({"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4), "bias_ih_l0": (16,), "bias_hh_l0": (16,)},
                           dtype=np.float32), "best.safetensors")  # fmt: skip
    arguments = ["--repository", "models", "--name", "speech", "--data", "held-out.npz"]
    assert main(["user_models:lstm", *arguments, "--weights", "best.safetensors"]) == 0
    path = tmp_path / "models" / "speech" / "1" / "model.onnx"
    printed = capsys.readouterr().out
    assert "given data" in printed
    assert "whole against chunked" in printed
    assert "written" in printed
    file = onnx.load(path)
    _, weights = restore(file, read_manifest(file))
    exact = draw_weights({"weight_ih_l0": (16, 3)}, dtype=np.float32)["weight_ih_l0"]
    np.testing.assert_array_equal(weights["layers.0.W_x"], exact)

    assert main(["verify", str(path), "--data", "held-out.npz"]) == 0
    assert "verified" in capsys.readouterr().out


def test_one_file_and_the_gain_of_a_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single file is written; int8's measured loss stands beside its size and speed; a second time it is refused."""
    monkeypatch.setattr(export.speed, "MEASURED_S", 0.01)
    arguments = ["user_models:lstm", "--output", "out.onnx", "--precision", "int8"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    file = onnx.load("out.onnx")
    parity = read_manifest(file).parity
    assert parity is not None
    loss = max(max(row.outputs, row.states) for row in parity.rows)
    assert loss > 2e-6
    assert "float32 against int8" in printed
    assert f"Largest error: {loss:.1e}." in printed
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    table = {first: [float(cell.replace(",", "")) for cell in rest] for first, *rest in cells if len(rest) == 3}
    assert table.keys() == {"file, bytes", "steps/s, 1 row a run", "steps/s, 64 rows a run"}
    assert table["file, bytes"][1] == Path("out.onnx").stat().st_size
    for before, after, ratio in table.values():
        assert before > 0
        assert ratio == pytest.approx(after / before, abs=0.006, rel=0.01)

    content = Path("out.onnx").read_bytes()
    assert main(arguments) == 2
    assert "out.onnx is there already" in capsys.readouterr().err
    assert Path("out.onnx").read_bytes() == content
    assert main([*arguments, "--overwrite"]) == 0


def test_several_precisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is model.onnx's, the second lies beside it; each has its own errors in its manifest, and verifies."""
    monkeypatch.setattr(export.speed, "MEASURED_S", 0.01)
    arguments = ["user_models:lstm", "--repository", "models", "--name", "speech", "--precision", "float32,int8"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    errors = {}
    for name, precision in (("model.onnx", "float32"), ("model.int8.onnx", "int8")):
        path = tmp_path / "models/speech/1" / name
        assert f"written models/speech/1/{name}" in printed
        manifest = read_manifest(onnx.load(path))
        assert manifest.precision == precision
        assert manifest.parity is not None
        errors[precision] = manifest.parity.max_error
        assert main(["verify", str(path)]) == 0
    assert errors["float32"] < 2e-6 < errors["int8"]


def test_a_file_for_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    """It is written beside the file, with errors and reason of its own; verified with it; and inspect tells of it."""
    arguments = ["user_models:gru", "--output", "out.onnx"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "written out.onnx" in printed
    assert "written out.cuda.onnx" in printed
    assert "layer 1 (gru) is lowered to Scan for CUDA: linear_before_reset=0" in printed
    assert main(["verify", "out.onnx"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "verified out.onnx" in printed
    assert "verified out.cuda.onnx" in printed
    assert "against the CPU's form, ragged" in printed
    assert main(["verify", "out.cuda.onnx"]) == 0
    assert "not held against" not in capsys.readouterr().out
    assert main(["inspect", "out.onnx"]) == 0
    printed = capsys.readouterr().out
    assert "not on CUDA: " in " ".join(printed.split())
    assert "On CUDA out.cuda.onnx, which lies beside it, is run if it is the same model: verify tells." in printed

    assert main([*arguments, "--overwrite", "--devices", "cpu"]) == 0
    assert not Path("out.cuda.onnx").exists()
    assert main([*arguments, "--overwrite", "--devices", "cuda"]) == 0
    assert not Path("out.cuda.onnx").exists()
    assert [layer.lowering for layer in read_manifest(onnx.load("out.onnx")).layers] == ["scan"]


def test_a_file_for_cuda_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Is verified, and what it was not held against is said."""
    assert main(["user_models:gru", "--output", "out.onnx"]) == 0
    Path("out.onnx").unlink()
    capsys.readouterr()
    assert main(["verify", "out.cuda.onnx"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "it was not held against out.onnx, which is not beside it" in printed


def test_a_wrong_file_for_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    """It fails with the file it lies beside."""
    assert main(["user_models:gru", "--output", "out.onnx"]) == 0
    file = onnx.load("out.cuda.onnx")
    scan_past_lengths(file)
    onnx.save(file, "out.cuda.onnx")
    assert main(["verify", "out.onnx"]) == 1
    assert "verification failed" in capsys.readouterr().out


def test_several_precisions_where_one_does_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of them is written, be it that it cannot be made or that it is not within its bound."""
    place = ["--repository", "models", "--name", "speech", "--precision", "float32,int8"]
    assert main(["user_models:gru", *place]) == 2
    assert main(["user_models:lstm", *place, "--max-error", "3e-6"]) == 1
    assert not Path("models").exists()
    assert main(["user_models:lstm", "--output", "out.onnx", "--precision", "float32,int8"]) == 2
    assert "--output is one model file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--precision", "int4"], "'int4' is none of float32, float16, int8"),
        (["--precision", "float32,"], "'' is none of"),
        (["--precision", "int8,int8"], "int8 stands twice"),
        (["--devices", "cpu,tpu"], "'tpu' is none of cpu, cuda"),
    ],
)
def test_words_that_there_are_not(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence, and status 2."""
    with pytest.raises(SystemExit) as ended:
        main(["user_models:lstm", "--output", "out.onnx", *given])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_failed_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the table all the same, and no file."""
    assert main(["user_models:gru", "--output", "out.onnx", "--max-error", "1e-12"]) == 1
    printed = capsys.readouterr().out
    assert "Largest errors" in printed
    assert "verification failed" in printed
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("model", ["strange", "doubled"])
def test_a_model_that_is_not_its_weights(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that are none, and outputs that the weights do not give, fail whatever error is allowed."""
    for more in ([], ["--max-error", "1"]):
        assert main([f"user_models:{model}", "--output", "out.onnx", *more]) == 1
        assert "the module itself" in capsys.readouterr().out
    assert not Path("out.onnx").exists()


def test_files_that_are_not_as_they_were_written(capsys: pytest.CaptureFixture[str]) -> None:
    """A file with other weights fails verification, one that makes no sense cannot be verified; both in one line."""
    assert main(["user_models:lstm", "--output", "out.onnx"]) == 0
    file = onnx.load("out.onnx")
    nudge_a_weight(file)
    onnx.save(file, "nudged.onnx")
    capsys.readouterr()
    assert main(["verify", "nudged.onnx"]) == 1
    assert "weights are not those that the file was exported with" in " ".join(capsys.readouterr().out.split())

    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "layers.0.R")
    tensor.raw_data = tensor.raw_data[:-1]
    onnx.save(file, "half.onnx")
    assert main(["verify", "half.onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not hold the model that its manifest tells of" in line


def test_weights_do_not_make_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    """A subclass stays what it is when it is given weights."""
    save_file(draw_weights(ModelSpec((Layer("gru", 3, 4),)).weight_shapes, dtype=np.float32), "gru.safetensors")
    assert main(["user_models:doubled", "--output", "out.onnx", "--weights", "gru.safetensors"]) == 1
    assert "the module itself" in capsys.readouterr().out


@pytest.mark.parametrize("max_error", ["inf", "nan", "0", "-1", "1e9"])
def test_errors_that_cannot_be_allowed(max_error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A bound that bounds nothing is refused, by export and by verify."""
    assert main(["user_models:gru", "--output", "out.onnx"]) == 0
    for arguments in (["user_models:gru", "--output", "again.onnx"], ["verify", "out.onnx"]):
        assert main([*arguments, f"--max-error={max_error}"]) == 2
        assert "expected a number above 0 and up to 1" in capsys.readouterr().err
    assert not Path("again.onnx").exists()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (["--output", "."], "is a folder, expected a file"),
        (["--output", "/proc/nowhere/out.onnx"], "cannot be written"),
        (["--output", "out.txt"], "out.txt does not end in .onnx; expected file.onnx"),
        (["--output", f"{'n' * 300}.onnx"], "name too long"),
        (["--repository", "user_models.py", "--name", "gru"], "user_models.py is a file, expected a folder"),
        (["--repository", ".", "--name", "n" * 300], "name too long"),
    ],
)
def test_places_that_cannot_be_written_to(
    place: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told of before the model is even imported, in one line."""
    assert main(["no_such:model", *place, "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line.lower()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such:model"], "no module named 'no_such'"),
        (["user_models"], "expected package.module:callable"),
        (["user_models.py:gru"], "named as it is imported: user_models:gru"),
        (["user_models:nothing"], "user_models has no 'nothing'"),
        (["user_models:number"], "returned a int, expected a torch module"),
        (["user_models:constant"], "is a int, expected a callable"),
        (["user_models:broken"], "raised RuntimeError: no data today"),
        (["user_models:gru", "--precision", "int8"], "int8 form of LSTM operators alone"),
        (["user_models:gru", "--weights", "none.npz"], "none.npz"),
        (["user_models:gru", "--data", "none.npz"], "none.npz"),
        (["user_models:gru", "--name", "x"], "go with --repository"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one sentence that says what was wrong, no file."""
    assert main([*arguments, "--output", "out.onnx"]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not Path("out.onnx").exists()


def test_a_module_that_imports_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The module that is missing is named, not the one that wants it."""
    (tmp_path / "wants_more.py").write_text("import not_installed_anywhere")
    assert main(["wants_more:model", "--output", "out.onnx"]) == 2
    assert "no module named 'not_installed_anywhere'" in capsys.readouterr().err


def test_weights_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of another model, and integers, are refused by name, in one line."""
    np.savez("other.npz", weight=np.zeros(3, np.float32))
    integers: dict[str, Any] = {"layers.0.W_x": np.zeros((12, 3), np.int64)}
    np.savez("integers.npz", **integers)
    for name, weights, says in (
        ("gru", "other.npz", 'Unexpected key(s) in state_dict: "weight"'),
        ("lstm", "other.npz", 'Missing key(s) in state_dict: "weight_ih_l0"'),
        ("gru", "integers.npz", "layers.0.W_x is int64, expected floating point"),
    ):
        assert main([f"user_models:{name}", "--output", "out.onnx", "--weights", weights]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_outputs_that_are_given_with_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    """Are compared with the model's, and where they are others nothing is written; verify says it compares none."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    model = load_named("user_models:ready")
    y = model(torch.from_numpy(x))[0].detach().numpy()
    np.savez("good.npz", x=x, y=y)
    np.savez("others.npz", x=x, y=2 * y)
    np.savez("labels.npz", x=x, y=np.zeros(2, np.int64))
    for data, code, says in (
        ("others.npz", 1, "the outputs given with the data differ from those of the model by"),
        ("labels.npz", 2, "y is int64 of shape (2,), expected numbers (2, 5, 2), what the model gives for x; leave y"),
        ("good.npz", 0, "the outputs given with the data are the model's, within"),
    ):
        assert not Path("out.onnx").exists()
        assert main(["user_models:ready", "--output", "out.onnx", "--data", data]) == code
        captured = capsys.readouterr()
        assert says in " ".join((captured.out + captured.err).split())
    assert main(["verify", "out.onnx", "--data", "others.npz"]) == 0
    assert "y in the data is not compared here" in capsys.readouterr().out


def test_help_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    """All commands and every option of an export stand on one page."""
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    page = capsys.readouterr().out
    for word in (
        "from-weights SPEC.yaml",
        "verify FILE",
        "inspect FILE",
        "--repository",
        "--lowering",
        "--precision",
        "--devices",
        "--data",
        "--max-error",
        "exit codes",
    ):
        assert word in page
