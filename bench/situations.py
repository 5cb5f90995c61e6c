"""What one load alone does not show: streams beside batches, more than can be done, many sessions at rest.

Each starts servers of its own and does its rounds, each round with all that is compared in it; gives the figures of
each round by name.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from bench.load import lognormal_lengths
from bench.measure import load_of, run_counted, run_load
from bench.models import LARGE, SMALL, SMALL_GRU, Model, make
from bench.opening import open_residents
from bench.overload import overload
from bench.processes import Process, Worker
from bench.servers import Say, Settings, start_conveyor

Figures = dict[str, float]
FEW, MANY = 1000, 100_000


def streams_beside_batches(settings: Settings, say: Say) -> list[Figures]:
    """Streaming steps at one rate, alone and while long batches take all that the model has left; and those alone.

    Returns:
        ``alone_p99_ms``, ``beside_p99_ms`` and their ``p99_ratio``; ``stream_steps_per_s`` beside batches;
        ``steps_per_s`` of both together and ``batch_alone_steps_per_s``, by the server's counters, beginning and end
        of the load included; ``wasted`` and ``batch_alone_wasted``, the shares of the computed cells that were
        padding; ``padded_whole``, what it would be if each request were padded to its longest sequence.
    """
    rounds = []
    with _server(LARGE, settings, say) as server, Worker("bench.load") as client, Worker("bench.load") as batch_client:
        seconds = 2 * settings.seconds
        stream = load_of(LARGE, server, "chunks", sessions=64, streams=4, rate=1000.0, seconds=seconds)
        batches = load_of(LARGE, server, "batch", sessions=4, streams=2, seconds=settings.seconds)
        # Around all of the streams' time, warming up included.
        around = load_of(LARGE, server, "batch", sessions=4, streams=2, seconds=1.2 * seconds + 1)
        for number in range(settings.runs):
            say(f"streams alone, round {number + 1}")
            alone = run_load(client, stream)
            say(f"batches alone, round {number + 1}")
            before = _cells(server)
            run_load(batch_client, batches)
            between = _cells(server)
            say(f"streams beside batches, round {number + 1}")
            batch_client.ask(around.to_line())
            beside = run_load(client, stream)
            batch_client.answer(60)
            after = _cells(server)
            rounds.append(
                {
                    "alone_p99_ms": alone["p99_ms"],
                    "beside_p99_ms": beside["p99_ms"],
                    "p99_ratio": beside["p99_ms"] / alone["p99_ms"],
                    "stream_steps_per_s": beside["steps_per_s"],
                    "steps_per_s": (after.steps - between.steps) / (after.at_s - between.at_s),
                    "batch_alone_steps_per_s": (between.steps - before.steps) / (between.at_s - before.at_s),
                    "wasted": _wasted(between, after),
                    "batch_alone_wasted": _wasted(before, between),
                }
            )
        lengths = [lognormal_lengths(batches, np.random.default_rng(number)) for number in range(200)]
        whole = 1 - sum(each.sum() for each in lengths) / sum(len(each) * each.max() for each in lengths)
    return [figures | {"padded_whole": float(whole)} for figures in rounds]


def residents(settings: Settings, say: Say) -> list[Figures]:
    """The time of a tick of 64 rows, in turn on a server with few sessions open and on one with many.

    The 64 are drawn at random from those that are open, so that their states lie wherever sessions' states do.

    Returns:
        ``few_tick_us``, ``many_tick_us`` and their ``ratio``; ``bytes_per_session`` of memory beyond the state's own,
        of sessions that have not stepped; ``open_us``: to open one, calls in parallel.
    """
    flags = ("--max-sessions", str(MANY + 1000), "--idle-timeout-s", "3600")
    rounds = []
    with ExitStack() as stack:
        few, many = (stack.enter_context(_server(SMALL, settings, say, *flags)) for _ in range(2))
        client = stack.enter_context(Worker("bench.load"))
        say(f"opening {MANY:,} sessions")
        asyncio.run(open_residents(few.port, SMALL.name, 0, FEW))
        asyncio.run(open_residents(many.port, SMALL.name, 0, FEW))
        before = many.resident_bytes()
        took_s = asyncio.run(open_residents(many.port, SMALL.name, FEW, MANY))
        each = (many.resident_bytes() - before) / (MANY - FEW)
        state_bytes = 2 * SMALL.hidden_size * 4
        for number in range(settings.runs):
            say(f"{FEW:,} against {MANY:,} sessions, round {number + 1}")
            few_s = _tick_s(few, client, settings, FEW, number)
            many_s = _tick_s(many, client, settings, MANY, number)
            rounds.append(
                {
                    "few_tick_us": few_s * 1e6,
                    "many_tick_us": many_s * 1e6,
                    "ratio": many_s / few_s,
                    "bytes_per_session": each - state_bytes,
                    "open_us": took_s / (MANY - FEW) * 1e6,
                }
            )
    return rounds


def several_models(settings: Settings, say: Say) -> list[Figures]:
    """Two models on one server, each with 64 sessions in closed loop: one alone, the other alone, and both at once.

    Returns:
        ``lstm_alone_steps_per_s`` and ``gru_alone_steps_per_s``; the same ``together``; and ``shares``, of what each
        does alone what it does beside the other, both added up: 1 if they merely took turns. ``cpu_us_per_step`` of
        the server alone, the mean of both, and together.
    """
    repository = settings.folder / "repositories" / "several"
    pair = {"lstm": SMALL, "gru": SMALL_GRU}
    for model in pair.values():
        shutil.copytree(make(model, settings.folder, say) / model.name, repository / model.name, dirs_exist_ok=True)
    rounds = []
    with (
        start_conveyor(repository, settings) as server,
        Worker("bench.load") as lstm_client,
        Worker("bench.load") as gru_client,
    ):
        clients = {"lstm": lstm_client, "gru": gru_client}
        loads = {
            name: load_of(model, server, "blocks", sessions=64, chunks=64, seconds=settings.seconds)
            for name, model in pair.items()
        }
        for number in range(settings.runs):
            alone = {}
            for name, load in loads.items():
                say(f"{name} alone, round {number + 1}")
                alone[name] = run_load(clients[name], load)
            say(f"both at once, round {number + 1}")
            for name, load in loads.items():
                clients[name].ask(load.to_line())
            together = {name: clients[name].answer(60) for name in loads}
            rate = {name: figures["steps_per_s"] for name, figures in together.items()}
            # Each client has counted the CPU time of the whole server, over its own steps.
            cpu_us = [figures["cpu_us_per_step"] * figures["steps_per_s"] for figures in together.values()]
            rounds.append(
                {f"{name}_alone_steps_per_s": figures["steps_per_s"] for name, figures in alone.items()}
                | {f"{name}_together_steps_per_s": rate[name] for name in rate}
                | {
                    "shares": sum(rate[name] / alone[name]["steps_per_s"] for name in rate),
                    "alone_cpu_us_per_step": sum(figures["cpu_us_per_step"] for figures in alone.values()) / len(alone),
                    "together_cpu_us_per_step": max(cpu_us) / sum(rate.values()),
                }
            )
    return rounds


def _server(model: Model, settings: Settings, say: Say, *flags: str) -> Process:
    return start_conveyor(make(model, settings.folder, say), settings, *flags)


@dataclass(frozen=True, slots=True)
class _Cells:
    """The server's counters at a time: steps that counted, steps that were padding."""

    at_s: float
    steps: float
    padding: float


