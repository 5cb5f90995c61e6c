"""``python -m service tune`` as a process, and a server that finds what it has measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.graph_variants import write_int8
from tests.graphs import write_broken, write_lstm
from tests.process import ROOT, ServerProcess

pytestmark = pytest.mark.e2e


def tune(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run it; return what it says."""
    command = [sys.executable, "-m", "service", "tune", "--tune-s", "0.05", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_tune_and_serve(tmp_path: Path) -> None:
    """A table of each model, what is chosen, and the same choice when a server starts, which measures no more."""
    write_lstm(tmp_path, "plain")
    write_int8(write_lstm(tmp_path, "small"))
    (tmp_path / "small/model.yaml").write_text("precision: int8\nthreads: 2\nmax_tick_rows: 100")
    done = tune("--repository", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    plain, small = done.stdout.strip().split("\n\n")
    assert plain.startswith("plain 1: model.onnx, float32, CPUExecutionProvider\n")
    assert small.startswith("small 1: model.int8.onnx, int8, largest error 4.7e-03, CPUExecutionProvider\n")
    assert re.search(r"^ +1 +1 +[\d,]+ +[\d.]+", plain, re.MULTILINE)
    assert "chosen: 2 threads; at most 100 rows a tick; of 64 rows " in small
    chosen = re.search(r"chosen: (\d+) thread", plain)
    assert chosen is not None
    with ServerProcess(tmp_path) as server:
        tuned = {event["model"]: event for event in server.events if event["event"] == "model tuned"}
        assert {name: event["measured"] for name, event in tuned.items()} == {"plain": "before", "small": "before"}
        assert tuned["plain"]["threads"] == int(chosen[1])


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    """A model that does not load leaves the others; status 1, also where there is none, and 2 for a wrong flag."""
    write_broken(tmp_path, "broken", 1)
    write_lstm(tmp_path, "lstm")
    write_lstm(tmp_path, "described")
    (tmp_path / "described/model.yaml").write_text("threads: many")
    done = tune("--repository", str(tmp_path))
    assert done.returncode == 1
    assert "broken 1: onnxruntime cannot load model.onnx" in done.stderr
    assert "\ndescribed: model.yaml" in "\n" + done.stderr
    assert "lstm 1: model.onnx, float32" in done.stdout
    done = tune("--repository", str(tmp_path), "--model", "gru")
    assert (done.returncode, done.stderr) == (1, f"{tmp_path} has no model 'gru'; there are: broken, described, lstm\n")
    done = tune("--repository", str(tmp_path / "lstm"))
    assert done.returncode == 1
    assert (
        "has no model; expected DIR/NAME/VERSION/model.onnx\n1 has no version folder (found model.onnx" in done.stderr
    )
    assert tune("--models", "gru").returncode == 2
