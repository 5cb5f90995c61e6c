"""The server as a process on a machine without a GPU: asked for CUDA it says what is missing and does not run."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from service.engines.provider import headline, why_no_cuda
from tests.process import ROOT, ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(why_no_cuda() is None, reason="CUDA starts here")]


@pytest.mark.parametrize("control", ["fixed", "explicit"])
def test_cuda_where_there_is_none(lstm_repository: Path, control: str) -> None:
    """It ends with a status and a reason, after less than five seconds' work, and nothing was served meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "service", "--repository", str(lstm_repository), "--port", "0"]
    command += ["--device", "cuda", "--log-format", "json", "--model-control", control]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1
    last = json.loads(done.stderr.splitlines()[-2])
    assert last["event"] == "not started"
    assert "CUDA was asked for" in last["reason"]
    assert f"{why_no_cuda()}" in last["reason"]
    assert "ready" not in [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert done.stdout == ""
    # Of its own time, because others may take the machine's meanwhile; it waits for nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_a_fallback_that_is_allowed(lstm_repository: Path) -> None:
    """Allowed by name, the CPU runs what CUDA was asked for, with a warning at the start."""
    with ServerProcess(lstm_repository, "--device", "cuda", "--fallback", "allow") as server:
        full, warning = [one for one in server.events if one.get("level") == "warning"]
    assert warning["event"] == "CUDA was asked for, and the CPU runs the model"
    assert (warning["model"], warning["asked"], warning["device"]) == ("lstm", "cuda", "cpu")
    assert (full["event"], full["reason"]) == ("CUDA does not start", why_no_cuda())
    assert warning["reason"] == f"{headline(str(why_no_cuda()))}, see 'CUDA does not start' above"
