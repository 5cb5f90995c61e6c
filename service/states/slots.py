"""Which slots are taken, and which of them no longer need their memory.

Owns numbers alone. The lowest free slot goes first, so that those in use stay together and whole stretches of others
become idle. Must not know what lies in a slot. Not safe to call from several threads at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from service.errors import Full


class Slots:
    """The slots 0, 1, ..., of which shelves of several beside each other share their memory.

    No call takes longer because more slots are in use.

    Attributes:
        taken: how many are in use.

    Args:
        limit: most that may be taken at once.
        shelf: slots on one shelf.
        spare: how many idle shelves keep their memory however few are in use, and how many lose it at once.
    """

    def __init__(self, limit: int, shelf: int, spare: int) -> None:
        self.taken = 0
        self._limit = limit
        self._shelf = shelf
        self._spare = spare
        self._free: list[int] = []
        self._takes = 0
        # Memory only for those that have been taken.
        self._taken_as = np.zeros(limit, np.int64)
        self._fresh = 0
        """Slots from here on have never been taken."""
        self._busy: dict[int, int] = {}
        """How many slots are in use, of each shelf that has any."""
        self._idle: set[int] = set()
        """Shelves without any that have memory still."""

    def take(self, count: int) -> list[int]:
        """Take slots, all or none.

        Raises:
            Full: if more than ``limit`` would be taken.
        """
        if self.taken + count > self._limit:
            raise Full(f"all {self._limit} state slots of the model are taken")
        slots = []
        for _ in range(count):
            if self._free:
                slot = heapq.heappop(self._free)
            else:
                slot = self._fresh
                self._fresh += 1
            shelf = slot // self._shelf
            self._busy[shelf] = self._busy.get(shelf, 0) + 1
            self._idle.discard(shelf)
            self._takes += 1
            self._taken_as[slot] = self._takes
            slots.append(slot)
        self.taken += count
        return slots

    def put_back(self, slots: Iterable[int]) -> None:
        """Give slots back."""
        for slot in slots:
            heapq.heappush(self._free, slot)
            self.taken -= 1
            shelf = slot // self._shelf
            self._busy[shelf] -= 1
            if not self._busy[shelf]:
                del self._busy[shelf]
                self._idle.add(shelf)

    def by_age(self, slots: Sequence[int]) -> list[int]:
        """Return the indices of slots from those that were taken first to those that were taken last."""
        order: list[int] = self._taken_as[list(slots)].argsort().tolist()
        return order

    def surplus(self) -> list[tuple[int, int]]:
        """Say which slots need no memory, if many do not.

        Returns:
            Ranges of slots that are not in use, first and behind the last; their memory is to be given back before the
            next ``take``. None while no more shelves are idle than in use.
        """
        # More than that by twice what is spared: what comes and goes all the time should not lose its memory each time,
        # and what goes should go in few pieces.
        if len(self._idle) <= 2 * self._spare + len(self._busy):
            return []
        runs: list[list[int]] = []
        for shelf in sorted(self._idle.pop() for _ in range(self._spare)):
            if runs and runs[-1][1] == shelf:
                runs[-1][1] += 1
            else:
                runs.append([shelf, shelf + 1])
        return [self._range(*run) for run in runs]

    def _range(self, first: int, behind: int) -> tuple[int, int]:
        """The slots of some shelves that lie together, and of the neighbours that are not in use.

        A page may belong to two shelves, and only goes when both do.
        """
        first -= first > 0 and first - 1 not in self._busy
        behind += behind not in self._busy
        return first * self._shelf, min(behind * self._shelf, self._limit)
