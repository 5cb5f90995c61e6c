"""Streams images to a server row by row, each as a session, many at a time.

Owns the client's side and its stopwatch. Must not know what the answers mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conveyor import AsyncClient, AsyncSession

SESSIONS = 64
"""Sessions open at a time."""


@dataclass(frozen=True)
class Streamed:
    """What came back.

    Attributes:
        outputs: ``[N, T, O]``.
        states: each session's state after its last row, by name, ``[N, L, H]``.
        latencies_s: seconds from a row's sending to its reply, ``[N, T]``.
        seconds: in which rows were under way; opening the sessions, reading their states and closing them is left out.
    """

    outputs: NDArray[np.float32]
    states: dict[str, NDArray[np.float32]]
    latencies_s: NDArray[np.float64]
    seconds: float


async def stream(target: str, model: str, images: NDArray[np.float32], each_image: Callable[[], None]) -> Streamed:
    """Streams every image through a session of its own; a row is sent when the one before it has been answered.

    Args:
        target: the server's address.
        model: name of the model.
        images: ``[N, T, I]``.
        each_image: called when an image is through.
    """
    outputs: list[list[NDArray[np.float32]]] = [[] for _ in images]
    states: list[dict[str, NDArray[np.float32]]] = []
    latencies_s = np.zeros(images.shape[:2])
    seconds = 0.0

    async def step_through(session: AsyncSession, index: int) -> None:
        for t, row in enumerate(images[index]):
            began = time.perf_counter()
            outputs[index].append(np.asarray(await session.step(row)))
            latencies_s[index, t] = time.perf_counter() - began
        each_image()

    async with AsyncClient(target) as client:
        for start in range(0, len(images), SESSIONS):
            indices = range(start, min(start + SESSIONS, len(images)))
            sessions = await asyncio.gather(*(client.session(model) for _ in indices))
            began = time.perf_counter()
            await asyncio.gather(*map(step_through, sessions, indices))
            seconds += time.perf_counter() - began
            states += [state.states for state in await asyncio.gather(*(session.export() for session in sessions))]
            await asyncio.gather(*(session.close() for session in sessions))
    by_name = {name: np.stack([state[name] for state in states]) for name in states[0]}
    return Streamed(np.array(outputs), by_name, latencies_s, seconds)
