"""What callers and operators are told of the device that runs a model, through both doors and in the metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

import conveyor
from service.engines.provider import why_no_cuda
from service.errors import LoadError
from service.server import Server
from service.settings import Settings
from service.wire.inference_stubs import inference_pb2 as pb
from tests.conftest import running
from tests.graphs import write_lstm
from tests.wire.inference import calling

pytestmark = pytest.mark.skipif(why_no_cuda() is None, reason="CUDA starts here")


async def told(server: Server) -> tuple[pb.ModelConfig, conveyor.Model, str]:
    """What the protocol's door says, what the client says of the native one, and the metrics of devices."""
    async with calling(server) as stub:
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="lstm"))).config
    async with conveyor.AsyncClient(f"127.0.0.1:{server.port}") as client:
        model = await client.model("lstm")
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    return config, model, "\n".join(line for line in lines if line.startswith("conveyor_model_"))


async def test_the_cpu(lstm_repository: Path) -> None:
    """Chosen, it is told, and nothing is a fallback."""
    async with running(lstm_repository) as server:
        config, model, metrics = await told(server)
    assert [one.kind for one in config.instance_group] == [pb.ModelInstanceGroup.KIND_CPU]
    assert {name: one.string_value for name, one in config.parameters.items()} == {"device": "cpu"}
    assert (model.device, model.fallback, model.tf32, model.tf32_difference) == ("cpu", False, False, 0.0)
    assert metrics.splitlines() == [
        'conveyor_model_info{device="cpu",model="lstm",precision="float32",version="1"} 1.0',
        'conveyor_model_fallback{model="lstm",version="1"} 0.0',
    ]


async def test_a_fallback_is_never_silent(tmp_path: Path) -> None:
    """Both doors and the metrics tell it of a model that asked for CUDA and allows the CPU."""
    write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text("device: cuda\nfallback: allow")
    async with running(tmp_path) as server:
        config, model, metrics = await told(server)
    assert {name: one.string_value for name, one in config.parameters.items()} == {"device": "cpu", "fallback": "true"}
    assert (model.device, model.fallback) == ("cpu", True)
    assert 'conveyor_model_fallback{model="lstm",version="1"} 1.0' in metrics.splitlines()


@pytest.mark.parametrize("flags", [{}, {"gpu_id": 0}, {"tf32": "on", "gpu_memory_limit_bytes": 1 << 30}])
async def test_settings_without_effect(lstm_repository: Path, flags: dict[str, Any]) -> None:
    """What was set for CUDA, and no model runs there, is named once; where nothing was, nothing is said."""
    with capture_logs() as logs:
        async with running(lstm_repository, **flags):
            pass
    said = [one["settings"] for one in logs if one["event"] == "settings without effect: the CPU runs all models"]
    assert said == ([["--gpu-memory-limit-bytes", "--tf32"]] if "tf32" in flags else [])


async def test_a_switch_of_devices(tmp_path: Path) -> None:
    """An edit of model.yaml that changes how a model runs is told at once, though its files are the same."""
    write_lstm(tmp_path)
    async with running(tmp_path, model_control="explicit", load_models=("*",)) as server:
        await told(server)
        (tmp_path / "lstm/model.yaml").write_text("device: cuda\nfallback: allow")
        await server.repository.load_model("lstm")
        _, model, metrics = await told(server)
    assert model.fallback
    assert 'conveyor_model_fallback{model="lstm",version="1"} 1.0' in metrics.splitlines()


@pytest.mark.parametrize("control", ["fixed", "poll", "explicit"])
async def test_no_server_without_its_device(lstm_repository: Path, control: Any) -> None:
    """A server that is to use CUDA does not start without it, however its models come; the reason is told."""
    server = Server(Settings(repository=lstm_repository, port=0, device="cuda", model_control=control))
    with pytest.raises(LoadError, match=f"CUDA was asked for .*: {re.escape(str(why_no_cuda()))}"):
        await server.start()
    await server.stop(0)


async def test_models_that_do_without(tmp_path: Path) -> None:
    """Where a model says that it may run on the CPU it is served, and the others are left out with the reason."""
    for name, yaml in (("one", "device: cpu"), ("two", "fallback: allow"), ("three", "")):
        write_lstm(tmp_path, name)
        (tmp_path / name / "model.yaml").write_text(yaml)
    async with running(tmp_path, device="cuda") as server, calling(server) as stub:
        assert server.repository.names() == ["one", "two"]
        index = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
        (reason,) = (one.reason for one in index if one.name == "three")
        assert reason.startswith(f"CUDA was asked for and does not run it: {why_no_cuda()}")
