"""The server as a process: ready soon, without torch, drained by SIGTERM, its sessions alive after a restart."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from tests.graphs import INPUT, expected, write_lstm
from tests.process import ROOT, ServerProcess
from tests.wire.native import array, chunk

pytestmark = pytest.mark.e2e

x = np.random.default_rng(3).standard_normal((9, INPUT)).astype(np.float32)


def connect(server: ServerProcess) -> stubs.ConveyorServiceStub:
    """Stubs for a server; the channel goes with them."""
    channel = grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)])
    return stubs.ConveyorServiceStub(channel)


def step(
    stub: stubs.ConveyorServiceStub, *chunks: pb.Chunk, key: tuple[tuple[str, str], ...] = ()
) -> list[pb.ChunkResult]:
    """Send chunks on a stream of their own."""
    responses = stub.Stream(iter([pb.StreamRequest(chunks=chunks)]), metadata=key)
    return [result for response in responses for result in response.results]


def test_no_training_library_is_loaded(server_process: ServerProcess) -> None:
    """A server that runs has mapped neither torch nor the exporter's libraries into its memory."""
    mapped = Path(f"/proc/{server_process.pid}/maps").read_text()
    assert "onnxruntime" in mapped
    assert not any(name in mapped for name in ("/torch/", "/onnx/", "/sklearn/"))
    code = "import sys, service.server; print(sorted({'torch', 'onnx', 'models', 'export'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sigterm_drains(lstm_repository: Path) -> None:
    """Chunks that were sent are answered, the stream ends with UNAVAILABLE, the process with status 0."""
    with ServerProcess(lstm_repository) as server:
        stub = connect(server)
        session = stub.OpenSession(pb.OpenSessionRequest(model="lstm")).session.session_id
        messages = [chunk(session, n, x[n : n + 1]) for n in range(len(x))]

        def requests() -> object:
            yield pb.StreamRequest(chunks=messages)
            server.wait_for("draining")
            yield pb.StreamRequest(chunks=[chunk(session, len(x), x[:1])])
            # A stream that is half-closed may end well before the drain comes to ending it.
            ended_by_server.wait(30)

        ended_by_server = threading.Event()
        stream = stub.Stream(requests())
        first = next(stream)
        assert server.terminate() == 0
        results = list(first.results)

        def rest() -> None:
            for response in stream:
                results.extend(response.results)

        with pytest.raises(grpc.RpcError) as ended:
            rest()
        ended_by_server.set()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        applied = [result for result in results if not result.HasField("error")]
        outputs = np.concatenate([array(result.outputs[0]) for result in applied])
        np.testing.assert_allclose(outputs, expected(x), rtol=0, atol=2e-6)
        assert {result.error.reason for result in results if result.HasField("error")} <= {"draining"}


def test_sessions_outlive_a_restart(tmp_path: Path) -> None:
    """They go on, also on an older version than the newest; a last chunk is answered as before; the lost say so."""
    file = tmp_path / "sessions"
    repository = tmp_path / "models"
    write_lstm(repository, "lstm")
    write_lstm(repository, "gone")
    key = (("conveyor-key", "k"),)
    with ServerProcess(repository, "--sessions-file", str(file)) as server:
        stub = connect(server)
        for name in ("lstm", "gone"):
            stub.OpenSession(pb.OpenSessionRequest(model=name, session_id=name), metadata=key)
        stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="fresh"))
        epoch = stub.GetSession(pb.GetSessionRequest(session_id="fresh")).session.epoch
        (before,) = step(stub, chunk("lstm", 0, x[:4]), key=key)
        assert server.terminate() == 0
    assert file.stat().st_mode & 0o777 == 0o600
    for model in (repository / "gone").rglob("model.onnx"):
        model.unlink()
    write_lstm(repository, "lstm", version=2, seed=2)
    with ServerProcess(repository, "--sessions-file", str(file)) as server:
        assert not file.exists()
        assert file.with_name("sessions.not-restored").exists()
        (said,) = [event for event in server.events if event["event"] == "sessions restored"]
        assert (said["count"], said["lost"]) == (2, 1)
        assert said["reasons"] == ["no model 'gone' is served; there are: lstm"]
        stub = connect(server)
        again, after = step(stub, chunk("lstm", 0, x[:4]), chunk("lstm", 4, x[4:]), key=key)
        assert again == before
        np.testing.assert_allclose(array(after.outputs[0]), expected(x)[4:], rtol=0, atol=2e-6)
        assert stub.GetSession(pb.GetSessionRequest(session_id="fresh")).session.epoch == epoch
        (fresh,) = step(stub, chunk("fresh", 0, x))
        np.testing.assert_allclose(array(fresh.outputs[0]), expected(x), rtol=0, atol=2e-6)
        with pytest.raises(grpc.RpcError) as lost:
            stub.GetSession(pb.GetSessionRequest(session_id="gone"), metadata=key)
        assert lost.value.code() is grpc.StatusCode.NOT_FOUND
        assert "lost" in (lost.value.details() or "")


