"""The client: closed-loop load, in a process of its own. Prints one line of JSON.

Every session has one chunk in flight. Sessions stand in groups, and the chunks of a group travel in one message; a
group sends again when all of it has been answered. So the load follows the server, and never waits for a timer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import grpc
import numpy as np

from bench.echo import METHOD

_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    Attributes:
        door: ``native``, ``inference`` (one chunk of one step a message) or ``echo``.
        port: where the server listens.
        model: its name.
        input_size: I.
        sessions: how many live at a time.
        streams: calls, each on a connection of its own, that share the sessions.
        steps: of a chunk.
        chunks: of a message.
        seconds: how long is counted, after a fifth of it to warm up.
        pid: the server's process, whose CPU time is counted meanwhile; 0 for none.
    """

    door: str
    port: int
    model: str
    input_size: int
    sessions: int
    streams: int = 1
    steps: int = 1
    chunks: int = 1
    seconds: float = 3.0
    pid: int = 0

    def to_flags(self) -> list[str]:
        """What this module's command line takes."""
        return [json.dumps(asdict(self))]


class Group(Protocol):
    """Sessions whose chunks travel together."""

    def message(self) -> bytes:
        """The next message."""


class _NativeGroup:
    def __init__(self, load: Load, names: Sequence[str]) -> None:
        from conveyor.v1 import conveyor_pb2 as pb

        x = np.random.default_rng(0).standard_normal((load.steps, load.input_size)).astype("<f4")
        tensor = pb.Tensor(name="x", data_type=pb.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())
        self._steps = load.steps
        self._request = pb.StreamRequest(chunks=[pb.Chunk(session_id=name, inputs=[tensor]) for name in names])
        self._position = 0

    def message(self) -> bytes:
        for chunk in self._request.chunks:
            chunk.position = self._position
        self._position += self._steps
        return bytes(self._request.SerializeToString())


class _InferenceGroup:
    def __init__(self, load: Load, name: int) -> None:
        from service.wire.inference_stubs import inference_pb2 as pb

        x = np.random.default_rng(0).standard_normal((1, 1, load.input_size)).astype("<f4")
        request = pb.ModelInferRequest(model_name=load.model, id=str(name))
        request.parameters["sequence_id"].int64_param = name
        request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        request.raw_input_contents.append(x.tobytes())
        self._middle = request.SerializeToString()
        request.parameters["sequence_start"].bool_param = True
        self._next = request.SerializeToString()
        del request.parameters["sequence_start"]
        request.parameters["sequence_end"].bool_param = True
        self.last: bytes = request.SerializeToString()

    def message(self) -> bytes:
        message, self._next = self._next, self._middle
        return message


class _EchoGroup:
    def __init__(self, load: Load) -> None:
        self._message = _NativeGroup(load, [f"s{number}" for number in range(load.chunks)]).message()

    def message(self) -> bytes:
        return self._message


class _Clock:
    """When counting begins and ends, and what was counted."""

    def __init__(self, load: Load) -> None:
        self.began = time.perf_counter() + load.seconds / 5
        self.until = self.began + load.seconds
        self.latencies_s: list[float] = []
        self.steps = 0

    def count(self, sent: float, now: float, steps: int) -> None:
        if self.began <= sent and now <= self.until:
            self.latencies_s.append(now - sent)
            self.steps += steps


