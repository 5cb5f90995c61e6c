"""A clock that stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """Tells a time that only the test changes.

    Attributes:
        now: the time, in seconds.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now