def test_of_too_many_sessions_those_used_last_go_on(tmp_path: Path, lstm_repository: Path) -> None:
    """Where the next process holds fewer."""
    flags = ("--sessions-file", str(tmp_path / "sessions"))
    with ServerProcess(lstm_repository, *flags) as server:
        stub = connect(server)
        for name in "abcd":
            stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id=name))
        step(stub, chunk("a", 0, x))
        server.terminate()
    with ServerProcess(lstm_repository, *flags, "--max-sessions", "2") as server:
        stub = connect(server)
        for name in "da":
            stub.GetSession(pb.GetSessionRequest(session_id=name))
        with pytest.raises(grpc.RpcError, match="lost"):
            stub.GetSession(pb.GetSessionRequest(session_id="c"))


def test_a_sessions_file_that_is_none_is_kept(tmp_path: Path, lstm_repository: Path) -> None:
    """What cannot be read is said and set aside, not overwritten; where nothing could be written the start fails."""
    file = tmp_path / "notes.txt"
    file.write_text("not sessions")
    with ServerProcess(lstm_repository, "--sessions-file", str(file)) as server:
        server.terminate()
    assert (tmp_path / "notes.txt.not-restored").read_text() == "not sessions"
    with pytest.raises(RuntimeError, match=r"status 1 before 'ready'.*sessions cannot be kept in .*nowhere/file"):
        ServerProcess(lstm_repository, "--sessions-file", str(tmp_path / "nowhere/file"))


def test_a_log_that_nobody_reads_does_not_stop_a_drain(tmp_path: Path, lstm_repository: Path) -> None:
    """With standard error closed the server drains, keeps its sessions, and ends with status 0."""
    with ServerProcess(lstm_repository, "--sessions-file", str(tmp_path / "sessions")) as server:
        connect(server).OpenSession(pb.OpenSessionRequest(model="lstm"))
        server.deafen()
        assert server.terminate() == 0
    assert (tmp_path / "sessions").exists()


def test_a_port_that_is_taken_is_said(server_process: ServerProcess, lstm_repository: Path) -> None:
    """A second server on the same port does not start, and says why."""
    with pytest.raises(RuntimeError, match=r"status 1 before 'ready'.*cannot listen on"):
        ServerProcess(lstm_repository, port=server_process.port)


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    """A repository that is not there ends the start, and is named."""
    with pytest.raises(RuntimeError, match=r"status 1 before 'ready'.*is not a folder"):
        ServerProcess(tmp_path / "nothing")


def test_metrics(lstm_repository: Path) -> None:
    """What was applied and refused is counted, and served over HTTP."""
    import urllib.request

    with ServerProcess(lstm_repository, "--metrics-port", "0") as server:
        stub = connect(server)
        stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"))
        step(stub, chunk("one", 0, x[:4]), chunk("one", 0, x[:4]), chunk("one", 9, x[:1]))
        url = f"http://127.0.0.1:{server.ready['metrics_port']}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    assert 'conveyor_steps_total{model="lstm",version="1"} 4.0' in text
    assert 'conveyor_rows_total{model="lstm",outcome="applied",version="1"} 1.0' in text
    assert "conveyor_sessions 1.0" in text
