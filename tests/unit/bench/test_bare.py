"""The bare server is a ceiling only if it does the same arithmetic: its numbers are those of the graph."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, cast

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from bench.load import Load, run
from bench.opening import close_sessions, open_sessions
from bench.processes import Process, python
from conveyor.v1 import conveyor_pb2 as pb
from service.engines.engine import Engine
from tests.graphs import HIDDEN, INPUT, OUTPUT, write_lstm

Array = NDArray[np.float32]
STEPS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model's file."""
    return write_lstm(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Process]:
    """A bare server of it, as the benchmark starts it."""
    with Process("bare", python("bench.bare", str(model), "--event-loop", "uvloop")) as process:
        yield process


@pytest.fixture
async def channel(server: Process) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to it."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


def _tensor(x: Array) -> pb.Tensor:
    return pb.Tensor(name="x", data_type=pb.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())


def _array(outputs: Sequence[pb.Tensor]) -> Array:
    (y,) = outputs
    assert (y.name, y.data_type) == ("y", pb.DATA_TYPE_FLOAT32)
    return np.frombuffer(y.data, np.float32).reshape(y.shape)


async def _stepped(channel: grpc.aio.Channel, x: dict[str, Array]) -> dict[str, Array]:
    """What the server answers two sessions that come side by side, in either order, apart, and alone; each [T, O]."""
    call: Any = channel.stream_stream("/conveyor.v1.ConveyorService/Stream")()
    y: dict[str, list[Array]] = {name: [] for name in x}

    async def block(names: list[str], at: int, tag: int) -> None:
        tensor = _tensor(np.stack([x[name][at : at + 1] for name in names]))
        one = pb.Block(tag=tag, session_ids=names, positions=[at] * len(names), inputs=[tensor])
        await call.write(pb.StreamRequest(blocks=[one]).SerializeToString())
        (result,) = pb.StreamResponse.FromString(await call.read()).block_results
        assert (result.tag, result.steps) == (tag, 1)
        for name, each in zip(names, _array(result.outputs), strict=True):
            y[name] += list(each)

    async def chunks(names: list[str], at: int) -> None:
        made = [pb.Chunk(session_id=name, position=at, inputs=[_tensor(x[name][at : at + 1])]) for name in names]
        await call.write(pb.StreamRequest(chunks=made).SerializeToString())
        results = list(pb.StreamResponse.FromString(await call.read()).results)
        assert [(result.session_id, result.position, result.steps) for result in results] == [
            (name, at, 1) for name in names
        ]
        for result in results:
            y[result.session_id] += list(_array(result.outputs))

    await block(["a", "b"], 0, tag=7)
    await block(["a", "b"], 1, tag=7)
    await block(["b", "a"], 2, tag=8)
    await chunks(["a", "b"], 3)
    await chunks(["b"], 4)
    await chunks(["a"], 4)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return {name: np.stack(each) for name, each in y.items()}


def _alone(engine: Engine, x: Array) -> Array:
    zeros = np.zeros((1, 1, HIDDEN), np.float32)
    (y,), _ = engine.run({"x": x[:, None], "lengths": np.array([len(x)], np.int32), "h0": zeros, "c0": zeros})
    return cast(Array, y[:, 0])


async def test_it_gives_the_numbers_of_the_graph(channel: grpc.aio.Channel, model: Any) -> None:
    """Two sessions get what the graph gives each of them alone; opened again, in slots used before, they begin anew."""
    engine = Engine(model)
    random = np.random.default_rng(0)
    for _ in range(2):
        x = {name: random.standard_normal((STEPS, INPUT), np.float32) for name in ("a", "b")}
        await open_sessions(channel, "lstm", x)
        y = await _stepped(channel, x)
        await close_sessions(channel, x)
        for name in x:
            np.testing.assert_allclose(y[name], _alone(engine, x[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("door", ["chunks", "blocks"])
async def test_it_takes_the_load_of_the_benchmark(server: Process, door: str) -> None:
    """Whatever its cases send is answered to the end, on several streams at once."""
    load = Load(door, server.port, "lstm", INPUT, OUTPUT, sessions=8, streams=2, chunks=4, seconds=0.1, pid=server.pid)
    assert (await run(load))["steps_per_s"] > 0
    assert server.event_loop() == "uvloop"
