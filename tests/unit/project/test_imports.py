"""What a client installs stays small. The order of the rooms is import-linter's to hold (``make lint``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[3]


def test_the_client_needs_three_libraries() -> None:
    """Whatever ``conveyor`` imports is in the standard library, or is grpc, protobuf or numpy."""
    graph = grimp.build_graph("conveyor", include_external_packages=True)
    outside = {module.partition(".")[0] for module in graph.modules} - {"conveyor"} - sys.stdlib_module_names
    assert outside == {"grpc", "google", "numpy"}


def test_the_image_installs_no_torch() -> None:
    """The serving image installs the client's and the server's libraries, and nothing of training or export."""
    script = [sys.executable, str(ROOT / "deploy" / "requirements.py"), "service"]
    listed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.partition(">")[0].partition("=")[0].partition("[")[0] for line in listed if line}
    assert {"grpcio", "numpy", "protobuf", "onnxruntime", "pydantic"} <= names
    assert not names & {"torch", "onnxscript", "scikit-learn", "conveyor"}
