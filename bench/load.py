"""The client, in a process of its own: takes one load a line, as JSON, and prints one line of figures for each.

Every group of sessions has one message in flight. A group sends again when all of its message has been answered; where
the load has a rate, messages fall due at that rate whoever is free, and count from when they were due, so that a
server that falls behind is seen to.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import numpy as np

from bench.doors import DOORS, Door, Refused, Shape
from bench.opening import OPTIONS, close_sessions, open_sessions, resident
from bench.processes import tree_cpu_s
from conveyor.v1 import conveyor_pb2 as pb

_ON_THE_WAY = 0.2
"""Of a load's timeout, what the client keeps back for the way there and back."""
_WARM_UP = 0.2
"""Of a load's seconds, how long it runs before anything is counted."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    Attributes:
        door: ``blocks``, ``chunks``, ``sequences``, ``echo``, or ``batch``: ragged batches of whole sequences.
        port: where the server listens.
        model: its name.
        input_size: I.
        output_size: O.
        sessions: how many live at a time; of batches, how many callers.
        streams: calls, each on a connection of its own, that share the sessions.
        steps: of a chunk.
        chunks: of a message.
        seconds: how long is counted, after a fifth of it to warm up.
        pid: the server's process, whose CPU time is counted meanwhile; 0 for none.
        rate: steps per second of all sessions together; 0 for as many as the server answers.
        timeout_ms: within which the client needs an answer; the server is told a fifth less. 0 for no limit.
        residents: the sessions are some of so many that are open already; 0 to open and close new ones.
        sample: which of the residents: another for each load.
        rows: of a batch; its sequences have log-normal lengths.
        median: of those lengths.
        sigma: of their logarithm.
    """

    door: str
    port: int
    model: str
    input_size: int
    output_size: int
    sessions: int
    streams: int = 1
    steps: int = 1
    chunks: int = 1
    seconds: float = 1.5
    pid: int = 0
    rate: float = 0.0
    timeout_ms: float = 0.0
    residents: int = 0
    sample: int = 0
    rows: int = 16
    median: float = 100.0
    sigma: float = 1.0

    def to_line(self) -> str:
        """What this module reads."""
        return json.dumps(asdict(self))


def event_loop() -> str:
    """The event loop that the client runs on: uvloop where it is installed."""
    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


class _Tally:
    """When counting begins and ends, and what was counted: what was answered between the two."""

    def __init__(self, load: Load) -> None:
        self.timeout_s = load.timeout_ms * 1e-3 or float("inf")
        self.began = time.perf_counter() + load.seconds * _WARM_UP
        self.until = self.began + load.seconds
        self.latencies_s: list[float] = []
        self.refusals_s: list[float] = []
        self.steps = self.slow = self.dropped = self.sent = 0

    def counts(self, now: float) -> bool:
        return self.began <= now <= self.until

    def applied(self, after_s: float, steps: int) -> None:
        if after_s <= self.timeout_s:
            self.steps += steps
        else:
            self.slow += steps


async def _drive(load: Load, tally: _Tally, channel: grpc.aio.Channel, door: Door, number: int) -> None:
    """Send and receive on one stream until the time is over and all is answered."""
    call: Any = channel.stream_stream(door.method)(metadata=door.metadata)
    left, applied, sent = [0] * len(door.sizes), [0] * len(door.sizes), [0.0] * len(door.sizes)
    idle: asyncio.Queue[int] = asyncio.Queue()
    for group in range(len(door.sizes)):
        idle.put_nowait(group)
    ending: set[int] = set()
    period_s = load.streams * max(door.sizes) * load.steps / load.rate if load.rate else 0.0

    async def write() -> None:
        # Streams fall due one after the other, not all at once.
        due = woke = time.perf_counter() + period_s * number / load.streams
        for _ in range(len(door.sizes)):
            while (group := await idle.get()) is not None:
                at = time.perf_counter()
                if period_s:
                    if due > at:
                        # How late a timer is must not count as the server's.
                        await asyncio.sleep(min(due, tally.until) - at)
                        woke = time.perf_counter()
                    at, due = max(due, woke), due + period_s
                if time.perf_counter() >= tally.until:
                    break
                left[group], applied[group], sent[group] = door.sizes[group], 0, at
                if at >= tally.began:
                    tally.sent += door.sizes[group] * load.steps
                await call.write(door.message(group))
            if (last := door.last(group)) is not None:
                ending.add(group)
                await call.write(last)
        await call.done_writing()

    async def read() -> None:
        while (reply := await call.read()) is not grpc.aio.EOF:
            now = time.perf_counter()
            for group, steps, refused, late in door.read(reply):
                if group in ending:
                    ending.remove(group)
                    continue
                if tally.counts(now):
                    tally.applied(now - sent[group], steps * load.steps)
                    tally.dropped += late * load.steps
                    tally.refusals_s += [now - sent[group]] * refused
                applied[group] += steps
                left[group] -= steps + refused + late
                if left[group] == 0:
                    if applied[group] and tally.counts(now):
                        tally.latencies_s.append(now - sent[group])
                    idle.put_nowait(group)
        if any(left) or ending:
            raise Refused("the stream ended before everything was answered")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        tasks.create_task(read())


