"""Items of many callers, taken so that each gets the same share of steps. Pure; must not know ticks or time.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each caller has a virtual time that runs with the steps it was
given, and whoever is furthest behind is next. A caller that comes anew starts where those that wait are, so that nobody
saves up a share while away; one that comes back starts no earlier than where it was, so that what it was given counts.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")

_MOST_LEFT = 32
"""Of one caller's items, how many are offered in vain before the others' turn comes."""
_MOST_LEFT_OF_ALL = 256
"""How many are offered in vain before no more are: were thousands waiting, looking at each would take too long."""
_MOST_AWAY = 4096
"""Of how many callers that have nothing in the queue it is remembered what they were given."""


class _Line(Generic[Item]):
    __slots__ = ("caller", "items", "served")

    def __init__(self, caller: Hashable, served: int) -> None:
        self.caller = caller
        self.items: deque[Item] = deque()
        self.served = served

    def __lt__(self, other: _Line[Item]) -> bool:
        return self.served < other.served


class Fair(Generic[Item]):
    """A queue for many callers; items of one caller keep their order."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line[Item]] = {}
        self._served = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, caller: Hashable, item: Item) -> None:
        """Add an item behind the caller's others."""
        if not self._count:
            # Whoever was given what nobody else wanted owes nothing for it.
            self._lines.clear()
        self._line(caller).items.append(item)
        self._count += 1

    def put_back(self, caller: Hashable, item: Item, steps: int = 0) -> None:
        """Add an item in front of the caller's others.

        Args:
            caller: whose it is.
            item: that was taken.
            steps: that it was given and has not used.
        """
        line = self._lines.get(caller)
        if line is None or not steps:
            line = self._line(caller)
        else:
            line.served -= steps
        line.items.appendleft(item)
        self._count += 1

    def _line(self, caller: Hashable) -> _Line[Item]:
        line = self._lines.get(caller)
        if line is None:
            line = self._lines[caller] = _Line(caller, self._served)
        elif not line.items:
            line.served = max(line.served, self._served)
        return line

    def _forget(self) -> None:
        """Let go of callers that have nothing here and are not ahead of those that come anew."""
        away = [line for line in self._lines.values() if not line.items]
        surplus = len(away) - _MOST_AWAY
        for number, line in enumerate(away):
            if number < surplus or line.served <= self._served:
                del self._lines[line.caller]

    def take(self, give: Callable[[Item, int], tuple[int, int] | None], most: int) -> None:
        """Offer items, those of whoever is furthest behind first.

        Args:
            give: told an item and how many rows are left to give; says how many rows it takes and how many steps they
                are given together; no rows to drop it; None to leave it where it is.
            most: how many rows may be given.
        """
        self._forget()
        left: list[tuple[_Line[Item], list[Item]]] = []
        heap = [line for line in self._lines.values() if line.items]
        heapq.heapify(heap)
        taken = vain = 0
        try:
            while heap and taken < most and vain < _MOST_LEFT_OF_ALL:
                line = heap[0]
                aside: list[Item] = []
                left.append((line, aside))
                # As long as nobody is further behind there is no need to look at the others.
                bound = min((other.served for other in heap[1:3]), default=None)
                while line.items and taken < most and len(aside) < _MOST_LEFT:
                    if bound is not None and line.served > bound:
                        break
                    item = line.items[0]
                    given = give(item, most - taken)
                    # Not before: if ``give`` fails, nothing is lost.
                    line.items.popleft()
                    self._count -= 1
                    if given is None:
                        aside.append(item)
                    elif given[0]:
                        taken += given[0]
                        self._served = max(self._served, line.served)
                        line.served += given[1]
                vain += len(aside)
                if line.items and len(aside) < _MOST_LEFT:
                    heapq.heapreplace(heap, line)
                else:
                    heapq.heappop(heap)
        finally:
            for line, aside in reversed(left):
                line.items.extendleft(reversed(aside))
                self._count += len(aside)

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Take everything out that is not wanted."""
        for line in self._lines.values():
            line.items = deque(item for item in line.items if wanted(item))
        self._count = sum(len(line.items) for line in self._lines.values())
        self._forget()

    def drain(self) -> list[Item]:
        """Take everything out."""
        items = [item for line in self._lines.values() for item in line.items]
        self._lines.clear()
        self._count = 0
        return items
