"""What users load stays with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

LOADS = {
    "server": "from service.engines.engine import Engine; Engine(Path(sys.argv[1]))",
    "export": "from export.verify import onnxruntime; onnxruntime.InferenceSession(sys.argv[1])",
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_onnxruntime_reports_nothing(load: str, lstm_repository: Path, tmp_path: Path) -> None:
    """Loading a model leaves the home folder empty, where onnxruntime's telemetry would put its identity and queue."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    model = lstm_repository / "lstm" / "1" / "model.onnx"
    command = [sys.executable, "-c", f"import sys; from pathlib import Path; {load}", str(model)]
    subprocess.run(command, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
