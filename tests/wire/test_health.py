"""grpc.health.v1 for the server and each model, and reflection: what a load balancer and grpcurl go by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conveyor.v1 import conveyor_pb2 as pb
from service.repository import Repository
from service.server import Server
from service.settings import Settings
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT, write_lstm
from tests.wire.native import chunk, streaming

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """A prober."""

    def __init__(self, stub: health_pb2_grpc.HealthStub) -> None:
        self.stub = stub

    async def of(self, service: str) -> int:
        """Ask once."""
        return int((await self.stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@asynccontextmanager
async def probing(server: Server) -> AsyncIterator[Health]:
    """Connect a prober."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Health(health_pb2_grpc.HealthStub(channel))


async def test_the_server_and_each_model(tmp_path: Path) -> None:
    """A broken model says so and the server stays healthy; an older version that works keeps its name healthy."""
    write_lstm(tmp_path, "whole")
    write_lstm(tmp_path, "half", 1)
    for broken in ("half/2", "broken/1"):
        (tmp_path / broken).mkdir(parents=True)
        (tmp_path / broken / "model.onnx").touch()
    async with running(tmp_path, latest_versions=2) as server, probing(server) as health:
        assert await health.of("") == SERVING
        assert await health.of("whole") == SERVING
        assert await health.of("half") == SERVING
        assert await health.of("broken") == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await health.of("never")
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_while_models_load(lstm_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port answers that the server is not ready; calls are told to come again, not that there is no such model."""
    entered, go_on = asyncio.Event(), asyncio.Event()
    load = Repository.load

    async def held(repository: Repository, needed: Container[tuple[str, int]]) -> None:
        entered.set()
        await go_on.wait()
        await load(repository, needed)

    monkeypatch.setattr(Repository, "load", held)
    server = Server(Settings(repository=lstm_repository, port=0, tune_s=0), Clock())
    start = asyncio.create_task(server.start())
    try:
        await entered.wait()
        async with probing(server) as health, calling(server) as stub:
            assert await health.of("") == NOT_SERVING
            for call in (
                stub.ListModels(pb.ListModelsRequest()),
                stub.GetModel(pb.GetModelRequest(model="lstm")),
                stub.Infer(pb.InferRequest(model="lstm")),
                stub.OpenSession(pb.OpenSessionRequest(model="lstm")),
                stub.GetSession(pb.GetSessionRequest(session_id="one")),
                stub.CloseSession(pb.CloseSessionRequest(session_id="one")),
            ):
                assert await call.code() is grpc.StatusCode.UNAVAILABLE
                assert "being loaded" in await call.details() or "is starting" in await call.details()
            async with streaming(stub) as caller:
                (result,) = await caller.step(chunk("one", 0, np.ones((1, INPUT), np.float32)))
                assert result.error.reason == "loading"
            go_on.set()
            await start
            assert await health.of("") == await health.of("lstm") == SERVING
            assert len((await stub.ListModels(pb.ListModelsRequest())).models) == 1
            assert (await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))).session.position == 0
    finally:
        go_on.set()
        await start
        await server.stop(0)


async def test_not_serving_while_draining(lstm_repository: Path) -> None:
    """The server and its models, to who asks and to who watches; liveness of the port is not readiness."""
    async with running(lstm_repository) as server, probing(server) as health, calling(server) as stub:
        watches = {name: health.stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", "lstm")}
        for watch in watches.values():
            assert (await watch.read()).status == SERVING
        await server.drain()
        for name, watch in watches.items():
            assert (await watch.read()).status == NOT_SERVING
            assert await health.of(name) == NOT_SERVING
        assert (await stub.GetModel(pb.GetModelRequest(model="lstm"))).model.name == "lstm"


async def test_reflection(lstm_repository: Path) -> None:
    """Lists the services, and gives the contract's file, so that a generic client can call."""
    async with running(lstm_repository) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await call.read()).list_services_response.service
        assert {service.name for service in listed} == {
            "conveyor.v1.ConveyorService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "inference.GRPCInferenceService",
        }
        symbol = "conveyor.v1.ConveyorService"
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        assert pb.DESCRIPTOR.serialized_pb in files
        await call.done_writing()
