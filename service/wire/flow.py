"""A call that streams both ways: requests in, replies out, as they become ready.

Owns the order of reading and writing, and how much may be unanswered. Reading and writing go on side by side: what
finishes while a message is being written can leave together in the next one. When the call ends early, what it had not
been answered is given up. Must not know any door's messages.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from service.errors import Draining
from service.wire.malformed import Malformed
from service.wire.status import abort

_LONG_S = 0.005
"""How long a message is taken in before others have their turn."""


class Waiting(Protocol):
    """A part of a request that has not been answered."""

    def abandon(self) -> None:
        """Give it up: nobody is left to take the answer."""


class Message(Protocol):
    """What a door sends."""

    def ByteSize(self) -> int:
        """How large it is."""


Request = TypeVar("Request")
Part = TypeVar("Part")
Reply = TypeVar("Reply", bound=Message)


class Flow(ABC, Generic[Request, Part, Reply]):
    """One call. What a door's requests consist of, and what its replies are sent in, its own class says.

    Args:
        limit: most parts taken in whose reply is not written; over it the stream is not read.
        limit_bytes: most bytes of what waits to be answered or written; over it the stream is not read either.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        # What has not been answered, with the bytes that it holds and how many parts it counts as.
        self._waiting: dict[Waiting, tuple[int, int]] = {}
        self._parts = 0
        # What waits to be written, with its bytes and how many parts it answers.
        self._replies: deque[tuple[Reply, int, int]] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._ending = False

    @abstractmethod
    def parts(self, request: Request) -> Iterable[Part]:
        """Take a message apart into what is answered one by one."""

    @abstractmethod
    def accept(self, part: Part) -> None:
        """Take one part in: ``put`` its reply, now or later; ``wait`` until then."""

    @abstractmethod
    def message(self) -> Message:
        """Make the next message of replies, by ``take``; there is at least one."""

    def wait(self, waiting: Waiting, size: int = 0, count: int = 1) -> None:
        """Note what has not been answered.

        Args:
            waiting: it.
            size: bytes that it holds, or that its reply will if they are more.
            count: as how many parts it counts.
        """
        self._waiting[waiting] = size, count
        self._bytes += size
        self._parts += count

    def grow(self, waiting: Waiting, size: int) -> None:
        """Note that it holds so many bytes, if they are more than were known."""
        known, count = self._waiting[waiting]
        more = max(0, size - known)
        self._waiting[waiting] = known + more, count
        self._bytes += more

    def answered(self, waiting: Waiting) -> None:
        """Note that it has."""
        size, count = self._waiting.pop(waiting)
        self._bytes -= size
        self._parts -= count

    def put(self, reply: Reply, count: int = 1) -> None:
        """Have a reply written, to so many parts."""
        size = reply.ByteSize()
        self._replies.append((reply, size, count))
        self._bytes += size
        self._parts += count
        self._wake.set()

    def take(self, most: int | None = None) -> tuple[Reply, int] | None:
        """Take the next reply, with its size, to be written.

        Args:
            most: bytes that it may have; None for any number.

        Returns:
            None if there is none, or none so small.
        """
        if not self._replies or (most is not None and self._replies[0][1] > most):
            return None
        reply, size, count = self._replies.popleft()
        self._bytes -= size
        self._parts -= count
        return reply, size

    async def run(
        self, requests: AsyncIterable[Request | Malformed], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Serve the call until the client half-closes and all is answered, or it goes away, or ``end`` is called."""
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            await self._write(reader, context)
            if self._ending:
                await abort(context, Draining("the server is about to stop; go on elsewhere, or later"))
            try:
                await reader
            except Exception as error:
                await abort(context, error)
        finally:
            reader.cancel()
            # The newest first: giving up what waits behind something must not be preceded by its turn.
            for waiting in reversed(list(self._waiting)):
                waiting.abandon()
            # Nobody reads them any more: do not hold them until the collector comes by.
            self._waiting.clear()
            self._replies.clear()

    def end(self) -> None:
        """Answer what was taken in, then end the call."""
        self._ending = True
        self._wake.set()

    async def _read(self, requests: AsyncIterable[Request | Malformed]) -> None:
        now = asyncio.get_running_loop().time
        async for request in requests:
            if isinstance(request, Malformed):
                raise request.error
            began = now()
            for part in self.parts(request):
                while self._parts >= self._limit or self._bytes >= self._limit_bytes:
                    self._room.clear()
                    await self._room.wait()
                self.accept(part)
                # A message may have many, and those that are answered at once wait for nobody.
                if now() - began > _LONG_S:
                    await asyncio.sleep(0)
                    began = now()

    async def _write(self, reader: asyncio.Task[None], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            if self._replies:
                message = self.message()
                self._room.set()
                await context.write(message)
            elif not self._waiting and (reader.done() or self._ending):
                return
            else:
                self._wake.clear()
                await self._wake.wait()
