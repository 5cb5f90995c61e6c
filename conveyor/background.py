"""One event loop for all blocking clients of a process, in a thread of its own. Knows neither gRPC nor sessions.

One, and never closed before the process ends: gRPC hands the events of all loops to any of them, and complains when the
loop of one is closed.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from conveyor.errors import InvalidRequest

Result = TypeVar("Result")

_WAIT_S = 5.0
"""How long the thread is waited for; it takes milliseconds unless something is wrong."""


class Background:
    """Runs coroutines for any number of threads. Made by ``shared``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="conveyor", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    @property
    def alive(self) -> bool:
        """Whether there is a thread to run anything: not in a fork of its process, nor when that is about to end."""
        return os.getpid() == self._process and not self._stopped

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine to its end; an interrupt here cancels it there.

        Raises:
            InvalidRequest: there is no thread to run it any more.
        """
        if not self.alive:
            coroutine.close()
            raise InvalidRequest("this client was made before a fork, or the process ends; each process needs its own")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                # Back from here, the coroutine must not begin anything any more: wait until it has been told.
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_WAIT_S)
            raise

    def post(self, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs one last coroutine for somebody, and waits for nothing; nobody hears of its errors."""
        if self.alive:
            asyncio.run_coroutine_threadsafe(farewell(), self._loop)

    def _stop(self) -> None:
        if self.alive:
            self._stopped = True
            # What is still under way ends with the process, and asyncio need not complain of that.
            self._loop.set_exception_handler(lambda loop, context: None)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_WAIT_S)


_lock = threading.Lock()
_shared: Background | None = None


def shared() -> Background:
    """The background of this process; a forked process gets another."""
    global _shared
    with _lock:
        if _shared is None or _shared._process != os.getpid():
            _shared = Background()
        return _shared
