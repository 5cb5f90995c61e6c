"""A chunk on its way, and whoever waits for it. Must not know how it travels."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from conveyor.chunks import Chunks, Results
from conveyor.errors import ConveyorError


@dataclass(eq=False)
class Flight:
    """A chunk on its way, from its submission to its end.

    Attributes:
        chunks: it is one of these.
        row: which of them.
        session_id: of its session.
        position: at which it starts.
        epoch: for which life of the session it is meant.
        deadline: on the client's clock.
        abandoned: nobody waits any more. Sent again, the chunk then asks what became of it rather than to be applied.
        lost: a copy of it went out on a connection that broke since, and may have been applied.
        alone: it goes in no block any more.
        refused_at: when the server first said that it cannot take it now; None if it has not.
        refusals: how often it said so.
        size_bytes: the most that it takes in a message.
        ended: whether one of the following is known.
        results: what the server gave, if the chunk was applied; ``place`` says where among them.
        error: the server's word that it was not.
        failure: with which the stream gave up, so that the server's word is not known.
    """

    chunks: Chunks
    row: int
    session_id: str
    position: int
    epoch: int
    deadline: float
    abandoned: bool = False
    lost: bool = False
    alone: bool = field(default=False, init=False)
    refused_at: float | None = field(default=None, init=False)
    refusals: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)
    results: Results | None = field(default=None, init=False)
    place: int = field(default=0, init=False)
    error: ConveyorError | None = field(default=None, init=False)
    failure: ConveyorError | None = field(default=None, init=False)
    _awaited: _Awaited | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.size_bytes = self.chunks.chunk_bytes + len(self.session_id)

    def again(self, deadline: float) -> Flight:
        """The same chunk, to ask what became of it."""
        row = (self.chunks, self.row, self.session_id, self.position, self.epoch)
        return Flight(*row, deadline, abandoned=True, lost=True)

    def end(
        self,
        results: Results | None = None,
        place: int = 0,
        error: ConveyorError | None = None,
        failure: ConveyorError | None = None,
    ) -> None:
        """Notes how it ended, and tells whoever waits."""
        self.ended = True
        self.results = results
        self.place = place
        self.error = error
        self.failure = failure
        if self._awaited is not None:
            self._awaited.count -= 1
            if not self._awaited.count:
                self._awaited.all_ended.set()


@dataclass(eq=False, slots=True)
class _Awaited:
    """Chunks that somebody waits for together: how many have not ended."""

    count: int
    all_ended: asyncio.Event


async def wait(flights: Sequence[Flight], timeout_s: float) -> None:
    """Waits until all have ended; what has not when the wait ends, however it ends, is abandoned."""
    under_way = [flight for flight in flights if not flight.ended]
    if not under_way:
        return
    awaited = _Awaited(len(under_way), asyncio.Event())
    for flight in under_way:
        flight._awaited = awaited
    try:
        async with asyncio.timeout(timeout_s):
            await awaited.all_ended.wait()
    except TimeoutError:
        pass
    finally:
        if awaited.count:
            for flight in under_way:
                flight.abandoned |= not flight.ended
