"""What one load alone does not show: streams beside batches, more than can be done, many sessions at rest.

Each starts a server of its own, and gives figures by name; medians over the runs are taken by whoever asks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
from collections.abc import Callable
from typing import Any

import grpc

from bench.load import Load
from bench.measure import Settings, run_load, start_conveyor
from bench.models import LARGE, SMALL, Model, make
from bench.processes import Process, python

Say = Callable[[str], None]


def streams_beside_batches(settings: Settings, say: Say) -> dict[str, float]:
    """Streaming steps at one rate, alone and while long batches take all that the model has left.

    Returns:
        ``alone_p99_ms``, ``beside_p99_ms``, their ``ratio``, ``batch_steps_per_s``, and ``wasted``: the share of the
        computed cells that were padding while both ran; lengths are log-normal with sigma 1.
    """
    with _server(LARGE, settings, say) as server:
        stream = _load(LARGE, server, sessions=64, streams=4, rate=1000.0, seconds=max(4.0, settings.seconds))
        say("streams alone")
        alone = run_load(stream)
        batches = _load(LARGE, server, door="batch", sessions=4, streams=2, rows=16, seconds=stream.seconds + 3)
        say("streams beside batches")
        before = _cells(server)
        background = subprocess.Popen(python("bench.load", *batches.to_flags()), stdout=subprocess.PIPE, text=True)
        beside = run_load(stream)
        said, _ = background.communicate(timeout=120)
        steps, padding = (after - at for after, at in zip(_cells(server), before, strict=True))
    return {
        "alone_p99_ms": alone["p99_ms"],
        "beside_p99_ms": beside["p99_ms"],
        "ratio": beside["p99_ms"] / alone["p99_ms"],
        "batch_steps_per_s": json.loads(said)["steps_per_s"],
        "wasted": padding / (steps + padding),
    }


def overload(settings: Settings, say: Say, factors: tuple[float, ...] = (1, 2, 4)) -> dict[str, float]:
    """Chunks that have to be applied within a quarter of a second, at multiples of the rate that the server can do.

    Returns:
        ``peak_steps_per_s`` with as much as is answered; and for each factor, as ``4x.NAME``: ``in_time`` over the
        peak, ``refusal_p99_ms``, ``late_per_s``, ``growth_bytes`` of the server's memory over the run before.
    """
    figures = {}
    with _server(LARGE, settings, say) as server:
        say("overload: the peak")
        load = _load(LARGE, server, sessions=256, chunks=64)
        peak = figures["peak_steps_per_s"] = run_load(load)["steps_per_s"]
        for factor in factors:
            say(f"overload: {factor:g} times the peak")
            before = server.resident_bytes()
            more = dataclasses.replace(load, sessions=2048, rate=factor * peak, timeout_ms=250.0)
            done = run_load(more)
            name = f"{factor:g}x"
            figures[f"{name}.in_time"] = done["steps_per_s"] / peak
            figures[f"{name}.refusal_p99_ms"] = done["refusal_p99_ms"]
            figures[f"{name}.late_per_s"] = done["late_per_s"]
            figures[f"{name}.growth_bytes"] = float(server.resident_bytes() - before)
    return figures


def residents(settings: Settings, say: Say, few: int = 1000, many: int = 100_000) -> dict[str, float]:
    """The time of a tick of 64 rows, with few sessions resident and with many.

    Returns:
        ``few_tick_us``, ``many_tick_us``, their ``ratio``, ``bytes_per_session`` of the server's memory, and
        ``open_us``: to open one of many, calls in parallel.
    """
    with _server(SMALL, settings, say, "--max-sessions", str(many + 1000), "--idle-timeout-s", "3600") as server:
        load = _load(SMALL, server, sessions=64, chunks=64)
        say(f"{few} sessions resident")
        asyncio.run(_open(server, SMALL, few, "few"))
        first = _tick_s(server, load)
        say(f"{many} sessions resident")
        before = server.resident_bytes()
        took = asyncio.run(_open(server, SMALL, many - few, "many"))
        grown = server.resident_bytes() - before
        second = _tick_s(server, load)
    return {
        "few_tick_us": first * 1e6,
        "many_tick_us": second * 1e6,
        "ratio": second / first,
        "bytes_per_session": grown / (many - few),
        "open_us": took / (many - few) * 1e6,
    }


def _server(model: Model, settings: Settings, say: Say, *flags: str) -> Process:
    repository = make(model, settings.folder, say)
    return start_conveyor(repository, settings, *flags)


def _load(model: Model, server: Process, door: str = "native", seconds: float = 3.0, **given: Any) -> Load:
    return Load(door, server.port, model.name, model.input_size, seconds=seconds, pid=server.pid, **given)


def _cells(server: Process) -> tuple[float, float]:
    return server.metric("conveyor_steps_total"), server.metric("conveyor_padding_steps_total")


def _tick_s(server: Process, load: Load) -> float:
    def ticks() -> tuple[float, float]:
        return server.metric("conveyor_tick_seconds_sum"), server.metric("conveyor_tick_seconds_count")

    seconds, count = ticks()
    run_load(load)
    after = ticks()
    return (after[0] - seconds) / (after[1] - count)


async def _open(server: Process, model: Model, count: int, prefix: str) -> float:
    """Open sessions; the seconds that it took."""
    from conveyor.v1 import conveyor_pb2 as pb

    loop = asyncio.get_running_loop()
    began = loop.time()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call: Any = channel.unary_unary("/conveyor.v1.ConveyorService/OpenSession")
        for at in range(0, count, 512):
            names = [f"{prefix}-{number}" for number in range(at, min(count, at + 512))]
            messages = [pb.OpenSessionRequest(model=model.name, session_id=name).SerializeToString() for name in names]
            await asyncio.gather(*(call(message) for message in messages))
    return loop.time() - began


SITUATIONS: dict[str, Callable[[Settings, Say], dict[str, float]]] = {
    "streams beside batches": streams_beside_batches,
    "overload": overload,
    "residents": residents,
}
