"""The command line: what it writes, prints and returns; a user's mistakes get a sentence and not a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from export.__main__ import main
from export.describe import read_manifest
from export.restore import restore
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


def test_one_file_and_the_gain_of_a_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single file is written; another precision's loss is printed beside its gain; a second time it is refused."""
    arguments = ["to", "user_models:ready", "--output", "out.onnx", "--precision", "float16"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "float32 against float16" in printed
    assert "Largest error: " in printed
    before = Path("out.onnx").read_bytes()
    assert main(arguments) == 2
    assert "out.onnx is there already" in capsys.readouterr().err
    assert Path("out.onnx").read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0


def test_a_failed_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the table all the same, and no file."""
    assert main(["user_models:gru", "--output", "out.onnx", "--max-error", "1e-12"]) == 1
    printed = capsys.readouterr().out
    assert "Largest errors" in printed
    assert "verification failed" in printed
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such:model"], "no module named 'no_such'"),
        (["user_models"], "expected package.module:callable"),
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
    """Weights of another model are refused by name."""
    np.savez("other.npz", weight=np.zeros(3, np.float32))
    for name, says in (("gru", "unknown ['weight']"), ("lstm", "weight_ih_l0")):
        assert main([f"user_models:{name}", "--output", "out.onnx", "--weights", "other.npz"]) == 2
        assert says in capsys.readouterr().err


def test_help_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands and every option of an export stand on one page."""
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    page = capsys.readouterr().out
    for word in ("verify FILE", "--repository", "--lowering", "--precision", "--data", "--max-error", "exit codes"):
        assert word in page
