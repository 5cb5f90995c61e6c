"""A gate in front of the real engine, which holds a run for as long as a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from service.graphs.graph import Graph, StatePool
from service.graphs.workspace import Results, Workspace
from service.manifest import Manifest
from service.server import Server

Array = NDArray[Any]


class _Gated(Workspace):
    """The arrays of a tick that waits at a gate."""

    def __init__(self, gate: Gate, inside: Workspace) -> None:
        self.inputs, self.lengths, self.states, self.rows = inside.inputs, inside.lengths, inside.states, inside.rows
        self._gate, self._inside = gate, inside

    def run(self) -> Results:
        """Wait, then run."""
        x = self.inputs[0]
        assert x is not None
        self._gate.hold(x, self.rows)
        return self._inside.run()

    def release(self) -> None:
        """Give the arrays back."""
        self._inside.release()


class Gate:
    """An engine that waits to be let through, and counts.

    Attributes:
        rows: how many rows each run had.
        fail: what to raise instead of running, if anything.
        before: called before each run with its x.
    """

    def __init__(self, engine: Graph) -> None:
        self.rows: list[int] = []
        self.fail: Exception | None = None
        self.before: Callable[[Array], None] = lambda x: None
        self._engine = engine
        self._open = threading.Semaphore(0)
        self._entered = asyncio.Semaphore(0)
        self._loop = asyncio.get_running_loop()

    @property
    def manifest(self) -> Manifest:
        """The engine's."""
        return self._engine.manifest

    @property
    def digest(self) -> str:
        """The engine's."""
        return self._engine.digest

    def run(self, feeds: Mapping[str, Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Wait, then run."""
        self.hold(feeds["x"], len(feeds["lengths"]))
        return self._engine.run(feeds)

    def workspace(self, rows: int, steps: int) -> Workspace:
        """The engine's arrays, whose run waits."""
        return _Gated(self, self._engine.workspace(rows, steps))

    def pool(self, slots: int, tick_rows: int, count: Callable[[str, int], None]) -> StatePool:
        """The engine's."""
        return self._engine.pool(slots, tick_rows, count)

    def hold(self, x: Array, rows: int) -> None:
        """Wait at the gate."""
        self.rows.append(rows)
        self._loop.call_soon_threadsafe(self._entered.release)
        assert self._open.acquire(timeout=60)
        if self.fail is not None:
            raise self.fail
        self.before(x)

    async def entered(self) -> None:
        """Wait until a run waits at the gate."""
        await self._entered.acquire()

    async def until_queued(self, server: Server, rows: int, model: str = "lstm") -> None:
        """Wait until so many rows wait behind the gate."""
        await until(lambda: server.repository.find(model).queued == rows)

    def let(self, runs: int = 1) -> None:
        """Let runs through."""
        self._open.release(runs)


async def until(true: Callable[[], bool]) -> None:
    """Let the event loop go on until something holds."""
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110  what is waited for lies inside the server, which tells nobody
            await asyncio.sleep(0.001)


@contextmanager
def gated(server: Server, model: str = "lstm") -> Iterator[Gate]:
    """Put a gate in front of a model; at the end everything is let through."""
    runner = server.repository.find(model)
    runner.execution.engine = gate = Gate(runner.execution.engine)
    try:
        yield gate
    finally:
        gate.let(1000)
