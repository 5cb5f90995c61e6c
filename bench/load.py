"""The client, in a process of its own. Prints one line of JSON.

Every session has one chunk in flight. Sessions stand in groups, and the chunks of a group travel in one message; a
group sends again when all of it has been answered, or, where the load has a rate, when its time has come as well.
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

_EXHAUSTED, _LATE = 8, 4
"""gRPC's status codes RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED."""
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    Attributes:
        door: ``native``, ``inference`` (one chunk of one step a message), ``batch`` or ``echo``.
        port: where the server listens.
        model: its name.
        input_size: I.
        sessions: how many live at a time.
        streams: calls, each on a connection of its own, that share the sessions.
        steps: of a chunk.
        chunks: of a message.
        seconds: how long is counted, after a fifth of it to warm up.
        pid: the server's process, whose CPU time is counted meanwhile; 0 for none.
        rate: steps per second of all sessions together; 0 for as many as the server answers.
        timeout_ms: within which a chunk is to be applied; 0 for no limit.
        rows: of a batch, where the door is ``batch``; its sequences have log-normal lengths.
        median: of those lengths.
        sigma: of their logarithm.
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
    rate: float = 0.0
    timeout_ms: float = 0.0
    rows: int = 16
    median: float = 100.0
    sigma: float = 1.0

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
        timeout_us = round(load.timeout_ms * 1e3)
        chunks = [pb.Chunk(session_id=name, inputs=[tensor], timeout_us=timeout_us) for name in names]
        self._request = pb.StreamRequest(chunks=chunks)
        self._at = dict(zip(names, self._request.chunks, strict=True))

    def message(self) -> bytes:
        return bytes(self._request.SerializeToString())

    def applied(self, name: str) -> None:
        """Go on behind the chunk of a session."""
        self._at[name].position += self._steps


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
        self.refusals_s: list[float] = []
        self.late = 0
        self.steps = 0

    def refused(self, sent: float, now: float) -> None:
        if self.began <= sent and now <= self.until:
            self.refusals_s.append(now - sent)

    def count(self, sent: float, now: float, steps: int) -> None:
        if self.began <= sent and now <= self.until:
            self.latencies_s.append(now - sent)
            self.steps += steps


async def _native(load: Load, clock: _Clock, channel: grpc.aio.Channel, names: list[str]) -> None:
    from conveyor.v1 import conveyor_pb2 as pb

    call: Any = channel.stream_stream("/conveyor.v1.ConveyorService/Stream")()
    groups = [_NativeGroup(load, names[at : at + load.chunks]) for at in range(0, len(names), load.chunks)]
    group_of = {name: index // load.chunks for index, name in enumerate(names)}
    sizes = [min(load.chunks, len(names) - index * load.chunks) for index in range(len(groups))]
    left = [0] * len(groups)
    sent = [0.0] * len(groups)
    applied = [0] * len(groups)
    period_s = load.sessions * load.steps / load.rate if load.rate else 0.0
    now = time.perf_counter()
    # Spread over the period, so that a rate is one from the beginning.
    due = [now + period_s * (index + 0.5) / len(groups) for index in range(len(groups))]
    sleeping: set[asyncio.Task[None]] = set()
    # A call takes one message at a time.
    writing = asyncio.Lock()
    live = len(groups)

    async def send(index: int) -> None:
        if (pause := due[index] - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        async with writing:
            left[index], applied[index] = sizes[index], 0
            sent[index] = time.perf_counter()
            due[index] = max(due[index] + period_s, sent[index])
            await call.write(groups[index].message())

    async def send_when_due(index: int) -> None:
        if period_s and due[index] > time.perf_counter():
            task = asyncio.create_task(send(index))
            sleeping.add(task)
            task.add_done_callback(sleeping.discard)
        else:
            await send(index)

    for index in range(len(groups)):
        await send_when_due(index)
    while live:
        reply = await call.read()
        if reply is grpc.aio.EOF:
            raise SystemExit("the stream ended early")
        now = time.perf_counter()
        for result in pb.StreamResponse.FromString(reply).results:
            index = group_of[result.session_id]
            if not result.HasField("error"):
                groups[index].applied(result.session_id)
                applied[index] += 1
            elif result.error.code == _EXHAUSTED and load.timeout_ms:
                clock.refused(sent[index], now)
            elif result.error.code == _LATE and load.timeout_ms:
                clock.late += 1
            else:
                raise SystemExit(f"refused: {result.error.message}")
            left[index] -= 1
            if left[index] == 0:
                if applied[index]:
                    clock.count(sent[index], now, applied[index] * load.steps)
                if now < clock.until:
                    await send_when_due(index)
                else:
                    live -= 1
    await call.done_writing()


async def _batch(load: Load, clock: _Clock, channel: grpc.aio.Channel, number: int) -> None:
    from conveyor.v1 import conveyor_pb2 as pb

    random = np.random.default_rng(number)
    call: Any = channel.unary_unary("/conveyor.v1.ConveyorService/Infer")
    while time.perf_counter() < clock.until:
        lengths = np.clip(random.lognormal(np.log(load.median), load.sigma, load.rows), 1, 2048).astype(int)
        x = np.zeros((load.rows, lengths.max(), load.input_size), "<f4")
        tensor = pb.Tensor(name="x", data_type=pb.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())
        message = pb.InferRequest(model=load.model, inputs=[tensor], lengths=lengths.tolist()).SerializeToString()
        sent = time.perf_counter()
        await call(message)
        clock.count(sent, time.perf_counter(), int(lengths.sum()))


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
        server where its process is known, ``steps``; of a load with a timeout also ``refused_per_s``,
        ``refusal_p99_ms`` and ``late_per_s``.
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
        elif load.door == "batch":
            clock = _Clock(load)
            calls = [_batch(load, clock, channels[at % load.streams], at) for at in range(load.sessions)]
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
    p50, p99 = np.percentile(clock.latencies_s or [np.nan], [50, 99]) * 1e3
    return {
        "refused_per_s": len(clock.refusals_s) / load.seconds,
        "refusal_p99_ms": float(np.percentile(clock.refusals_s or [np.nan], 99) * 1e3),
        "late_per_s": clock.late / load.seconds,
        "steps": clock.steps,
        "steps_per_s": clock.steps / load.seconds,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_us_per_step": used / max(1, clock.steps) * 1e6,
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
