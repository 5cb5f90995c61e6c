"""What the Open Inference Protocol tells of server, models and repository, and what it does not offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import conveyor
from service.server import Server
from service.settings import Settings
from service.wire.inference_stubs import inference_pb2 as pb
from tests.clock import Clock
from tests.conftest import running
from tests.graphs import HIDDEN, INPUT, OUTPUT, expected, write_lstm
from tests.wire.gate import gated
from tests.wire.inference import calling, output, refusal, request

x = np.random.default_rng(0).standard_normal((2, 4, INPUT)).astype(np.float32)

UNKNOWN = "Request for unknown model: 'other' is not found"


async def test_health(lstm_repository: Path) -> None:
    """The server lives from when it listens, and is ready, like its models, until it drains."""
    async with running(lstm_repository) as server, calling(server) as stub:

        async def ready() -> tuple[bool, bool]:
            return (
                (await stub.ServerReady(pb.ServerReadyRequest())).ready,
                (await stub.ModelReady(pb.ModelReadyRequest(name="lstm"))).ready,
            )

        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert await ready() == (True, True)
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="lstm", version="1"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="lstm", version="2"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
        status, text = await refusal(stub.ModelReady(pb.ModelReadyRequest(name="lstm", version="first")))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert "version 'first' is none; expected a positive integer" in text
        server.operations.intake.draining = True
        assert await ready() == (False, False)
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live


async def test_while_models_load(lstm_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers, says that it is not ready, and tells everybody else to come again."""
    server = Server(Settings(repository=lstm_repository, port=0, tune_s=0), Clock())

    async def load(needed: object) -> None:
        async with calling(server) as stub:
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await stub.ModelReady(pb.ModelReadyRequest(name="lstm"))).ready
            for call in (
                stub.ModelInfer(request(x)),
                stub.ModelInfer(request(x[:1], sequence_id=1, sequence_start=True)),
                stub.ModelMetadata(pb.ModelMetadataRequest(name="lstm")),
                stub.ModelStatistics(pb.ModelStatisticsRequest()),
            ):
                assert (await refusal(call))[0] is grpc.StatusCode.UNAVAILABLE

    monkeypatch.setattr(server.repository, "load", load)
    try:
        await server.start()
    finally:
        await server.stop(0)


async def test_server_metadata(lstm_repository: Path) -> None:
    """Name, version, and the extensions that are offered."""
    async with running(lstm_repository) as server, calling(server) as stub:
        told = await stub.ServerMetadata(pb.ServerMetadataRequest())
        assert (told.name, told.version) == ("conveyor", conveyor.__version__)
        assert "sequence" in told.extensions
        assert not {"system_shared_memory", "cuda_shared_memory", "trace", "logging"} & set(told.extensions)


async def test_model_metadata(lstm_repository: Path) -> None:
    """Inputs and outputs stand batch first, time second, whatever the graph has."""
    async with running(lstm_repository) as server, calling(server) as stub:
        told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="lstm", version="1"))
        assert (told.name, [*told.versions], told.platform) == ("lstm", ["1"], "onnxruntime_onnx")
        assert [(t.name, t.datatype, [*t.shape]) for t in told.inputs] == [("x", "FP32", [-1, -1, INPUT])]
        assert [(t.name, t.datatype, [*t.shape]) for t in told.outputs] == [("y", "FP32", [-1, -1, OUTPUT])]
        for call in (
            stub.ModelMetadata(pb.ModelMetadataRequest(name="other")),
            stub.ModelConfig(pb.ModelConfigRequest(name="other")),
            stub.ModelStatistics(pb.ModelStatisticsRequest(name="other")),
            stub.ModelInfer(request(x, model="other")),
            stub.ModelInfer(request(x[:1], model="other", sequence_id=1)),
        ):
            status, text = await refusal(call)
            assert status is grpc.StatusCode.NOT_FOUND
            assert text.startswith(UNKNOWN)


