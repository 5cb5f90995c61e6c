"""When a model may be measured: while no other loads or is measured, as far as that can be waited for.

Owns who loads and who measures in this process. Must not know what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Turn:
    """Somebody's turn to measure.

    Attributes:
        alone: whether nobody else has loaded or measured during it so far.
    """

    alone: bool


class Quiet:
    """Loads go side by side, a measurement by itself; neither waits for long, since others may never end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._loads = 0
        self._turns: list[Turn] = []

    @contextmanager
    def loading(self, patience_s: float) -> Iterator[None]:
        """Load, after whoever measures, or beside them once so many seconds are over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._turns, patience_s)
            self._disturb()
            self._loads += 1
        try:
            yield
        finally:
            with self._changed:
                self._loads -= 1
                self._changed.notify_all()

    @contextmanager
    def measuring(self, patience_s: float) -> Iterator[Turn]:
        """Measure, after whoever loads or measures, or beside them once so many seconds are over."""
        with self._changed:
            turn = Turn(self._changed.wait_for(lambda: not self._loads and not self._turns, patience_s))
            self._disturb()
            self._turns.append(turn)
        try:
            yield turn
        finally:
            with self._changed:
                self._turns.remove(turn)
                self._changed.notify_all()

    def _disturb(self) -> None:
        for turn in self._turns:
            turn.alone = False
