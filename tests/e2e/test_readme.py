"""What the README, docs/models.md and docs/client.md show works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from service.settings import load
from tests.process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = Path(".demo/repository")
pytestmark = pytest.mark.e2e


def blocks(language: str, document: str = "README.md") -> list[str]:
    """A document's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def run(arguments: list[str], folder: Path, status: int = 0) -> str:
    """Runs Python as a reader would in the checkout, but with another working folder; gives what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_the_examples_as_pasted(tmp_path: Path) -> None:
    """The model is exported by the command beside it, the server takes the flags shown, the client's examples run.

    Those of docs/client.md are for the same model.
    """
    serve, call, export, follow, *_ = blocks("sh")
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
        printed = [run(["client.py"], tmp_path)]
        text = (ROOT / "docs/client.md").read_text()
        for file, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            assert f"127.0.0.1:{settings.port}" in code
            (tmp_path / file).write_text(code.replace(f"127.0.0.1:{settings.port}", server.target))
            printed.append(run([file], tmp_path))
    states, described, batches, sessions, many, streams, deadlines = printed
    assert described.startswith("['digits', 'mine']\nx float32 (None, None, 8) ('batch', 'time', 'feature')\n")
    assert re.search(r"\n1 True \w+ \d+ \d+\n$", described), described
    assert states.startswith("8 {")
    assert batches == "[3, 200, 12] [1, 1, 1]\n"
    assert sessions == "found again at 3\n"
    assert re.fullmatch(r"session 7 stays at 3: .*(NaN|finite).*\n99 sessions at 5\n", many), many
    assert re.fullmatch(r"\(100, 5, \d+\) and \(100, \d+\) at 5\n", streams), streams
    assert re.fullmatch(r"(late|\(8, \d+\) at 8)\n", deadlines), deadlines


def write_files(folder: Path, first: int, last: int) -> tuple[list[str], list[str]]:
    """Writes those of the files that docs/models.md shows; gives their names, and all commands."""
    files = re.findall(r"`(\w+\.py)`:\n\n```python\n", (ROOT / "docs/models.md").read_text())
    codes = blocks("python", "docs/models.md")
    assert len(files) == len(codes)
    for file, code in list(zip(files, codes, strict=True))[first:last]:
        (folder / file).write_text(code)
    return files[first:last], blocks("sh", "docs/models.md")


def test_models_of_your_own(tmp_path: Path) -> None:
    """Each file of docs/models.md does what the commands under it say, and the server loads what they export."""
    files, commands = write_files(tmp_path, 0, 3)
    assert files == ["tagger.py", "matrices.py", "from_keras.py"]
    printed = []
    for command in "".join(commands[:3]).splitlines():
        python, *arguments = shlex.split(command)
        assert python == "python"
        printed.append(run(arguments, tmp_path))
    assert "(3, 10, 32) (3, 32) (3, 32)\n" in printed
    # Further down: the first of them in two precisions, and measured.
    for command in commands[7:]:
        printed.append(run(shlex.split(command)[1:], tmp_path))
    assert (tmp_path / REPOSITORY / "tagger/2/model.int8.onnx").is_file()
    assert "tagger 2: model.onnx, float32" in printed[-1]
    assert "chosen: " in printed[-1]
    (tmp_path / REPOSITORY / "tagger/model.yaml").write_text("precision: int8")
    with ServerProcess(tmp_path / REPOSITORY) as server:
        assert server.ready["models"] == ["from_keras", "matrices", "tagger"]
        served = {event["model"]: event for event in server.events if event["event"] == "model loaded"}["tagger"]
        assert (served["version"], served["precision"]) == (2, "int8")
        assert 0 < served["max_error"] < 0.05


def test_models_that_were_not_exported_here(tmp_path: Path) -> None:
    """A speech-activity model and an audio effect: made, inspected, decided, served and used, as it says there."""
    files, commands = write_files(tmp_path, 3, 7)
    assert files == ["speech_model.py", "speech_client.py", "amp_model.py", "amp_client.py"]
    shown = blocks("yaml", "docs/models.md")
    for name, status, make_and_inspect, text in zip(("speech", "amp"), (3, 0), commands[3:5], shown, strict=True):
        make, inspect = (shlex.split(line)[1:] for line in make_and_inspect.splitlines())
        run(make, tmp_path)
        run(inspect, tmp_path, status)
        description = tmp_path / REPOSITORY / name / "model.yaml"
        decided = description.read_text().replace("null", "16000")
        assert yaml.safe_load(decided) == yaml.safe_load(text)
        description.write_text(text)

    serve, use = commands[5:7]
    assert load(shlex.split(serve)[3:], {}).repository == REPOSITORY
    with ServerProcess(tmp_path / REPOSITORY) as server:
        printed = []
        for command in use.splitlines():
            client = tmp_path / command.removeprefix("python ")
            assert "127.0.0.1:8500" in client.read_text()
            client.write_text(client.read_text().replace("127.0.0.1:8500", server.target))
            printed.append(run([client.name], tmp_path))
    changes = re.findall(r"(speech|silence) from ([\d.]+) s", printed[0])
    assert [what for what, _ in changes] == ["speech", "silence", "speech", "silence"]
    late = [float(at) - really for (_, at), really in zip(changes, (1, 2, 3, 4.2), strict=True)]
    assert all(0 <= each < 0.15 for each in late), late
    assert printed[1] == "(32000, 1), live against whole: 0e+00\n"
