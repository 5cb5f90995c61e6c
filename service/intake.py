"""Whether work is taken in, and how much of what was accepted has not ended.

Must not know what the work is. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio

from service.errors import Draining, Loading


class Intake:
    """The gate that every call passes.

    Attributes:
        ready: whether models and the sessions of an earlier process are there; calls before are told to come again.
        draining: once true, no new work is taken.
    """

    def __init__(self) -> None:
        self.ready = False
        self.draining = False
        self._working = 0
        self._rested = asyncio.Event()
        self._rested.set()

    def check_ready(self) -> None:
        """Refuse calls before everything is there.

        Raises:
            Loading: if it is not.
        """
        if not self.ready:
            raise Loading("the server is starting; try again in a moment")

    def check(self) -> None:
        """Refuse new work where none is taken.

        Raises:
            Loading, Draining: as their names say.
        """
        self.check_ready()
        if self.draining:
            raise Draining("the server is about to stop; go on elsewhere, or later")

    def count_in(self, count: int) -> None:
        """Note requests as accepted: ``rest`` waits for them."""
        self._working += count
        self._rested.clear()

    def count_out(self, count: int) -> None:
        """Note requests that were accepted as ended."""
        self._working -= count
        if not self._working:
            self._rested.set()

    async def rest(self) -> None:
        """Wait until nothing that was accepted is under way."""
        await self._rested.wait()
