"""Tells the log when a server is not in service, and when it is again: once for all who wait. Knows no channel.

The logger is called "conveyor". Where a program sets up no logging, Python writes these warnings to stderr.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("conveyor")


class Outage:
    """The time during which anybody waits for the server.

    Args:
        target: address of the server.
        patience_s: how long it is tried again.
        clock: monotonic seconds.
    """

    def __init__(self, target: str, patience_s: float, clock: Callable[[], float]) -> None:
        self._target = target
        self._patience_s = patience_s
        self._clock = clock
        self._waiting: set[object] = set()
        self._since = 0.0

    def begin(self, waiting: object, why: Exception) -> None:
        """Somebody waits from now on, or still does."""
        if not self._waiting:
            self._since = self._clock()
            log.warning(
                "%s is not in service, and is tried again for up to %g s: %s", self._target, self._patience_s, why
            )
        self._waiting.add(waiting)

    def end(self, *waited: object) -> None:
        """One of these was answered, if they waited at all: the server is back."""
        if self._waiting and not self._waiting.isdisjoint(waited):
            self._waiting.clear()
            log.warning("%s is in service again, after %.1f s", self._target, self._clock() - self._since)

    def leave(self, waiting: object) -> None:
        """Somebody does not wait any more; what is told of that is the error of their call."""
        self._waiting.discard(waiting)
