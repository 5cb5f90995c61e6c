"""How far the benchmark is: what it does now, how long it has taken, about how long is left. Knows nothing of what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status


class Progress:
    """A line at the terminal's foot; without a terminal, a line for each stage.

    Args:
        console: where to.
        expected_s: how long everything should take.
        clock: tells the time, in seconds.
    """

    def __init__(self, console: Console, expected_s: float, clock: Callable[[], float]) -> None:
        self._console = console
        self._left_s = expected_s
        self._clock = clock
        self._began = clock()
        self._expected_so_far_s = 0.0
        self._status: Status | None = None

    @contextmanager
    def stage(self, title: str, expected_s: float) -> Iterator[None]:
        """What is done inside is one stage, which should take so long."""
        if self._console.is_terminal:
            with self._console.status(self._head() + title) as self._status:
                yield
        else:
            self._console.print(self._head() + title)
            yield
        self._status = None
        self._left_s -= expected_s
        self._expected_so_far_s += expected_s

    def say(self, text: str) -> None:
        """What is done now."""
        if self._status is not None:
            self._status.update(self._head() + text)

    def elapsed_s(self) -> float:
        """How long it has taken so far."""
        return self._clock() - self._began

    def _head(self) -> str:
        elapsed_s = self.elapsed_s()
        # Stages that have ended tell how well this machine does what was expected of it.
        pace = elapsed_s / self._expected_so_far_s if self._expected_so_far_s > 20 else 1.0
        return f"{_minutes(elapsed_s)} gone, about {_minutes(self._left_s * pace)} left  "


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
