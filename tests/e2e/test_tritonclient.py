"""tritonclient, unchanged, against the real server: synchronous and asyncio, batches, sequences, streams, control."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.graphs import HIDDEN, INPUT, OUTPUT, expected, write_lstm
from tests.process import ROOT, ServerProcess

pytestmark = pytest.mark.e2e

x = np.random.default_rng(0).standard_normal((3, 6, INPUT)).astype(np.float32)
y = np.array([expected(row) for row in x])

Program = Callable[[str], dict[str, Any]]
NO_START = "must specify the START flag on the first request of the sequence"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server as a process of its own, ready, with model ``lstm``."""
    repository = tmp_path_factory.mktemp("repository")
    write_lstm(repository)
    with ServerProcess(repository) as server:
        yield server


def run(name: str, server: ServerProcess, folder: Path) -> Any:
    """Run a program with tritonclient; return what it saw."""
    np.save(folder / "x.npy", x)
    command = [sys.executable, "-m", "tests.e2e.triton_programs", name, server.target, str(folder / "x.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def close(seen: Any, reference: np.ndarray[Any, Any]) -> None:
    """What a program saw is the reference."""
    np.testing.assert_allclose(np.array(seen), reference, atol=2e-6)


def in_order(answers: list[dict[str, Any]]) -> None:
    """The steps of each sequence were answered in order, and are the reference's."""
    for row in range(len(x)):
        steps = [answer for answer in answers if answer.get("id", "").startswith(f"{row}.")]
        assert [step["id"] for step in steps] == [f"{row}.{t}" for t in range(x.shape[1])]
        close([step["y"][0][0] for step in steps], y[row])


def test_what_is_told(server: ServerProcess, tmp_path: Path) -> None:
    """Health, metadata, configuration and index read as clients read them; what is not offered says so."""
    seen = run("told", server, tmp_path)
    assert (seen["live"], seen["ready"], seen["model"], seen["no model"]) == (True, True, True, False)
    assert seen["server"]["name"] == "conveyor"
    assert seen["metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "-1", str(INPUT)]}]
    assert seen["metadata"]["outputs"] == [{"name": "y", "datatype": "FP32", "shape": ["-1", "-1", str(OUTPUT)]}]
    assert seen["config"]["max_batch_size"] == 1024
    assert seen["config"]["sequence_batching"]["max_sequence_idle_microseconds"] == "600000000"
    states = [(s["input_name"], s["output_name"], s["dims"]) for s in seen["config"]["sequence_batching"]["state"]]
    assert states == [("h0", "hT", ["1", str(HIDDEN)]), ("c0", "cT", ["1", str(HIDDEN)])]
    assert seen["index"] == [{"name": "lstm", "version": "1", "state": "READY"}]
    for name in ("shared memory", "trace", "log"):
        status, text = seen[name]
        assert status == "StatusCode.UNIMPLEMENTED"
        assert text.startswith("this server")
    assert seen["load"][0] == "StatusCode.UNAVAILABLE"
    assert seen["load"][1].startswith("explicit model load / unload is not allowed")


def test_batches(server: ServerProcess, tmp_path: Path) -> None:
    """Batches are the reference, by the call and by callback; outputs come as asked; statistics count them."""
    seen = run("batch", server, tmp_path)
    close(seen["y"], y)
    assert seen["id"] == "mine"
    assert (seen["chosen"], seen["hT"]) == (["hT", "y"], [3, 1, HIDDEN])
    assert (seen["same"], seen["failed"]) == ([True, True], None)
    before, after = seen["statistics"]
    for count, more in (("inference_count", 9), ("execution_count", 3)):
        assert int(after[count]) - int(before.get(count, 0)) == more
    assert int(after["inference_stats"]["success"]["count"]) >= 3
    assert "3" in [runs["batch_size"] for runs in after["batch_stats"]]
    assert seen["unknown model"][0] == "StatusCode.NOT_FOUND"
    assert seen["unknown model"][1].startswith("Request for unknown model: 'none' is not found")
    assert seen["bad shape"] == ["StatusCode.INVALID_ARGUMENT", "input 'x' has shape [3, 6, 2]; expected [N, T, 3]"]


def test_sequences(server: ServerProcess, tmp_path: Path) -> None:
    """Sequences by unary calls are the reference, under ids of every kind; positions make a repetition harmless."""
    seen = run("sequences", server, tmp_path)
    close(seen["y"], y)
    for what, identity in (("after END", 11), ("no START", 12)):
        status, text = seen[what]
        assert status == "StatusCode.INVALID_ARGUMENT"
        assert text.startswith(f"inference request for sequence {identity} to model 'lstm' {NO_START}")
    assert "ended" in seen["after END"][1]
    assert seen["conflict"][0] == "StatusCode.ABORTED"
    assert "position 6" in seen["conflict"][1]
    assert (seen["replayed"], seen["position"]) == (True, 8)
    close(seen["together"], y)


def test_a_stream(server: ServerProcess, tmp_path: Path) -> None:
    """Sequences and a batch on one stream are the reference, each in order; an error stands between them in-band."""
    answers = run("stream", server, tmp_path)["answers"]
    in_order(answers)
    (batch,) = (answer for answer in answers if answer.get("id") == "batch")
    close(batch["y"], y)
    assert all(answer["final"] for answer in answers if "id" in answer)
    (error,) = (answer["error"] for answer in answers if "error" in answer)
    assert error == f"inference request for sequence 99 to model 'lstm' {NO_START}"


def test_asyncio(server: ServerProcess, tmp_path: Path) -> None:
    """All of it with the asyncio client."""
    seen = run("asynchronous", server, tmp_path)
    assert seen["ready"] is True
    assert seen["metadata"]["versions"] == ["1"]
    close(seen["y"], y)
    close(seen["sequence"], y[0])
    in_order(seen["answers"])
    assert [answer["error"] for answer in seen["answers"] if "error" in answer] == [
        f"inference request for sequence 99 to model 'lstm' {NO_START}"
    ]


def test_load_and_unload(tmp_path: Path) -> None:
    """Under explicit control models come and go on request; a sequence goes on to its end on a model that goes."""
    repository = tmp_path / "repository"
    write_lstm(repository)
    write_lstm(repository, "other", seed=1)
    with ServerProcess(repository, "--model-control", "explicit") as server:
        seen = run("control", server, tmp_path)
        assert server.terminate() == 0
    assert seen["before"] == {"lstm": "UNAVAILABLE", "other": "UNAVAILABLE"}
    for what in ("not loaded", "new work", "new sequence"):
        status, text = seen[what]
        assert status == "StatusCode.NOT_FOUND"
        assert text.startswith("Request for unknown model: 'lstm' is not found")
    close(seen["other"], np.array([expected(row, seed=1) for row in x]))
    assert seen["loaded"] == {"lstm": "READY", "other": "READY"}
    assert seen["unloaded"] == {"lstm": "UNLOADING", "other": "READY"}
    close(seen["sequence"], y[0])
    assert seen["no such model"][0] == "StatusCode.NOT_FOUND"
    assert seen["with a configuration"][0] == "StatusCode.UNIMPLEMENTED"
    close(seen["again"], y)


def test_load_and_unload_with_asyncio(tmp_path: Path) -> None:
    """The same calls of the asyncio client."""
    repository = tmp_path / "repository"
    write_lstm(repository)
    with ServerProcess(repository, "--model-control", "explicit") as server:
        seen = run("asynchronous_control", server, tmp_path)
        assert server.terminate() == 0
    assert seen["loaded"] == {"lstm": "READY"}
    close(seen["y"], y)
    assert seen["unloaded"] == {"lstm": "UNAVAILABLE"}
    assert seen["no such model"] == "StatusCode.NOT_FOUND"


def test_the_example_in_the_documents(tmp_path: Path) -> None:
    """What docs/protocol.md shows works as it stands there."""
    write_lstm(tmp_path, "digits")
    (example,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/protocol.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert '"127.0.0.1:8500"' in example
    with ServerProcess(tmp_path) as server:
        command = [sys.executable, "-c", example.replace("127.0.0.1:8500", server.target)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
