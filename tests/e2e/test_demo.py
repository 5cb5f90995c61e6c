"""The demo keeps its word: real data, the real server, exact numbers, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from demo.server import ServerFailed, running

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e


def is_open(port: int) -> bool:
    """Whether anything listens there."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(300)
def test_the_whole_demo(tmp_path: Path) -> None:
    """It trains to 96% or better, serves what the reference computes, applies each row once, and draws a picture."""
    command = [sys.executable, "-m", "demo", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"][-1] >= 0.96
    assert results["accuracy"][0] < results["accuracy"][3] < results["accuracy"][-1]
    assert results["largest_error"] <= 2e-6
    assert results["steps"] == results["images"] * 8
    assert results["sessions"] == 64
    assert results["rows_per_tick"] > 1
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    events = [json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines()]
    assert events[-1]["event"] == "stopped"
    (ready,) = (event for event in events if event["event"] == "ready")
    assert not is_open(ready["port"])


def test_no_server_is_left_behind(lstm_repository: Path, tmp_path: Path) -> None:
    """A failure while the server runs stops it, frees its ports, and is the failure that is told of."""
    with pytest.raises(ZeroDivisionError), running(lstm_repository, tmp_path / "log") as server:
        assert is_open(server.port)
        assert is_open(server.metrics_port)
        raise ZeroDivisionError
    assert not is_open(server.port)
    assert not is_open(server.metrics_port)


def test_a_server_that_dies_is_told_of(lstm_repository: Path, tmp_path: Path) -> None:
    """A server that was killed meanwhile does not pass for one that ended well."""
    log = tmp_path / "log"
    with pytest.raises(ServerFailed, match="ended with status -9"), running(lstm_repository, log) as server:
        os.kill(server.pid, signal.SIGKILL)


def test_a_server_that_cannot_start_is_told_of(tmp_path: Path) -> None:
    """Without a repository the server ends at once, and so does the wait for it."""
    with pytest.raises(ServerFailed, match="before it was ready"), running(tmp_path / "nowhere", tmp_path / "log"):
        pass
