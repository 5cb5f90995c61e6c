"""Models that come and go under their callers: sessions stay where they are, health follows, nothing is kept."""

from __future__ import annotations

import asyncio
import shutil
import threading
import weakref
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conveyor.v1 import conveyor_pb2 as pb
from service.server import Server
from service.settings import Settings
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT, expected, replace_lstm, write_broken, write_lstm
from tests.wire.gate import gated
from tests.wire.native import Array, Caller, array, chunk, streaming, tensor

pytestmark = pytest.mark.usefixtures("memory")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

x = np.random.default_rng(0).standard_normal((6, INPUT)).astype(np.float32)


async def follow(server: Server) -> None:
    """Have the server see the folder as it is now."""
    for _ in range(2):
        await server.repository.poll()
    await server.repository.settle()


async def outputs(caller: Caller, *chunks: pb.Chunk) -> dict[str, Array]:
    """Step sessions of several models, whose results come in any order; return each session's outputs."""
    results = await caller.step(*chunks)
    assert not any(result.HasField("error") for result in results)
    return {
        chunk.session_id: np.concatenate(
            [array(result.outputs[0]) for result in results if result.session_id == chunk.session_id]
        )
        for chunk in chunks
    }


async def refused(call: grpc.aio.UnaryUnaryCall[object, object], code: grpc.StatusCode, says: str) -> None:
    """The call fails like this."""
    with pytest.raises(grpc.aio.AioRpcError, match=says) as failed:
        await call
    assert failed.value.code() is code


async def test_a_session_stays_on_the_version_that_opened_it(tmp_path: Path) -> None:
    """It steps, is exported, reset and forked there; everything new goes to the new version, from one moment on."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with running(tmp_path, model_control="poll") as server, calling(server) as stub, streaming(stub) as caller:
        old = await caller.open()
        before = await outputs(caller, chunk(old, 0, x[:2]))
        write_lstm(tmp_path, "lstm", 2, seed=2)
        await follow(server)

        new = await caller.open()
        after = await outputs(caller, chunk(old, 2, x[2:]), chunk(new, 0, x))
        of_old = np.concatenate([before[old], after[old]])
        np.testing.assert_allclose(of_old, expected(x, seed=1), rtol=0, atol=2e-6)
        np.testing.assert_allclose(after[new], expected(x, seed=2), rtol=0, atol=2e-6)
        listed = (await stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.version) for model in listed] == [("lstm", 2)]
        reply = await stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(x[None])]))
        assert reply.version == 2

        fork = (await stub.ForkSession(pb.ForkSessionRequest(session_id=old))).session
        assert (fork.version, fork.position) == (1, 6)
        state = (await stub.ExportSession(pb.ExportSessionRequest(session_id=old))).state
        assert state.version == 1
        await stub.ResetSession(pb.ResetSessionRequest(session_id=old))
        anew = await outputs(caller, chunk(old, 0, x))
        np.testing.assert_allclose(anew[old], expected(x, seed=1), rtol=0, atol=2e-6)
        for call in (
            stub.OpenSession(pb.OpenSessionRequest(model="lstm", version=1)),
            stub.ImportSession(pb.ImportSessionRequest(state=state)),
            stub.Infer(pb.InferRequest(model="lstm", version=1, inputs=[tensor(x[None])])),
        ):
            says = "version 1 of model 'lstm' is being unloaded .*; sessions that it has go on; there are: 2"
            await refused(call, grpc.StatusCode.NOT_FOUND, says)

        for session, runners in ((old, 2), (fork.session_id, 1)):
            await stub.CloseSession(pb.CloseSessionRequest(session_id=session))
            await server.repository.free()
            assert len(list(server.repository)) == runners
        await outputs(caller, chunk(new, 6, x))


async def test_what_is_under_way_ends_where_it_began(tmp_path: Path) -> None:
    """Chunks and batches that run or wait while the switch happens are answered by the version that took them."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with running(tmp_path, model_control="poll") as server, calling(server) as stub, streaming(stub) as caller:
        session = await caller.open()
        with gated(server) as gate:
            await caller.send(chunk(session, 0, x[:2]), chunk(session, 2, x[2:]))
            await gate.entered()
            batch = stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(x[None])]))
            await gate.until_queued(server, 2)
            write_lstm(tmp_path, "lstm", 2, seed=2)
            await follow(server)
            assert server.repository.find("lstm").version == 2
        results = [await caller.result() for _ in range(2)]
        y = np.concatenate([array(result.outputs[0]) for result in results])
        np.testing.assert_allclose(y, expected(x, seed=1), rtol=0, atol=2e-6)
        reply = await batch
        assert reply.version == 1
        np.testing.assert_allclose(array(reply.outputs[0])[0], expected(x, seed=1), rtol=0, atol=2e-6)