async def _batches(load: Load, tally: _Tally, channel: grpc.aio.Channel, number: int) -> None:
    """Send one ragged batch after the other, out of a few that are made beforehand."""
    random = np.random.default_rng(number)
    call: Any = channel.unary_unary("/conveyor.v1.ConveyorService/Infer")
    batches = []
    for _ in range(4):
        lengths = lognormal_lengths(load, random)
        x = random.standard_normal((lengths.sum(), load.input_size), np.float32)
        tensor = pb.Tensor(name="x", data_type=pb.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())
        request = pb.InferRequest(model=load.model, inputs=[tensor], lengths=lengths.tolist(), ragged=True)
        batches.append((request.SerializeToString(), int(lengths.sum())))
    while time.perf_counter() < tally.until:
        batches = batches[1:] + batches[:1]
        sent = time.perf_counter()
        await call(batches[0][0])
        now = time.perf_counter()
        if tally.counts(now):
            tally.latencies_s.append(now - sent)
            tally.steps += batches[0][1]


def lognormal_lengths(load: Load, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The lengths of a batch's sequences."""
    return np.clip(random.lognormal(np.log(load.median), load.sigma, load.rows), 1, 2048).astype(np.int64)


async def run(load: Load) -> dict[str, float]:
    """Put the load on the server.

    Returns:
        What there is of these:
        ``steps_per_s``; ``p50_ms`` and ``p99_ms`` of a message until all of it is answered; ``cpu_us_per_step`` of the
        server where its process is known, and ``server_busy``, the share of a core that it took; ``client_busy``, that
        of the client; ``sent_per_s``, steps; of a load with a timeout also ``refused_per_s``, chunks,
        ``refusal_p99_ms``, and as steps ``slow_per_s``, whose answers came too late, and ``dropped_per_s``, which the
        server gave up.

    Raises:
        Refused: if the server refuses something that it should not.
        grpc.aio.AioRpcError: if it fails, or is not there.
    """
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{load.port}", options=OPTIONS) for _ in range(load.streams)]
    timeout_us = round(load.timeout_ms * 1e3 * (1 - _ON_THE_WAY))
    shape = Shape(load.model, load.input_size, load.output_size, load.steps, load.chunks, timeout_us)
    names: Sequence[Any] = _names(load)
    share = len(names) // load.streams
    opened = load.door in ("blocks", "chunks") and not load.residents
    try:
        if opened:
            await open_sessions(channels[0], load.model, names)
        doors: list[Door] = []
        if load.door != "batch":
            doors = [DOORS[load.door](shape, names[at * share : (at + 1) * share]) for at in range(load.streams)]
        tally = _Tally(load)
        async with asyncio.TaskGroup() as tasks:
            meter = tasks.create_task(_meter(load, tally))
            for number, each in enumerate(doors):
                tasks.create_task(_drive(load, tally, channels[number], each, number))
            for number in range(load.sessions if load.door == "batch" else 0):
                tasks.create_task(_batches(load, tally, channels[number % load.streams], number))
        if opened:
            await close_sessions(channels[0], names)
    finally:
        for channel in channels:
            await channel.close()
    p50, p99 = np.percentile(tally.latencies_s or [np.nan], [50, 99]) * 1e3
    figures = {
        "refused_per_s": len(tally.refusals_s) / load.seconds,
        "refusal_p99_ms": np.percentile(tally.refusals_s or [np.nan], 99) * 1e3,
        "slow_per_s": tally.slow / load.seconds,
        "dropped_per_s": tally.dropped / load.seconds,
        "sent_per_s": tally.sent / load.seconds,
        "steps_per_s": tally.steps / load.seconds,
        "p50_ms": p50,
        "p99_ms": p99,
        "cpu_us_per_step": meter.result()[0] / max(1, tally.steps) * 1e6,
        "server_busy": meter.result()[0] / load.seconds,
        "client_busy": meter.result()[1] / load.seconds,
    }
    return {name: float(figure) for name, figure in figures.items() if not np.isnan(figure)}


def _names(load: Load) -> Sequence[Any]:
    """What the sessions are called; numbers where a door wants those."""
    if load.door == "sequences":
        first = time.time_ns() // 1000
        return range(first, first + load.sessions)
    if load.residents:
        shuffled = np.random.default_rng(0).permutation(load.residents)
        return [resident(n) for n in shuffled[load.sample * load.sessions : (load.sample + 1) * load.sessions].tolist()]
    first = time.time_ns()
    return [str(first + number) for number in range(load.sessions)]


async def _meter(load: Load, tally: _Tally) -> tuple[float, float]:
    """CPU seconds that the server uses while steps are counted, NaN if it is not known; and those of this process."""
    await asyncio.sleep(tally.began - time.perf_counter())
    before, own = tree_cpu_s(load.pid) if load.pid else math.nan, time.process_time()
    await asyncio.sleep(tally.until - time.perf_counter())
    return (tree_cpu_s(load.pid) if load.pid else math.nan) - before, time.process_time() - own


def _told(failure: BaseException) -> str:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, grpc.aio.AioRpcError):
        return f"{failure.code().name}: {failure.details()}"
    return str(failure) or type(failure).__name__


def main() -> int:
    """Run each load that standard input names; print what came of it."""
    factory = None
    if event_loop() == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        for line in sys.stdin:
            try:
                figures: dict[str, Any] = runner.run(run(Load(**json.loads(line))))
            except Exception as failure:
                figures = {"failed": _told(failure)}
            print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
