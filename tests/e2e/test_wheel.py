"""The wheel holds the client alone, and talks to a server from an environment with only what it asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import google.protobuf
import grpc
import numpy as np
import pytest
import typing_extensions

from tests.process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]

CLIENT = """
import json, sys
import numpy as np
from conveyor import Client
with Client(sys.argv[1]) as client, client.session("lstm") as session:
    I = client.model("lstm").inputs[0].shape[-1]
    x = np.linspace(-1, 1, 6 * I, dtype=np.float32).reshape(6, I)
    stepped = np.stack([session.step(row) for row in x])
    whole = client.infer("lstm", x[None])[0]
    print(json.dumps({"same": bool(np.array_equal(stepped, whole)), "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of what it is made of."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("conveyor", "service", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (built,) = output.glob("*.whl")
    return built


def test_the_wheel_holds_the_client_alone(wheel: Path) -> None:
    """Its only package is ``conveyor``, with the stubs, their types, and the marker for type checkers."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"conveyor"}
    stubs = {f"conveyor/v1/conveyor_pb2{ending}" for ending in (".py", ".pyi", "_grpc.py")}
    assert {"conveyor/__init__.py", "conveyor/py.typed"} | stubs <= set(names)


@pytest.mark.e2e
def test_the_wheel_talks_to_a_server(wheel: Path, tmp_path: Path, server_process: ServerProcess) -> None:
    """With grpc, protobuf and numpy beside it and nothing else, it runs a batch and a session, with equal results."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "google").mkdir()
    for module in (grpc, np, typing_extensions, google.protobuf):
        assert module.__file__ is not None
        place = Path(module.__file__)
        place = place.parent if place.name == "__init__.py" else place
        inside = tmp_path / "google" if module is google.protobuf else tmp_path
        (inside / place.name).symlink_to(place)
        if (libraries := place.with_name(f"{place.name}.libs")).is_dir():
            (inside / libraries.name).symlink_to(libraries)
    # -S: without the site-packages of this environment.
    command = [sys.executable, "-S", "-c", CLIENT, server_process.target]
    environment = {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["same"]
    assert not {"torch", "onnx", "onnxruntime", "pydantic", "structlog", "service", "models"} & set(said["modules"])
