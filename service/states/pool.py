"""State slots: where the states of sessions and of running batch rows live.

Owns one array a state, with a slot where the graph has a row: the batch axis keeps its place, so gathering is one
``take`` and scattering one assignment. The arrays have address space for all slots from the beginning, and memory for
those that have been used: they grow without being copied, and shrink again when most slots have been given back. Must
not know sessions. Safe to call from any thread; a slot itself belongs to one caller at a time, so that only taking
slots and giving them back needs a lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.copying import FEW, HELD_BYTES, whole
from service.manifest import StateSpec
from service.states.memory import PAGE_BYTES, Reserved
from service.states.slots import Slots
from service.values import from_text

Array = NDArray[np.generic]

_SHELF_BYTES = 2 * PAGE_BYTES
_PORTION_BYTES = 1 << 20
"""As much memory goes back at once, while others wait for slots."""


def initial_value(spec: StateSpec) -> Array:
    """Return a state's initial value, in the spec's shape without the batch axis.

    Raises:
        ValueError: if the spec's bytes do not fill its shape.
    """
    if spec.initial is None:
        return np.zeros(spec.tail, spec.dtype)
    return from_text(spec.initial, spec.dtype, spec.tail)


class Pool:
    """The states of up to ``limit`` rows, in slots 0, 1, ....

    Attributes:
        in_flight: one tick at a time.

    Args:
        specs: the states, in the order in which all lists of arrays here have them.
        limit: most slots that may be taken at once.

    Raises:
        MemoryError: if there is no address space for so many.
    """

    in_flight = 1

    def __init__(self, specs: Sequence[StateSpec], limit: int) -> None:
        self.limit = limit
        self._kept = [_Kept(spec, limit) for spec in specs]
        self._initial = [initial_value(spec) for spec in specs]
        self._lock = threading.Lock()
        shelf = -(-_SHELF_BYTES // max((kept.row_bytes for kept in self._kept), default=_SHELF_BYTES))
        shelf_bytes = shelf * sum(kept.slot_bytes for kept in self._kept)
        self._slots = Slots(limit, shelf, spare=max(1, _PORTION_BYTES // max(1, shelf_bytes)))

    @property
    def taken(self) -> int:
        """How many slots are in use."""
        return self._slots.taken

    def settle_in(self) -> str:
        """There is nothing to do."""
        return ""

    def allocate(self, states: Sequence[Array] | int | None = None) -> int:
        """Take a slot and fill it.

        Args:
            states: the value of each state, without the batch axis, or the slot that has them; None for the initial
                ones.

        Raises:
            Full: if ``limit`` slots are taken.
        """
        with self._lock:
            (slot,) = self._slots.take(1)
        try:
            if isinstance(states, int):
                states = self.read(states)
            self.write(slot, self._initial if states is None else states)
        except BaseException:
            self.free(slot)
            raise
        return slot

    def allocate_many(self, count: int) -> NDArray[np.intp]:
        """Take slots, all or none, and fill them with the initial states.

        Raises:
            Full: if more than ``limit`` slots would be taken.
        """
        slots = self.reserve_many(count)
        for kept, initial in zip(self._kept, self._initial, strict=True):
            kept.array[kept.at(slots)] = np.expand_dims(initial, kept.axis)
        return slots

    def reserve_many(self, count: int) -> NDArray[np.intp]:
        """Take slots, all or none, to be scattered to before anything is read of them.

        Raises:
            Full: if more than ``limit`` slots would be taken.
        """
        with self._lock:
            return np.array(self._slots.take(count), np.intp)

    def free(self, slot: int) -> None:
        """Give a slot back. Nobody may use it afterwards."""
        self._put_back([slot])

    def free_many(self, slots: NDArray[np.intp]) -> None:
        """Give slots back. Nobody may use them afterwards."""
        self._put_back(slots.tolist())

    def read(self, slot: int) -> list[Array]:
        """Copy a slot's states out, each without the batch axis."""
        return [kept.array[kept.at(slot)].copy() for kept in self._kept]

    def read_many(self, slots: Sequence[int]) -> list[list[Array]]:
        """Copy the states of slots out, each without the batch axis."""
        return [self.read(slot) for slot in slots]

    def write(self, slot: int, states: Sequence[Array]) -> None:
        """Set a slot's states, each given without the batch axis."""
        for kept, state in zip(self._kept, states, strict=True):
            kept.array[kept.at(slot)] = state

    def reset(self, slot: int) -> None:
        """Put a slot back to the initial states."""
        self.write(slot, self._initial)

    def gather(self, slots: NDArray[np.intp], out: Sequence[Array] | None = None) -> Sequence[Array]:
        """Copy the states of N slots out, row n from ``slots[n]``, in the shapes that the graph takes.

        Args:
            slots: [N].
            out: arrays of those shapes, to copy into; None for new ones.

        Raises:
            IndexError: if there is no such slot.
        """
        if out is None:
            out = [kept.empty(len(slots)) for kept in self._kept]
        # NumPy would check, and copy twice for it. Seen as unsigned, what is negative is large.
        if slots.view(np.uintp).max(initial=0) >= self.limit:
            raise IndexError(f"slots {slots.min()} to {slots.max()} of a pool that has {self.limit}")
        for kept, array in zip(self._kept, out, strict=True):
            kept.gather(slots, array)
        return out

    def scatter(self, slots: NDArray[np.intp], rows: NDArray[np.intp], states: Sequence[Array]) -> None:
        """Copy row ``rows[k]`` of each state, as the graph gives them, into ``slots[k]``; ``rows`` ascends."""
        for kept, state in zip(self._kept, states, strict=True):
            kept.scatter(slots, state if len(rows) == state.shape[kept.axis] else state.take(rows, kept.axis))

    def abandon(self, states: Sequence[Array]) -> None:
        """End a tick that came to nothing: nothing has moved before ``scatter``."""

    def by_age(self, slots: Sequence[int]) -> list[int]:
        """Return the indices of slots from those that were taken first to those that were taken last."""
        return self._slots.by_age(slots)

    def _put_back(self, slots: list[int]) -> None:
        with self._lock:
            self._slots.put_back(slots)
            surplus = self._give_back()
        while surplus:
            # Others may have their turn in between.
            with self._lock:
                surplus = self._give_back()

    def _give_back(self) -> bool:
        """Give a portion of the memory back that is not needed; return whether there was any."""
        surplus = self._slots.surplus()
        for first, behind in surplus:
            for kept in self._kept:
                kept.give_back(first, behind)
        return bool(surplus)


