"""A bell by which threads wake one that waits.

Owns what depends on the system: on Linux a counter in the kernel, elsewhere a pipe. Python's own conditions
do the same at several times the cost: a waiter first takes a lock of its own, and once woken waits for the
interpreter's beside whoever woke it, with a timer.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys

_ONE = (1).to_bytes(8, sys.byteorder)
"""What is added to the counter."""
_LONGEST_S = 3600.0
"""More milliseconds than an int holds cannot be waited for."""


class Bell:
    """Rung by any thread, waited for by one. Rings that nobody has waited for yet count as one ring."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._hears = self._rings = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._hears, self._rings = os.pipe()
            os.set_blocking(self._hears, False)
            os.set_blocking(self._rings, False)
        self._poll = select.poll()
        self._poll.register(self._hears, select.POLLIN)

    def ring(self) -> None:
        """Wake whoever waits, or else who waits next."""
        # A bell that cannot take more rings already.
        with contextlib.suppress(BlockingIOError):
            os.write(self._rings, _ONE)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for a ring; at most so many seconds, or an hour if they are more."""
        if self._poll.poll(None if seconds is None else min(seconds, _LONGEST_S) * 1e3):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.read(self._hears, 1 << 16)

    def __del__(self) -> None:
        # Not before: what is closed may be something else's by the time that somebody rings.
        for end in {self._hears, self._rings}:
            os.close(end)
