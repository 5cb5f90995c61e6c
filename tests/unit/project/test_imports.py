"""What clients and images install stays small. The order of the rooms is import-linter's to hold (``make lint``)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[3]


def test_the_client_needs_three_libraries() -> None:
    """Whatever ``conveyor`` imports is in the standard library, or is grpc, protobuf or numpy."""
    graph = grimp.build_graph("conveyor", include_external_packages=True)
    outside = {module.partition(".")[0] for module in graph.modules} - {"conveyor"} - sys.stdlib_module_names
    assert outside == {"grpc", "google", "numpy"}


@pytest.mark.parametrize(
    ("extra", "runtime"), [("service", {"onnxruntime"}), ("gpu", {"onnxruntime-gpu", "cupy-cuda13x"})]
)
def test_the_image_installs_no_torch(extra: str, runtime: set[str]) -> None:
    """The serving images install the client's and the server's libraries, and nothing of training or export.

    They differ in the runtime alone, and none holds onnxruntime twice.
    """
    assert installed("service") - {"onnxruntime"} == installed("gpu") - {"onnxruntime-gpu", "cupy-cuda13x"}
    names = installed(extra)
    assert {"grpcio", "numpy", "protobuf", "pydantic"} <= names
    assert {name for name in names if name.startswith(("onnxruntime", "cupy"))} == runtime
    assert not names & {"torch", "onnxscript", "scikit-learn", "conveyor"}


def installed(extra: str) -> set[str]:
    """The names of what the image of an extra installs."""
    script = [sys.executable, str(ROOT / "deploy" / "requirements.py"), extra]
    listed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return {re.split(r"[\[<>=~!]", line)[0] for line in listed if line}


def test_the_gpu_service_is_asked_for_and_never_falls_to_the_cpu() -> None:
    """In the compose file CUDA is a profile of its own, which reserves a device and starts with nothing but CUDA."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    gpu, cpu = services["conveyor-gpu"], services["conveyor"]
    assert gpu["profiles"] == ["gpu"]
    assert "profiles" not in cpu
    assert gpu["build"]["args"]["EXTRA"] == "gpu"
    assert gpu["environment"]["CONVEYOR_DEVICE"] == "cuda"
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    for service in (gpu, cpu):
        given = {name: str(value) for name, value in service["environment"].items() if name.startswith("CONVEYOR_")}
        known = {f"CONVEYOR_{name.upper()}" for name in Settings.model_fields}
        assert given.keys() <= known