class _Kept:
    """One state of all slots.

    Attributes:
        array: in the graph's axes.
        axis: where the slots are.
        row_bytes: of one slot, as far as they lie together.
        slot_bytes: of one slot.
    """

    def __init__(self, spec: StateSpec, slots: int) -> None:
        self.axis = spec.batch_axis
        shape = [slots if size is None else size for size in spec.shape]
        item_bytes = np.dtype(spec.dtype).itemsize
        self.row_bytes = math.prod(shape[self.axis + 1 :]) * item_bytes
        self.slot_bytes = math.prod(spec.tail) * item_bytes
        self._memory = Reserved(slots * self.slot_bytes)
        self._stride = slots * self.row_bytes
        self.array: Array = self._memory.bytes.view(spec.dtype).reshape(shape)
        # The same, each part of a slot that lies together as one element; how often there are all of them.
        self._row = whole(self.row_bytes)
        self._rows = self._memory.bytes.view(self._row)
        self._before, self._behind = tuple(shape[: self.axis]), tuple(shape[self.axis + 1 :])
        self._lines = math.prod(self._before)
        self._offsets = np.arange(self._lines, dtype=np.intp)[:, np.newaxis] * slots

    def at(self, index: int | NDArray[np.intp]) -> tuple[slice | int | NDArray[np.intp], ...]:
        """Index the slots and leave the axes before them whole."""
        return (*(slice(None),) * self.axis, index)

    def empty(self, rows: int) -> Array:
        """Make an array of so many rows, in the graph's axes."""
        shape = list(self.array.shape)
        shape[self.axis] = rows
        return np.empty(shape, self.array.dtype)

    def gather(self, slots: NDArray[np.intp], out: Array) -> None:
        """Copy the rows of slots, all of which there are, into an array in the graph's axes."""
        if self._few(slots, out):
            out.reshape(-1).view(self._row)[:] = self._rows[self._places(slots)]
        else:
            self.array.take(slots, self.axis, out, "clip")

    def scatter(self, slots: NDArray[np.intp], state: Array) -> None:
        """Copy an array in the graph's axes to where slots are."""
        if self._few(slots, state):
            self._rows[self._places(slots)] = state.reshape(-1).view(self._row)
        else:
            self.array[self.at(slots)] = state

    def _few(self, slots: NDArray[np.intp], array: Array) -> bool:
        """Whether rows are so few and small that whole ones should be copied, without others running in between."""
        return (
            self._lines * len(slots) <= FEW
            and array.nbytes <= HELD_BYTES
            and array.shape == (*self._before, len(slots), *self._behind)
            and array.dtype == self.array.dtype
            and array.flags.c_contiguous
        )

    def _places(self, slots: NDArray[np.intp]) -> NDArray[np.intp]:
        """Where the rows of slots are."""
        return slots if self._lines == 1 else (slots + self._offsets).reshape(-1)

    def give_back(self, first: int, behind: int) -> None:
        """Give back the memory of slots that nobody uses, as far as no other has a part of the same page."""
        for start in range(0, self.array.nbytes, self._stride):
            self._memory.give_back(start + first * self.row_bytes, start + behind * self.row_bytes)
