"""What a caller is told of models, and of those that are not there or cannot stream."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest

from conveyor.v1 import conveyor_pb2 as pb
from service.manifest import METADATA_KEY
from tests.conftest import calling, running
from tests.graphs import HIDDEN, INPUT, OUTPUT, expected, write_lstm
from tests.wire.native import array, tensor

x = np.random.default_rng(0).standard_normal((4, INPUT)).astype(np.float32)


async def test_list_models(tmp_path: Path) -> None:
    """In alphabetical order, each in its newest version; those that do not load are left out."""
    write_lstm(tmp_path, "zebra")
    for version in (9, 10):
        write_lstm(tmp_path, "lstm", version)
    (tmp_path / "broken/1").mkdir(parents=True)
    (tmp_path / "broken/1/model.onnx").touch()
    async with running(tmp_path, latest_versions=2) as server, calling(server) as stub:
        listed = (await stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.version) for model in listed] == [("lstm", 10), ("zebra", 1)]
        assert listed[0] == (await stub.GetModel(pb.GetModelRequest(model="lstm"))).model


async def test_get_model(lstm_repository: Path) -> None:
    """Everything that it takes to call it: names, dtypes, axes as on the wire, and the server's limits."""
    async with (
        running(lstm_repository, max_steps=77, max_batch=5, max_message_bytes=99_999) as server,
        calling(server) as stub,
    ):
        model = (await stub.GetModel(pb.GetModelRequest(model="lstm"))).model
    size = -1
    float32 = pb.DATA_TYPE_FLOAT32

    def sequence(name: str, features: int) -> pb.TensorSpec:
        axes = ["batch", "time", "feature"]
        return pb.TensorSpec(name=name, data_type=float32, shape=[size, size, features], axes=axes)

    def state(name: str) -> pb.TensorSpec:
        axes = ["batch", "layer", "hidden"]
        return pb.TensorSpec(name=name, data_type=float32, shape=[size, 1, HIDDEN], axes=axes)

    assert model == pb.Model(
        name="lstm",
        version=1,
        inputs=[sequence("x", INPUT)],
        outputs=[sequence("y", OUTPUT)],
        states=[state("h"), state("c")],
        streamable=True,
        cells=["lstm"],
        precision="float32",
        max_steps=77,
        max_batch=5,
        max_message_bytes=99_999,
        device="cpu",
    )


async def test_versions_of_a_model_are_served_side_by_side(tmp_path: Path) -> None:
    """Each with its own weights; 0 is the newest; a session stays on the version that it was opened on."""
    for version in (1, 2):
        write_lstm(tmp_path, "lstm", version, seed=version)
    async with running(tmp_path, latest_versions=2) as server, calling(server) as stub:
        for version, ran in ((0, 2), (1, 1), (2, 2)):
            assert (await stub.GetModel(pb.GetModelRequest(model="lstm", version=version))).model.version == ran
            reply = await stub.Infer(pb.InferRequest(model="lstm", version=version, inputs=[tensor(x[None])]))
            assert reply.version == ran
            np.testing.assert_allclose(array(reply.outputs[0])[0], expected(x, seed=ran), rtol=0, atol=2e-6)
            opened = await stub.OpenSession(pb.OpenSessionRequest(model="lstm", version=version))
            assert opened.session.version == ran


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (pb.GetModelRequest(model="gru"), grpc.StatusCode.NOT_FOUND, "no model 'gru' is served; there are: lstm"),
        (pb.GetModelRequest(), grpc.StatusCode.NOT_FOUND, "no model '' is served"),
        (pb.GetModelRequest(model="lstm", version=7), grpc.StatusCode.NOT_FOUND, "no version 7 here; there are: 1"),
        (pb.GetModelRequest(model="lstm", version=-7), grpc.StatusCode.INVALID_ARGUMENT, "version is -7; expected a"),
    ],
    ids=["unknown", "unnamed", "unknown version", "negative version"],
)
async def test_models_that_are_not_there(
    lstm_repository: Path, request_: pb.GetModelRequest, code: grpc.StatusCode, says: str
) -> None:
    """Told what there is."""
    async with running(lstm_repository) as server, calling(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match=says) as failed:
            await stub.GetModel(request_)
        assert failed.value.code() is code
        assert (await stub.GetModel(pb.GetModelRequest(model="lstm"))).model.name == "lstm"


async def test_a_model_that_reads_both_ways_has_no_sessions(tmp_path: Path) -> None:
    """Whole sequences it runs; opening or importing a session is refused, and the error says why."""
    path = write_lstm(tmp_path)
    model = onnx.load(path)
    (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    entry.value = json.dumps(json.loads(entry.value) | {"streamable": False})
    onnx.save(model, path)
    async with running(tmp_path) as server, calling(server) as stub:
        assert not (await stub.GetModel(pb.GetModelRequest(model="lstm"))).model.streamable
        reply = await stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(x[None])], return_states=True))
        np.testing.assert_allclose(array(reply.outputs[0])[0], expected(x), rtol=0, atol=2e-6)
        state = pb.SessionState(
            model="lstm", position=4, states=[tensor(array(s)[0], s.name) for s in reply.final_states]
        )
        for call in (
            stub.OpenSession(pb.OpenSessionRequest(model="lstm")),
            stub.ImportSession(pb.ImportSessionRequest(state=state)),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="takes whole sequences only, because a layer") as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert server.repository.find("lstm").pool.taken == 0