async def test_model_config(lstm_repository: Path) -> None:
    """It says what is true: rows of a request, axes after the batch, states, how long a sequence may be idle."""
    async with running(lstm_repository, max_batch=17, idle_timeout_s=2.5) as server, calling(server) as stub:
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="lstm"))).config
        assert (config.name, config.platform, config.backend) == ("lstm", "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == 17
        assert [(t.name, t.data_type, [*t.dims]) for t in config.input] == [("x", pb.TYPE_FP32, [-1, INPUT])]
        assert [(t.name, t.data_type, [*t.dims]) for t in config.output] == [("y", pb.TYPE_FP32, [-1, OUTPUT])]
        assert [*config.version_policy.specific.versions] == [1]
        assert not config.model_transaction_policy.decoupled
        assert config.WhichOneof("scheduling_choice") == "sequence_batching"
        assert config.sequence_batching.max_sequence_idle_microseconds == 2_500_000
        states = [(s.input_name, s.output_name, s.data_type, [*s.dims]) for s in config.sequence_batching.state]
        assert states == [(f"{s}0", f"{s}T", pb.TYPE_FP32, [1, HIDDEN]) for s in "hc"]
        assert all(state.initial_state[0].zero_data for state in config.sequence_batching.state)


async def test_statistics(lstm_repository: Path) -> None:
    """Every request is counted once, as success or as failure; rows, runs and sizes of runs add up."""
    async with running(lstm_repository, max_tick_rows=4) as server, calling(server) as stub:

        async def statistics(**which: str) -> pb.ModelStatistics:
            told: pb.ModelStatisticsResponse = await stub.ModelStatistics(pb.ModelStatisticsRequest(**which))
            (one,) = told.model_stats
            return one

        before = await statistics()
        assert (before.name, before.version) == ("lstm", "1")
        assert (before.inference_count, before.execution_count, before.last_inference) == (0, 0, 0)
        await stub.ModelInfer(request(x))
        await stub.ModelInfer(request(x[:1], sequence_id=1, sequence_start=True))
        await stub.ModelInfer(request(x[:1], sequence_id=1))
        with gated(server) as gate:
            gate.fail = RuntimeError("broken")
            gate.let(1)
            assert (await refusal(stub.ModelInfer(request(x[:1], sequence_id=1))))[0] is grpc.StatusCode.INTERNAL
        after = await statistics(name="lstm", version="1")
        assert after == await statistics(name="lstm")
        assert (after.inference_count, after.execution_count) == (4, 3)
        assert after.last_inference > 0
        stats = after.inference_stats
        assert (stats.success.count, stats.fail.count) == (3, 1)
        for part in (stats.compute_input, stats.compute_infer, stats.compute_output):
            assert part.count == 4
        assert {(one.batch_size, one.compute_infer.count) for one in after.batch_stats} == {(2, 1), (1, 2)}
        gate.fail = None
        # One of several rows is one request, a reply that was kept is an answer, what is refused has failed.
        several = request({"x": x, "sequence_ids": np.array([7, 8])}, sequence_start=True)
        kept = request(x[:1], sequence_id=1, sequence_position=2 * x.shape[1], sequence_end=True)
        for good in (several, kept, kept):
            await stub.ModelInfer(good)
        for bad in (request(x[:, :, :1]), request(x[:1], sequence_id=99), request(x, "none")):
            await refusal(stub.ModelInfer(bad))
        call = stub.ModelStreamInfer()
        for one in (request(x), request(x, "none")):
            await call.write(one)
            await call.read()
        call.cancel()
        stats = (await statistics()).inference_stats
        assert (stats.success.count, stats.fail.count) == (3 + 3 + 1, 1 + 3 + 1)


async def test_load_and_unload(tmp_path: Path) -> None:
    """Under explicit control models come and go on request; the index tells the state of each version."""
    write_lstm(tmp_path, "one")
    write_lstm(tmp_path, "two", seed=2)
    broken = tmp_path / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    async with running(tmp_path, model_control="explicit", load_models=["one"]) as server, calling(server) as stub:

        async def index(ready: bool = False) -> dict[tuple[str, str], tuple[str, str]]:
            told = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready))
            return {(m.name, m.version): (m.state, m.reason) for m in told.models}

        assert (await index(ready=True)).keys() == {("one", "1")}
        assert (await index())["two", "1"][0] == "UNAVAILABLE"
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="two"))
        two = await stub.ModelInfer(request(x, model="two"))
        np.testing.assert_allclose(output(two), [expected(row, seed=2) for row in x], atol=2e-6)
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="one"))
        assert (await index(ready=True)).keys() == {("two", "1")}
        status, text = await refusal(stub.ModelInfer(request(x, model="one")))
        assert status is grpc.StatusCode.NOT_FOUND
        assert text.startswith("Request for unknown model: 'one' is not found")
        status, text = await refusal(stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="broken")))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith("load failed for model 'broken'")
        state, reason = (await index())["broken", "1"]
        assert state == "UNAVAILABLE"
        assert reason
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="two"))).ready
        override = pb.RepositoryModelLoadRequest(model_name="two")
        override.parameters["config"].string_param = "{}"
        assert (await refusal(stub.RepositoryModelLoad(override)))[0] is grpc.StatusCode.UNIMPLEMENTED
        status, text = await refusal(stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="mine")))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert "there is no repository 'mine'" in text


async def test_control_that_is_not_explicit(lstm_repository: Path) -> None:
    """Otherwise nothing is loaded or unloaded on request, in the words that clients know."""
    async with running(lstm_repository) as server, calling(server) as stub:
        for call in (
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="lstm")),
            stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="lstm")),
        ):
            status, text = await refusal(call)
            assert status is grpc.StatusCode.UNAVAILABLE
            assert text.startswith("explicit model load / unload is not allowed")


NOT_OFFERED: dict[str, Any] = {
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


async def test_what_is_not_offered_says_so(lstm_repository: Path) -> None:
    """The other calls of the protocol are answered with a sentence."""
    async with running(lstm_repository) as server, calling(server) as stub:
        for name, message in NOT_OFFERED.items():
            status, text = await refusal(getattr(stub, name)(message))
            assert status is grpc.StatusCode.UNIMPLEMENTED
            assert text.startswith("this server")
