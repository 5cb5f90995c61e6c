"""What docs/weights.md shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from export.__main__ import main
from export.weights.spec import WeightsSpec

TEXT = (Path(__file__).resolve().parents[4] / "docs/weights.md").read_text()


def blocks(language: str) -> list[str]:
    """The document's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_each_spec_is_one() -> None:
    """The three specs are accepted by the schema."""
    specs = [WeightsSpec.model_validate(yaml.safe_load(block)) for block in blocks("yaml")]
    assert len(specs) == 3


def test_the_textbook_s_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its arrays and the spec beside it are exported by the command that is shown, and its outputs are the model's."""
    (program,), (commands,) = blocks("python"), blocks("sh")
    (tmp_path / "textbook.py").write_text(program)
    (tmp_path / "textbook.yaml").write_text(blocks("yaml")[-1])
    monkeypatch.chdir(tmp_path)
    run, export = (shlex.split(line) for line in commands.splitlines())
    subprocess.run([sys.executable, *run[1:]], check=True)
    assert export[:3] == ["python", "-m", "export"]
    assert main(export[3:]) == 0
    assert "the outputs given with the data are the model's" in capsys.readouterr().out
    assert (tmp_path / ".demo/repository/textbook/1/model.onnx").is_file()