async def test_a_file_replaced_under_its_number(tmp_path: Path) -> None:
    """Two models of one name and number, each for its own sessions."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with running(tmp_path, model_control="poll") as server, calling(server) as stub, streaming(stub) as caller:
        old = await caller.open()
        replace_lstm(tmp_path, "lstm", 1, seed=2)
        await follow(server)
        new = await caller.open()
        y = await outputs(caller, chunk(old, 0, x), chunk(new, 0, x))
        np.testing.assert_allclose(y[old], expected(x, seed=1), rtol=0, atol=2e-6)
        np.testing.assert_allclose(y[new], expected(x, seed=2), rtol=0, atol=2e-6)


async def test_sessions_of_a_model_that_is_gone_expire_and_free_it(tmp_path: Path) -> None:
    """Their idle timeout ends them as any; then runner, graph and everything that a door keeps of them is freed."""
    write_lstm(tmp_path, "lstm", 1)
    write_lstm(tmp_path, "other", 1)
    clock = Clock()
    async with (
        running(tmp_path, clock, model_control="poll", idle_timeout_s=60) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        session = await caller.open()
        await caller.step(chunk(session, 0, x))
        runner = weakref.ref(server.repository.find("lstm"))
        graph = weakref.ref(server.repository.find("lstm").execution.engine)
        shutil.rmtree(tmp_path / "lstm")
        await follow(server)
        clock.now += 59
        server.operations.sessions.expire()
        await outputs(caller, chunk(session, 6, x))
        clock.now += 60
        server.operations.sessions.expire()
        await server.repository.free()
        (result,) = await caller.step(chunk(session, 12, x))
        assert result.error.reason == "session_expired"
        for thread in threading.enumerate():
            if thread.name.startswith("engine-lstm-"):
                thread.join(5)
        assert (runner(), graph()) == (None, None)
        assert {entry.name for entry in server.repository.index()} == {"other"}


async def test_health_follows(tmp_path: Path) -> None:
    """Of a model that comes, breaks, is mended and goes; a broken version beside one that serves changes nothing."""
    write_lstm(tmp_path, "lstm", 1)
    async with (
        running(tmp_path, model_control="poll") as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="gru"))
        assert (await watch.read()).status == UNKNOWN

        async def of(name: str) -> int:
            return int((await stub.Check(health_pb2.HealthCheckRequest(service=name))).status)

        write_broken(tmp_path, "gru", 1)
        write_broken(tmp_path, "lstm", 2)
        await follow(server)
        assert (await watch.read()).status == NOT_SERVING
        assert await of("lstm") == SERVING
        replace_lstm(tmp_path, "gru", 1, seed=3)
        await follow(server)
        assert (await watch.read()).status == SERVING
        shutil.rmtree(tmp_path / "gru")
        await follow(server)
        assert (await watch.read()).status == await of("gru") == NOT_SERVING
        assert await of("") == await of("lstm") == SERVING


@pytest.mark.parametrize("control", ["poll", "explicit"])
async def test_a_server_that_waits_for_its_first_model(tmp_path: Path, control: str) -> None:
    """It is healthy, lists nothing, and serves what comes."""
    async with running(tmp_path, model_control=control) as server, calling(server) as stub:
        assert not (await stub.ListModels(pb.ListModelsRequest())).models
        says = "no model 'lstm' is served; there are: none"
        await refused(stub.OpenSession(pb.OpenSessionRequest(model="lstm")), grpc.StatusCode.NOT_FOUND, says)
        write_lstm(tmp_path)
        if control == "poll":
            await follow(server)
        else:
            await server.repository.load_model("lstm")
        assert (await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))).session.version == 1


async def test_versions_that_saved_sessions_need(tmp_path: Path) -> None:
    """After a restart they serve those sessions and nothing else, until the last of them has ended."""
    repository = tmp_path / "models"
    write_lstm(repository, "lstm", 1, seed=1)
    file = tmp_path / "sessions"
    async with running(repository, sessions_file=file) as server, calling(server) as stub, streaming(stub) as caller:
        session = await caller.open(session_id="one")
        await caller.step(chunk(session, 0, x[:2]))
        await server.drain()
    write_lstm(repository, "lstm", 2, seed=2)
    async with running(repository, sessions_file=file) as server, calling(server) as stub, streaming(stub) as caller:
        assert (await stub.GetModel(pb.GetModelRequest(model="lstm"))).model.version == 2
        call = stub.OpenSession(pb.OpenSessionRequest(model="lstm", version=1))
        await refused(
            call, grpc.StatusCode.NOT_FOUND, r"version 1 .* being unloaded \(kept for the sessions of an earl"
        )
        (result,) = await caller.step(chunk(session, 2, x[2:]))
        np.testing.assert_allclose(array(result.outputs[0]), expected(x, seed=1)[2:], rtol=0, atol=2e-6)
        await stub.CloseSession(pb.CloseSessionRequest(session_id=session))
        await server.repository.free()
        assert [runner.version for runner in server.repository] == [2]


async def test_a_load_in_progress_does_not_hold_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server drains and stops; what was being loaded is given up."""
    entered, go_on = threading.Event(), threading.Event()

    def held(path: Path, settings: Settings) -> None:
        entered.set()
        go_on.wait(60)

    write_lstm(tmp_path, "lstm", 1)
    async with running(tmp_path, model_control="poll") as server:
        monkeypatch.setattr("service.versions.tuner.load_model", held)
        try:
            write_lstm(tmp_path, "lstm", 2)
            for _ in range(2):
                await server.repository.poll()
            await asyncio.to_thread(entered.wait, 30)
            await server.drain()
            assert await server.stop(0)
        finally:
            go_on.set()
