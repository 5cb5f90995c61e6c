"""Models that were not exported here, through the Open Inference Protocol, against a plain loop over onnxruntime."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from service.manifest import Manifest
from service.wire.inference_stubs import inference_pb2 as pb
from tests.any_graphs import CASES, Case, close
from tests.conftest import running
from tests.wire.inference import calling, output, refusal, request

Array = NDArray[Any]
STEPS = 6


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each graph in turn."""
    assert isinstance(request.param, Case)
    return request.param


def calls(manifest: Manifest, row: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Cut one row's inputs [T, ...] into what calls take: [1, T, ...], or [1, ...] where a model takes one step."""
    cuts = [0, 2, 3, STEPS] if manifest.steps_per_run is None else range(STEPS + 1)
    for begin, end in pairwise(cuts):
        part = {name: array[begin:end] for name, array in row.items()}
        yield part if manifest.steps_per_run == 1 else {name: array[None] for name, array in part.items()}


def joined(manifest: Manifest, replies: list[pb.ModelInferResponse], name: str) -> Array:
    """An output of all calls: [T, ...]."""
    arrays = [output(reply, name) for reply in replies]
    return np.concatenate(arrays if manifest.steps_per_run == 1 else [array[0] for array in arrays])


async def test_a_sequence_is_the_plain_loop(tmp_path: Path, case: Case) -> None:
    """The server keeps the states; a model without a time axis takes one step a call, as its clients send it."""
    path = case.write(tmp_path)
    row = case.inputs(np.random.default_rng(1), STEPS)
    async with running(tmp_path) as server, calling(server) as stub:
        manifest = server.repository.find("any").manifest
        replies = [
            await stub.ModelInfer(request(part, model="any", sequence_id="a", sequence_start=n == 0))
            for n, part in enumerate(calls(manifest, row))
        ]
        told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="any"))
    expected, _ = case.loop(path, row)
    for spec in manifest.outputs:
        close(joined(manifest, replies, spec.name), expected[spec.name])
    for tensor in told.inputs:
        assert len(tensor.shape) == row[tensor.name].ndim + (manifest.steps_per_run is None)


async def test_states_carried_by_the_client(tmp_path: Path, case: Case) -> None:
    """Clients that carry the states themselves send and ask for them by the graph's own names, two rows at once."""
    path = case.write(tmp_path)
    rows = [case.inputs(np.random.default_rng(seed), STEPS) for seed in (1, 2)]
    async with running(tmp_path) as server, calling(server) as stub:
        manifest = server.repository.find("any").manifest
        wanted = [*(spec.name for spec in manifest.outputs), *(spec.output for spec in manifest.states)]
        replies: list[pb.ModelInferResponse] = []
        states: dict[str, Array] = {}
        for parts in zip(*(calls(manifest, row) for row in rows), strict=True):
            both = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            replies.append(await stub.ModelInfer(request({**both, **states}, *wanted, model="any")))
            states = {spec.input: output(replies[-1], spec.output) for spec in manifest.states}
    for n, row in enumerate(rows):
        expected, finals = case.loop(path, row)
        for spec in manifest.outputs:
            arrays = [output(reply, spec.name)[n] for reply in replies]
            given = np.stack(arrays) if manifest.steps_per_run == 1 else np.concatenate(arrays)
            close(given, expected[spec.name])
        for name, state in states.items():
            close(state[n], finals[name].reshape(state[n].shape))


async def test_constants_may_be_sent(tmp_path: Path) -> None:
    """A client that sends the value that a model has as a constant is served; with another value it is told so."""
    case = next(case for case in CASES if "role: constant" in case.description)
    case.write(tmp_path)
    row = case.inputs(np.random.default_rng(1), STEPS)
    async with running(tmp_path) as server, calling(server) as stub:
        manifest = server.repository.find("any").manifest
        (part, *_), (constant, *_) = calls(manifest, row), manifest.constants
        value = np.frombuffer(base64.b64decode(constant.value), constant.dtype)
        without = await stub.ModelInfer(request(part, model="any"))
        given = await stub.ModelInfer(request({**part, constant.name: value}, model="any"))
        assert given.raw_output_contents == without.raw_output_contents
        status, text = await refusal(stub.ModelInfer(request({**part, constant.name: value + 1}, model="any")))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        says = f"its value, {value[0]} ({constant.dtype}); got {value[0] + 1} ({constant.dtype})"
        assert f"input {constant.name!r} is a constant of this model; leave it out, or send {says}" in text
        wrong = value.astype(np.float64)
        status, text = await refusal(stub.ModelInfer(request({**part, constant.name: wrong}, model="any")))
        assert f"its value, {value[0]} ({constant.dtype}); got {wrong[0]} (float64)" in text


async def test_a_model_that_cannot_run_step_by_step(tmp_path: Path) -> None:
    """It has batches and no sequences, and its configuration says so."""
    case = next(case for case in CASES if "time_axis" in case.description)
    path = case.write(tmp_path)
    (tmp_path / "any" / "model.yaml").write_text(f"streamable: false\n{dedent(case.description)}")
    row = case.inputs(np.random.default_rng(1), STEPS)
    batch = {name: array[None] for name, array in row.items()}
    async with running(tmp_path) as server, calling(server) as stub:
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="any"))).config
        assert not config.HasField("sequence_batching")
        for start in (True, False):
            message = request(batch, model="any", sequence_id=1, sequence_start=start)
            assert (await refusal(stub.ModelInfer(message)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        reply = await stub.ModelInfer(request(batch, model="any"))
        expected, _ = case.loop(path, row)
        for output_tensor in reply.outputs:
            close(output(reply, output_tensor.name)[0], expected[output_tensor.name])
