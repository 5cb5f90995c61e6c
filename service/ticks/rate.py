"""How many things happen a second, told from the last few. Pure: the time is handed in. Must not know what happens."""

from __future__ import annotations

import math


class Rate:
    """A count that fades away.

    Args:
        memory_s: how long about what has happened counts.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._count = 0.0
        self._at = 0.0

    def note(self, count: int, now: float) -> None:
        """Count what happens now."""
        self._count = self._left(now) + count
        self._at = now

    def per_s(self, now: float) -> float:
        """How many there have been a second, those that happened longer ago counting for less."""
        return self._left(now) / self._memory_s

    def _left(self, now: float) -> float:
        return self._count * math.exp((self._at - now) / self._memory_s) if self._count else 0.0
