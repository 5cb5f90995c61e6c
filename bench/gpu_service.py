"""The whole service on a device, as clients see it: sessions that step in closed loop, many chunks a message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.gpu_cases import Case, Stack, repository_of
from bench.load import Load
from bench.processes import Failed, Process, Worker, python

CHUNKS = 64
"""Of a message."""


@contextmanager
def serving(stack: Stack, folder: Path, device: str) -> Iterator[Process]:
    """Run a server with one stack on a device.

    Raises:
        Failed: if it does not start.
    """
    flags = ("--repository", str(repository_of(stack, folder)), "--device", device, "--port", "0")
    fixed = ("--metrics-port", "0", "--log-format", "json", "--cache-dir", str(folder / "tuning" / device))
    with Process(f"conveyor on {device}", python("service", *flags, *fixed)) as server:
        yield server


def measure_service(
    case: Case, server: Process, clients: int, seconds: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Put the case's sessions on a server.

    Args:
        case: its rows are sessions, its steps those of a chunk.
        server: that serves the case's stack.
        clients: processes that share the sessions: one alone takes a core, and would be the limit.
        seconds: how long is counted.
        say: told what is done.

    Returns:
        ``steps_per_s`` of all clients together; ``p50_ms`` and ``p99_ms`` of a message at the client that had the
        largest; ``rows_per_tick`` and ``steps_per_row`` that the server had.

    Raises:
        Failed: if it comes to nothing.
    """
    load = Load(
        "blocks",
        server.port,
        case.stack.name,
        case.stack.input_size,
        case.stack.hidden_size,
        sessions=case.rows // clients,
        steps=case.steps,
        chunks=CHUNKS,
        seconds=seconds,
    )
    say(f"{case.title}: through the service, {clients} clients")
    before = _ticks(server)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("bench.load")) for _ in range(clients)]
        for worker in workers:
            worker.ask(load.to_line())
        found = [worker.answer(seconds * 2 + 60) for worker in workers]
    if any("p99_ms" not in one for one in found):
        raise Failed("a client got no answer")
    rows, ticks, steps = (after - at for after, at in zip(_ticks(server), before, strict=True))
    return {
        "steps_per_s": sum(one["steps_per_s"] for one in found),
        "p50_ms": max(one["p50_ms"] for one in found),
        "p99_ms": max(one["p99_ms"] for one in found),
        "rows_per_tick": rows / max(1.0, ticks),
        "steps_per_row": steps / max(1.0, rows),
    }


def _ticks(server: Process) -> list[float]:
    names = ("conveyor_tick_rows_sum", "conveyor_tick_rows_count", "conveyor_steps_total")
    return [server.metric(name) for name in names]
