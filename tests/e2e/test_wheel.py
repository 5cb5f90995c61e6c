"""The wheel holds the client alone, and talks to a server from an environment with only what it asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"grpcio", "numpy", "protobuf"}

CLIENT = """
import json, sys
import conveyor
import numpy as np
from conveyor import Client
with Client(sys.argv[1]) as client, client.session("lstm") as session:
    I = client.model("lstm").inputs[0].shape[-1]
    x = np.linspace(-1, 1, 6 * I, dtype=np.float32).reshape(6, I)
    stepped = np.stack([session.step(row) for row in x])
    whole = client.infer("lstm", x[None])[0]
    print(json.dumps({"same": bool(np.array_equal(stepped, whole)), "from": conveyor.__file__}))
"""


def run(*command: str) -> str:
    """Runs a command; gives what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unconditional(distribution: Distribution) -> list[Requirement]:
    """What a distribution requires here, its extras aside."""
    requirements = map(Requirement, distribution.requires or [])
    return [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of what it is made of."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("conveyor", "service", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(output))
    run(sys.executable, "-m", "pip", "wheel", *flags, str(source))
    (built,) = output.glob("*.whl")
    return built


def test_the_wheel_holds_the_client_alone(wheel: Path) -> None:
    """Its only package is ``conveyor``, with the stubs, their types, and the marker for type checkers."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"conveyor"}
    stubs = {f"conveyor/v1/conveyor_pb2{ending}" for ending in (".py", ".pyi", "_grpc.py")}
    assert {"conveyor/__init__.py", "conveyor/py.typed"} | stubs <= set(names)


def test_the_wheel_asks_for_three_libraries(wheel: Path) -> None:
    """Without extras its metadata requires grpcio, numpy and protobuf, and nothing else."""
    (described,) = distributions(path=[str(wheel)])
    assert {requirement.name for requirement in unconditional(described)} == LIBRARIES


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_wheel_talks_to_a_server(wheel: Path, tmp_path: Path, server_process: ServerProcess) -> None:
    """Installed by pip into an empty environment, with what it asks for alone, it runs a batch and a session alike."""
    python = tmp_path / "bin" / "python"
    run(sys.executable, "-m", "venv", str(tmp_path))
    run(str(python), "-m", "pip", "install", "--disable-pip-version-check", str(wheel))
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    installed: dict[str, Distribution] = {canonicalize_name(it.name): it for it in distributions(path=[str(packages)])}
    asked_for = ["conveyor"]
    for name in asked_for:
        needs = (canonicalize_name(need.name) for need in unconditional(installed[name]))
        asked_for += [need for need in needs if need not in asked_for]
    # pip, and with some Pythons setuptools, came with the environment itself.
    assert installed.keys() - {"pip", "setuptools"} == set(asked_for)

    said = json.loads(run(str(python), "-I", "-c", CLIENT, server_process.target))
    assert said["same"]
    assert said["from"].startswith(str(packages))
