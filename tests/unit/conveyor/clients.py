"""What tests of the asynchronous client share: numbers, a client that does not wait, a step that does."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from conveyor import AsyncClient, AsyncSession
from conveyor.connection import Backoff, Settings
from tests.clock import Clock
from tests.unit.conveyor.sum_server import Fault, SumServer

PAUSE_S = 1.0
"""The longest pause of an impatient client."""


def rows(count: int, width: int = 2) -> NDArray[np.float32]:
    """Whole numbers, so that their sums are exact: [count, width]."""
    return np.arange(1, count * width + 1, dtype=np.float32).reshape(count, width)


def impatient(server: SumServer, clock: Clock | None = None, reconnect_timeout_s: float = 30) -> AsyncClient:
    """A client whose pauses between attempts, up to PAUSE_S, move a clock instead of taking time."""
    clock = clock or Clock()

    async def sleep(seconds: float) -> None:
        clock.now += seconds
        await asyncio.sleep(0)

    client = AsyncClient(server.target)
    client._settings = Settings(
        server.target,
        reconnect_timeout_s=reconnect_timeout_s,
        backoff=Backoff(limit_s=PAUSE_S),
        clock=clock,
        sleep=sleep,
    )
    return client


async def held_step(server: SumServer, session: AsyncSession) -> asyncio.Task[object]:
    """A step that has reached the server, which does not answer until it is released."""
    server.chunk_faults.append(Fault("held"))
    task: asyncio.Task[object] = asyncio.create_task(session.step(rows(1)))
    await server.held.get()
    return task
