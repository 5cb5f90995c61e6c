"""A server whose repository changes under it, as a process of its own."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor import Client, NotFound, Session
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_stubs import inference_pb2_grpc as stubs
from tests.graphs import INPUT, expected, write_broken, write_lstm
from tests.process import ServerProcess

pytestmark = pytest.mark.e2e

# Sessions expire soon, and so the server looks often for what can be freed.
POLLING = ("--model-control", "poll", "--poll-interval-s", "0.05", "--idle-timeout-s", "4")
STEPS = 4000
x = np.random.default_rng(5).standard_normal((STEPS, INPUT)).astype(np.float32)


def put(elsewhere: Path, repository: Path, version: int, seed: int) -> None:
    """Put a version into the repository as one should: written elsewhere, and moved in whole."""
    write_lstm(elsewhere, "lstm", version, seed)
    (elsewhere / "lstm" / str(version)).rename(repository / "lstm" / str(version))


@functools.cache
def outputs(seed: int) -> NDArray[Any]:
    """What the model of a seed gives for ``x``."""
    return expected(x, seed)


class Stream:
    """A session that is stepped for as long as a test goes on, and held against the version that it was opened on."""

    def __init__(self, session: Session, seed: int) -> None:
        self.session = session
        self._expected = outputs(seed)

    def step(self) -> None:
        """Step once."""
        t = self.session.position
        y = self.session.step(x[t])
        np.testing.assert_allclose(y, self._expected[t], rtol=0, atol=2e-6)


@contextmanager
def slow_model(repository: Path, name: str) -> Iterator[Path]:
    """A model that takes for ever to load: its model.yaml is a pipe into which nobody writes."""
    write_lstm(repository, name)
    pipe = repository / name / "model.yaml"
    os.mkfifo(pipe)
    yield pipe


def until_read(pipe: Path) -> int:
    """Wait until somebody reads a pipe; return its other end, which holds the reader for as long as it is open."""
    ends = time.monotonic() + 30
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < ends, "nobody reads the pipe"
            time.sleep(0.01)


def test_versions_come_while_sessions_stream(tmp_path: Path) -> None:
    """Each stream goes on with the version that opened it; new ones get the newest that loads; nobody notices more."""
    repository = tmp_path / "models"
    write_lstm(repository, "lstm", 1, seed=1)
    with ServerProcess(repository, *POLLING) as server, Client(server.target) as client:
        streams = [Stream(client.session("lstm"), seed=1) for _ in range(3)]

        def version() -> int:
            for stream in streams:
                stream.step()
            (model,) = client.models()
            return model.version

        assert version() == 1
        put(tmp_path, repository, 2, seed=2)
        while version() != 2:
            pass
        streams.append(Stream(client.session("lstm"), seed=2))
        write_broken(repository, "lstm", 3)
        while not any(event["event"] == "model not loaded" for event in server.events):
            assert version() == 2
        streams.append(Stream(client.session("lstm"), seed=2))
        with grpc.insecure_channel(server.target) as channel:
            index = stubs.GRPCInferenceServiceStub(channel).RepositoryIndex(pb.RepositoryIndexRequest()).models
        assert [(model.version, model.state) for model in index] == [
            ("1", "UNLOADING"),
            ("2", "READY"),
            ("3", "UNAVAILABLE"),
        ]
        assert index[0].reason == "not within the policy; sessions and batch rows that go on: 3"
        assert "onnxruntime cannot load model.onnx" in index[2].reason
        with pytest.raises(NotFound, match="version 3 of model 'lstm' did not load"):
            client.session("lstm", version=3)

        put(tmp_path, repository, 4, seed=4)
        while version() != 4:
            pass
        streams.append(Stream(client.session("lstm"), seed=4))
        for _ in range(20):
            version()
        for stream in streams:
            stream.session.close()
        server.wait_for("model freed")
        assert server.terminate() == 0


@pytest.mark.parametrize("moment", ["at the start", "later"])
def test_sigterm_during_a_load(tmp_path: Path, moment: str) -> None:
    """The server ends soon and cleanly, however long the load would take; saved sessions are kept for the next."""
    repository = tmp_path / "models"
    write_lstm(repository, "lstm", 1)
    file = tmp_path / "sessions"
    flags = (*POLLING, "--sessions-file", str(file))
    with ServerProcess(repository, *flags) as server, Client(server.target) as client:
        session = client.session("lstm", session_id="kept")
        y = session.step(x[:5])
        if moment == "later":
            with slow_model(repository, "slow") as pipe:
                held = until_read(pipe)
            session.step(x[5:10])
        assert server.terminate() == 0
    if moment == "at the start":
        before = file.read_bytes()
        with slow_model(repository, "slow") as pipe, ServerProcess(repository, *flags, wait=False) as server:
            held = until_read(pipe)
            assert server.terminate() == 0
        # What the thread of the other model still says may come after.
        said = [event["event"] for event in server.events]
        assert "ready" not in said
        assert said.index("signal") < said.index("stopped")
        assert file.read_bytes() == before
    os.close(held)
    pipe.unlink()
    with ServerProcess(repository, *flags) as server, Client(server.target) as client:
        session = client.attach("kept")
        at = 10 if moment == "later" else 5
        assert session.position == at
        y = session.step(x[at : at + 5])
        np.testing.assert_allclose(y, outputs(seed=0)[at : at + 5], rtol=0, atol=2e-6)