async def _native(load: Load, clock: _Clock, channel: grpc.aio.Channel, names: list[str]) -> None:
    from conveyor.v1 import conveyor_pb2 as pb

    call: Any = channel.stream_stream("/conveyor.v1.ConveyorService/Stream")()
    groups = [_NativeGroup(load, names[at : at + load.chunks]) for at in range(0, len(names), load.chunks)]
    group_of = {name: index // load.chunks for index, name in enumerate(names)}
    left = [0] * len(groups)
    sent = [0.0] * len(groups)

    async def send(index: int) -> None:
        left[index] = min(load.chunks, len(names) - index * load.chunks)
        sent[index] = time.perf_counter()
        await call.write(groups[index].message())

    for index in range(len(groups)):
        await send(index)
    live = len(groups)
    while live:
        reply = await call.read()
        if reply is grpc.aio.EOF:
            raise SystemExit("the stream ended early")
        now = time.perf_counter()
        for result in pb.StreamResponse.FromString(reply).results:
            if result.HasField("error"):
                raise SystemExit(f"refused: {result.error.message}")
            index = group_of[result.session_id]
            left[index] -= 1
            if left[index] == 0:
                size = min(load.chunks, len(names) - index * load.chunks)
                clock.count(sent[index], now, size * load.steps)
                if now < clock.until:
                    await send(index)
                else:
                    live -= 1
    await call.done_writing()


async def _inference(load: Load, clock: _Clock, channel: grpc.aio.Channel, names: list[int]) -> None:
    from service.wire.inference_stubs import inference_pb2 as pb

    call: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
    groups = {name: _InferenceGroup(load, name) for name in names}
    sent: dict[int, float] = {}
    for name, group in groups.items():
        sent[name] = time.perf_counter()
        await call.write(group.message())
    ending: set[int] = set()
    live = len(groups)
    while live:
        reply = await call.read()
        if reply is grpc.aio.EOF:
            raise SystemExit("the stream ended early")
        now = time.perf_counter()
        answer = pb.ModelStreamInferResponse.FromString(reply)
        if answer.error_message:
            raise SystemExit(f"refused: {answer.error_message}")
        name = int(answer.infer_response.id)
        if name in ending:
            live -= 1
            continue
        clock.count(sent[name], now, 1)
        sent[name] = now
        if now >= clock.until:
            ending.add(name)
            await call.write(groups[name].last)
        else:
            await call.write(groups[name].message())
    await call.done_writing()


async def _echo(load: Load, clock: _Clock, channel: grpc.aio.Channel, groups: int) -> None:
    call: Any = channel.stream_stream(METHOD)()
    message = _EchoGroup(load).message()
    # Answers come in order, so the oldest message out is the one that is answered.
    sent = [time.perf_counter() for _ in range(groups)]
    for _ in range(groups):
        await call.write(message)
    live, oldest = groups, 0
    while live:
        await call.read()
        now = time.perf_counter()
        clock.count(sent[oldest], now, load.chunks * load.steps)
        if now < clock.until:
            sent[oldest] = now
            await call.write(message)
        else:
            live -= 1
        oldest = (oldest + 1) % groups
    await call.done_writing()


async def run(load: Load) -> dict[str, float]:
    """Put the load on the server.

    Returns:
        ``steps_per_s``, ``p50_ms`` and ``p99_ms`` of a message until all of it is answered, ``cpu_us_per_step`` of the
        server where its process is known, ``steps``.
    """
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{load.port}", options=_OPTIONS) for _ in range(load.streams)]
    share = load.sessions // load.streams
    try:
        if load.door == "native":
            names = await _open(load, channels[0])
            clock = _Clock(load)
            calls = [
                _native(load, clock, channel, names[at * share : (at + 1) * share])
                for at, channel in enumerate(channels)
            ]
        elif load.door == "inference":
            first = int(time.time() * 1e3) % 10**9 * 1000 + 1
            numbers = list(range(first, first + load.sessions))
            clock = _Clock(load)
            calls = [
                _inference(load, clock, channel, numbers[at * share : (at + 1) * share])
                for at, channel in enumerate(channels)
            ]
        else:
            clock = _Clock(load)
            calls = [_echo(load, clock, channel, max(1, share // load.chunks)) for channel in channels]
        meter = asyncio.create_task(_meter(load, clock))
        await asyncio.gather(*calls)
        used = await meter
    finally:
        for channel in channels:
            await channel.close()
    p50, p99 = np.percentile(clock.latencies_s, [50, 99]) * 1e3
    return {
        "steps": clock.steps,
        "steps_per_s": clock.steps / load.seconds,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_us_per_step": used / clock.steps * 1e6,
    }


async def _meter(load: Load, clock: _Clock) -> float:
    """CPU seconds that the server uses while steps are counted."""
    from bench.processes import tree_cpu_s

    if not load.pid:
        return float("nan")
    await asyncio.sleep(clock.began - time.perf_counter())
    before = tree_cpu_s(load.pid)
    await asyncio.sleep(clock.until - time.perf_counter())
    return tree_cpu_s(load.pid) - before


async def _open(load: Load, channel: grpc.aio.Channel) -> list[str]:
    from conveyor.v1 import conveyor_pb2 as pb
    from conveyor.v1 import conveyor_pb2_grpc as stubs

    stub: Any = stubs.ConveyorServiceStub(channel)
    first = time.time_ns()
    names = [f"{first + number}" for number in range(load.sessions)]
    for at in range(0, len(names), 256):
        await asyncio.gather(
            *(
                stub.OpenSession(pb.OpenSessionRequest(model=load.model, session_id=name))
                for name in names[at : at + 256]
            )
        )
    return names


def main() -> int:
    """Run what the command line says; print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("load", help="a Load, as JSON")
    print(json.dumps(asyncio.run(run(Load(**json.loads(parser.parse_args().load))))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
