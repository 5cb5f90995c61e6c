"""What the README and docs/models.md show works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import load
from tests.process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = Path(".demo/repository")
pytestmark = pytest.mark.e2e


def blocks(language: str, document: str = "README.md") -> list[str]:
    """A document's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def run(arguments: list[str], folder: Path) -> str:
    """Runs Python as a reader would in the checkout, but with another working folder; gives what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_as_pasted(tmp_path: Path) -> None:
    """The model is exported by the command beside it, the server takes the flags shown, the client's example runs."""
    serve, call, export, follow, _ = blocks("sh")
    client, my_model = blocks("python")
    (tmp_path / "my_model.py").write_text(my_model)
    python, *arguments = shlex.split(export)
    assert python == "python"
    run(arguments, tmp_path)
    # The client's example asks for the demo's model, which takes as many values a step as this one.
    shutil.copytree(tmp_path / REPOSITORY / "mine", tmp_path / REPOSITORY / "digits")

    *_, command = serve.strip().splitlines()
    assert command.startswith("python -m service ")
    settings = load(shlex.split(command)[3:], {})
    assert settings.repository == REPOSITORY
    following = load(shlex.split(follow)[3:], {})
    assert (following.repository, following.model_control) == (REPOSITORY, "poll")
    with ServerProcess(tmp_path / settings.repository) as server:
        assert f'Client("127.0.0.1:{settings.port}")' in client
        (tmp_path / "client.py").write_text(client.replace(f"127.0.0.1:{settings.port}", server.target))
        assert call.splitlines()[-1] == "python client.py"
        printed = run(["client.py"], tmp_path)
    assert printed.startswith("8 {")


def test_models_of_your_own(tmp_path: Path) -> None:
    """Each file of docs/models.md does what the commands under it say, and the server loads what they export."""
    text = (ROOT / "docs/models.md").read_text()
    files = re.findall(r"`(\w+\.py)`:\n\n```python\n", text)
    codes, commands = blocks("python", "docs/models.md"), blocks("sh", "docs/models.md")
    assert len(files) == len(codes) == len(commands) == 3
    for file, code in zip(files, codes, strict=True):
        (tmp_path / file).write_text(code)
    printed = []
    for command in "".join(commands).splitlines():
        python, *arguments = shlex.split(command)
        assert python == "python"
        printed.append(run(arguments, tmp_path))
    assert "(3, 10, 32) (3, 32) (3, 32)\n" in printed
    with ServerProcess(tmp_path / REPOSITORY) as server:
        assert server.ready["models"] == ["from_keras", "matrices", "tagger"]
