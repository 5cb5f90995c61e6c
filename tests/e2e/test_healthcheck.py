"""The check that the image's health rests on tells a ready server from none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import ServerProcess

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "healthcheck.py"


def check(port: int) -> subprocess.CompletedProcess[str]:
    """Runs the script as the container does."""
    environment = os.environ | {"CONVEYOR_PORT": str(port)}
    return subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_tells_ready_from_gone(server_process: ServerProcess) -> None:
    """Status 0 while the server is ready; status 1 and a reason after it has stopped."""
    ready = check(server_process.port)
    assert (ready.returncode, ready.stdout) == (0, "SERVING\n")
    server_process.terminate()
    gone = check(server_process.port)
    assert gone.returncode == 1
    assert "UNAVAILABLE" in gone.stderr
