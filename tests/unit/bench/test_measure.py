"""Runs that fail are tried again where that is known to help; a load ends, and counts what was answered."""

from __future__ import annotations

import io
import json
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from bench import measure
from bench.cases import Case
from bench.echo import Echo
from bench.load import Load, run
from bench.measure import Measured, measure_case
from bench.models import SMALL
from bench.processes import Failed, Worker
from bench.progress import Progress
from bench.servers import Servers, Settings
from tests.clock import Clock
from tests.conftest import running


def test_a_peer_that_dies_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has three goes a run, and the runs that came to nothing are counted; others have one."""
    fails = iter([True, True, False, True])

    def load(case: Case, subject: str, servers: Servers) -> dict[str, float]:
        if next(fails):
            raise Failed("signal 11")
        return {"steps_per_s": 1.0}

    monkeypatch.setattr(measure, "_load", load)
    measured = [Measured("triton"), Measured("loop")]
    case = Case(SMALL, 1, subjects=("triton", "loop"))
    measure_case(case, Servers(Settings(Path()), lambda text: None), measured, 1)
    assert [(len(one.runs), one.failed, one.why) for one in measured] == [(1, 2, "signal 11"), (0, 1, "signal 11")]


def test_a_ceiling_needs_what_it_is_a_ceiling_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server's rows per tick are not known, the graph alone is not measured at some other number of them."""

    def load(case: Case, subject: str, servers: Servers) -> dict[str, float]:
        raise Failed("the server has gone")

    monkeypatch.setattr(measure, "_load", load)
    measured = [Measured("conveyor"), Measured("compute")]
    measure_case(Case(SMALL, 1), Servers(Settings(Path()), lambda text: None), measured, 1)
    assert [(one.runs, one.why) for one in measured] == [
        ([], "the server has gone"),
        ([], "the rows per tick are not known"),
    ]


@pytest.mark.parametrize("rate", [0.0, 400.0])
@pytest.mark.parametrize("chunks", [1, 4])
async def test_a_load_ends_and_counts_what_was_answered(chunks: int, rate: float) -> None:
    """Against an echo: closed loop or at a rate, the stream is used to its end and answers are counted as steps."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        load = Load("echo", port, "m", 3, 5, sessions=8, streams=2, chunks=chunks, seconds=0.2, rate=rate)
        figures = await run(load)
    finally:
        await server.stop(0)
    answered = figures["steps_per_s"] * load.seconds
    assert answered >= chunks
    assert round(answered) % chunks == 0
    assert figures["p50_ms"] <= figures["p99_ms"]


@pytest.mark.parametrize("door", ["chunks", "blocks", "batch"])
async def test_a_load_is_what_the_server_takes(door: str, lstm_repository: Path) -> None:
    """The server applies what each door sends, without an error, and the sessions are closed again."""
    async with running(lstm_repository) as server:
        load = Load(door, server.port, "lstm", 3, 4, sessions=4, streams=2, chunks=2, seconds=0.1, median=5, rows=3)
        figures = await run(load)
    assert figures["steps_per_s"] > 0


def test_a_worker_tells_what_failed_and_goes_on() -> None:
    """A load that cannot be run is an error of its own; the next one is taken."""
    with Worker("bench.load") as worker:
        for _ in range(2):
            worker.ask(Load("chunks", 1, "m", 3, 5, sessions=1, seconds=0.1).to_line())
            with pytest.raises(Failed, match="UNAVAILABLE"):
                worker.answer(30)
        worker.ask(json.dumps({"no": "load"}))
        with pytest.raises(Failed, match="unexpected keyword"):
            worker.answer(30)


def test_what_is_left_follows_how_long_it_took() -> None:
    """A machine that takes twice as long as was expected is expected to go on so."""
    clock, said = Clock(), io.StringIO()
    progress = Progress(Console(file=said, width=100), 100.0, clock)
    with progress.stage("one", 30.0):
        clock.now += 60.0
    with progress.stage("two", 70.0):
        pass
    assert said.getvalue().splitlines() == [
        "0:00 gone, about 1:40 left  one",
        "1:00 gone, about 2:20 left  two",
    ]
