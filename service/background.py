"""Calls in threads that nobody has to wait for. Must not know what they do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Make a call in a thread of its own.

    asyncio's own threads are waited for when the loop ends: loading a large model, or a disk that has gone, would hold
    the process. This one is left behind.

    Returns:
        What the call gives, on the running loop; cancelling it lets the call go on for nobody.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def give(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def work() -> None:
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            try:
                result = call(*args, **kwargs)
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(give, result)

    threading.Thread(target=work, name=f"background-{call.__name__}", daemon=True).start()
    return future
