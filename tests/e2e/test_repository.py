"""A server whose repository changes under it, as a process of its own."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor import Client, NotFound, Session
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_stubs import inference_pb2_grpc as stubs
from tests.any_graphs import CASES, model, place
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


def write_endless(repository: Path, name: str) -> None:
    """A model that takes for ever to load: its run does not end."""
    step = next(case for case in CASES if case.name == "[N, H], no time axis")
    graph = """g (float[N, 3] x, float[N, 4] h) => (float[N, 2] y, float[N, 4] h_next) {
        a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)
        h_next = Loop (trips, yes, s) <
            body = again (int64 i, bool go, float[N, 4] before) => (bool go_on, float[N, 4] after) {
                go_on = Identity(go)  after = Tanh(before)
            }
        >
        y = MatMul(h_next, V)
    }"""
    weights = {**step.weights, "trips": np.array(1 << 60), "yes": np.array(True)}
    place(repository, name, model(graph, weights), step.description)


def until_it_loads(server: ServerProcess, name: str) -> None:
    """Wait until a model is about to be run."""
    while server.wait_for("model to be audited")["model"] != name:
        pass


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
            write_endless(repository, "slow")
            until_it_loads(server, "slow")
            session.step(x[5:10])
        assert server.terminate() == 0
    if moment == "at the start":
        before = file.read_bytes()
        write_endless(repository, "slow")
        with ServerProcess(repository, *flags, wait=False) as server:
            until_it_loads(server, "slow")
            assert server.terminate() == 0
        # What the thread of the other model still says may come after.
        said = [event["event"] for event in server.events]
        assert "ready" not in said
        assert said.index("signal") < said.index("stopped")
        assert file.read_bytes() == before
    shutil.rmtree(repository / "slow")
    with ServerProcess(repository, *flags) as server, Client(server.target) as client:
        session = client.attach("kept")
        at = 10 if moment == "later" else 5
        assert session.position == at
        y = session.step(x[at : at + 5])
        np.testing.assert_allclose(y, outputs(seed=0)[at : at + 5], rtol=0, atol=2e-6)
