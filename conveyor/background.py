"""One event loop for all blocking clients of a process, in a thread of its own. Knows neither gRPC nor sessions.

One, and never closed before the process ends: gRPC hands the events of all loops to any of them, and complains when the
loop of one is closed.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from conveyor.errors import ConnectionLost, InvalidRequest

Result = TypeVar("Result")
Farewell = Callable[[], Coroutine[Any, Any, None]]

_WAIT_S = 5.0
"""How long a farewell is waited for; it takes milliseconds unless something is wrong."""


class Background:
    """Runs coroutines for any number of threads. Made by ``shared``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._farewells: dict[object, Farewell] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="conveyor", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine to its end; an interrupt here cancels it there.

        Raises:
            InvalidRequest: this process is a fork of the one in which the thread is, or is about to end.
        """
        if os.getpid() != self._process or self._stopped:
            coroutine.close()
            raise InvalidRequest("this client was made before a fork, or the process ends; each process needs its own")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ConnectionLost("the process ended during the call") from None
        except BaseException:
            if future.cancel():
                # Back from here, the coroutine must not begin anything any more: wait until it has been told.
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_WAIT_S)
            raise

    def enter(self, farewell: Farewell) -> object:
        """Registers a coroutine function to be called once: by ``leave``, or when the process ends."""
        token = object()
        self._farewells[token] = farewell
        return token

    def leave(self, token: object, *, wait: bool = True) -> None:
        """Calls the farewell; does nothing a second time, or after a fork."""
        farewell = self._farewells.pop(token, None)
        if farewell is None or os.getpid() != self._process:
            return
        future = asyncio.run_coroutine_threadsafe(farewell(), self._loop)
        if wait:
            with contextlib.suppress(TimeoutError):
                future.result(_WAIT_S)

    def _stop(self) -> None:
        if os.getpid() != self._process:
            return
        for token in list(self._farewells):
            self.leave(token)
        self._stopped = True
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