def _cells(server: Process) -> _Cells:
    steps, padding = server.metric("conveyor_steps_total"), server.metric("conveyor_padding_steps_total")
    return _Cells(time.perf_counter(), steps, padding)


def _wasted(before: _Cells, after: _Cells) -> float:
    padding = after.padding - before.padding
    return padding / (after.steps - before.steps + padding)


def _tick_s(server: Process, client: Worker, settings: Settings, residents: int, number: int) -> float:
    load = load_of(
        SMALL,
        server,
        "blocks",
        sessions=64,
        chunks=64,
        seconds=settings.seconds,
        residents=residents,
        sample=number,
    )
    return run_counted(client, load, server)["tick_ms"] * 1e-3


@dataclass(frozen=True, slots=True)
class Situation:
    """One of them.

    Attributes:
        run: does its rounds.
        round_runs: how many runs' seconds a round takes.
        once_s: how long it takes beside its rounds.
    """

    run: Callable[[Settings, Say], list[Figures]]
    round_runs: float
    once_s: float

    def expected_s(self, settings: Settings) -> float:
        """About how long it takes, to tell how much is left."""
        return self.once_s + settings.runs * self.round_runs * (settings.seconds * 1.2 + 0.3)


SITUATIONS = {
    "streams beside batches": Situation(streams_beside_batches, 6, 5),
    "overload": Situation(overload, 5, 5),
    "resident sessions": Situation(residents, 2, 40),
    "several models": Situation(several_models, 3, 5),
}
