"""State slots: where the states of sessions and of running batch rows live.

Owns one array a state, with a slot where the graph has a row: the batch axis keeps its place, so gathering is one
``take`` and scattering one assignment. Must not know sessions. Safe to call from any thread; a slot itself belongs to
one caller at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.errors import Full
from service.manifest import StateSpec
from service.values import from_text

Array = NDArray[np.generic]


def initial_value(spec: StateSpec) -> Array:
    """Return a state's initial value, in the spec's shape without the batch axis.

    Raises:
        ValueError: if the spec's bytes do not fill its shape.
    """
    if spec.initial is None:
        return np.zeros(spec.tail, spec.dtype)
    return from_text(spec.initial, spec.dtype, spec.tail)


class Pool:
    """The states of up to ``limit`` rows, in slots 0, 1, ..., growing by doubling.

    Args:
        specs: the states, in the order in which all lists of arrays here have them.
        limit: most slots that may be taken at once.
        capacity: slots to make room for at first.
    """

    def __init__(self, specs: Sequence[StateSpec], limit: int, capacity: int = 64) -> None:
        self.limit = limit
        self._axes = [spec.batch_axis for spec in specs]
        self._initial = [initial_value(spec) for spec in specs]
        self._lock = threading.Lock()
        self._capacity = min(capacity, limit)
        self._arrays = [
            np.zeros([self._capacity if size is None else size for size in spec.shape], spec.dtype) for spec in specs
        ]
        self._free = list(range(self._capacity - 1, -1, -1))

    @property
    def taken(self) -> int:
        """How many slots are in use."""
        return self._capacity - len(self._free)

    def allocate(self, states: Sequence[Array] | None = None) -> int:
        """Take a slot and fill it.

        Args:
            states: the value of each state, without the batch axis; None for the initial ones.

        Raises:
            Full: if ``limit`` slots are taken.
        """
        with self._lock:
            if not self._free:
                self._grow()
            slot = self._free.pop()
        try:
            self.write(slot, self._initial if states is None else states)
        except BaseException:
            self.free(slot)
            raise
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Nobody may use it afterwards."""
        with self._lock:
            self._free.append(slot)

    def read(self, slot: int) -> list[Array]:
        """Copy a slot's states out, each without the batch axis."""
        with self._lock:
            return [array.take(slot, axis) for array, axis in zip(self._arrays, self._axes, strict=True)]

    def write(self, slot: int, states: Sequence[Array]) -> None:
        """Set a slot's states, each given without the batch axis."""
        with self._lock:
            for array, axis, state in zip(self._arrays, self._axes, states, strict=True):
                array[_at(axis, slot)] = state

    def reset(self, slot: int) -> None:
        """Put a slot back to the initial states."""
        self.write(slot, self._initial)

    def gather(self, slots: NDArray[np.intp]) -> list[Array]:
        """Copy the states of N slots out, row n from ``slots[n]``, in the shapes that the graph takes."""
        with self._lock:
            return [array.take(slots, axis) for array, axis in zip(self._arrays, self._axes, strict=True)]

    def scatter(self, slots: NDArray[np.intp], rows: NDArray[np.intp], states: Sequence[Array]) -> None:
        """Copy row ``rows[k]`` of each state, as the graph gives them, into ``slots[k]``."""
        with self._lock:
            for array, axis, state in zip(self._arrays, self._axes, states, strict=True):
                array[_at(axis, slots)] = state if len(rows) == state.shape[axis] else state.take(rows, axis)

    def _grow(self) -> None:
        grown = min(2 * self._capacity, self.limit)
        if grown == self._capacity:
            raise Full(f"all {self.limit} state slots of the model are taken")
        more = grown - self._capacity
        arrays = []
        for array, axis in zip(self._arrays, self._axes, strict=True):
            room = list(array.shape)
            room[axis] = more
            arrays.append(np.concatenate([array, np.zeros(room, array.dtype)], axis))
        # All of them or, should memory run out, none.
        self._arrays = arrays
        self._free.extend(range(grown - 1, self._capacity - 1, -1))
        self._capacity = grown


def _at(axis: int, index: int | NDArray[np.intp]) -> tuple[slice | int | NDArray[np.intp], ...]:
    """Index one axis and leave those before it whole."""
    return (*(slice(None),) * axis, index)
