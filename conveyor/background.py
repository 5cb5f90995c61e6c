"""An event loop in a thread of its own, in which a blocking client runs the asyncio one. Knows no gRPC."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from conveyor.errors import InvalidRequest

Result = TypeVar("Result")

_STOP_S = 5.0
"""How long stopping may take before the thread is left to die with the process."""


class Background:
    """Runs coroutines for any number of threads until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._stopped = False
        # Whatever was handed over before the stop is known to the loop when it stops, so that nobody waits forever.
        self._hand_over = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="conveyor", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine to its end; an interrupt here cancels it there.

        Raises:
            InvalidRequest: it was stopped, or this process is a fork of the one in which it was made.
        """
        if os.getpid() != self._process:
            coroutine.close()
            raise InvalidRequest("the client was made before a fork; each process needs one of its own")
        with self._hand_over:
            if self._stopped:
                coroutine.close()
                raise InvalidRequest("the client has been closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                # Back from here, the coroutine must not begin anything any more: wait until it has been told.
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_STOP_S)
            raise

    def stop(self, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs one last coroutine, cancels all others and ends the thread; does nothing twice, or after a fork."""
        if os.getpid() != self._process:
            return
        with self._hand_over:
            if self._stopped:
                return
            self._stopped = True
            asyncio.run_coroutine_threadsafe(self._finish(farewell), self._loop)
        # The garbage collector may call from the thread itself.
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOP_S)

    async def _finish(self, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await farewell()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        finally:
            self._loop.call_soon(self._loop.stop)

    def _main(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
