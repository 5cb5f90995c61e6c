"""State slots on a device: where the states of sessions and of running batch rows live, when runs go on there.

Owns a buffer a state, and which place of it each slot's states lie in. Must not know sessions, graphs or onnxruntime.
Safe to call from any thread; a slot itself belongs to one caller at a time.

A tick reads each row's states from the place where they lie and writes them to another, so that nothing has moved
until ``scatter`` says that the slot is over there: what fails or is given up leaves no trace, and no state crosses
between device and host. One place holds the initial states, of every slot that has no others yet; what nobody wants
to keep is written to another.

What is copied for somebody waits for no run: no tick under way writes where a slot's states lie, nor has to do with a
place that is free. It goes in the stream of what goes up for ticks, so that each of them comes after what was copied
before it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import LoadError
from service.manifest import StateSpec
from service.states.device import Buffer, Device, Mark
from service.states.pool import initial_value
from service.states.slots import Slots

Array = NDArray[Any]
Places = NDArray[np.int32]

INITIAL, UNWANTED = 0, 1
"""The place of the initial states, and the one that is never read."""
_RESERVED = 2


class Moves:
    """Between which places the states of a tick's rows go.

    Attributes:
        before: [N], where they are read from.
        after: [N], where they are written to.
        between: [N], where they may lie meanwhile; None in a tick of one run.
    """

    def __init__(self, before: Places, after: Places, between: Places | None = None) -> None:
        self.before = before
        self.after = after
        self.between = between


class ResidentPool:
    """The states of up to ``limit`` rows, in slots 0, 1, ....

    Attributes:
        in_flight: how many ticks may be under way at once.
        buffers: one a state, [S, R]: its places, and the values of a row.
        copied: bytes of states that were copied to the device, ``up``, and from it, ``down``, at somebody's wish.

    Args:
        specs: the states, in the order in which all lists of arrays here have them.
        limit: most slots that may be taken at once.
        moving: most places that ticks under way write to.
        device: where they live.
        in_flight: most ticks under way.
        count: told of each copy, with its direction and its bytes.
        settle_in: what there is to do once, in the thread in which its ticks run.

    Raises:
        LoadError: if the device has no memory for so many.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        limit: int,
        moving: int,
        device: Device,
        in_flight: int = 1,
        count: Callable[[str, int], None] = lambda direction, size: None,
        settle_in: Callable[[ResidentPool], str] = lambda pool: "",
    ) -> None:
        self.limit = limit
        self.in_flight = in_flight
        self.copied: Counter[str] = Counter()
        self._count = count
        self._settle_in = settle_in
        self._specs = specs
        self._device = device
        places = limit + moving + _RESERVED
        self.buffers = self._take_memory(places)
        self._initial = [initial_value(spec) for spec in specs]
        self._going_up: list[tuple[Mark, list[Array]]] = []
        self._lock = threading.Lock()
        self._slots = Slots(limit, shelf=limit, spare=limit)
        self._place: Places = np.zeros(limit, np.int32)
        # A stack, of which the first ``_free`` are free.
        self._stack: Places = np.arange(places - 1, _RESERVED - 1, -1, dtype=np.int32)
        self._free = len(self._stack)
        for buffer, initial in zip(self.buffers, self._initial, strict=True):
            device.ahead.upload(initial, buffer.row(INITIAL))
        device.ahead.mark().wait()

    @property
    def taken(self) -> int:
        """How many slots are in use."""
        return self._slots.taken

    @property
    def free_places(self) -> int:
        """How many places hold nothing that anybody needs."""
        return self._free

    def settle_in(self) -> str:
        """Do once what there is to do in the thread in which ticks run, and return what has come of it, for people.

        Before there are others: their runs would be captured too.
        """
        return self._settle_in(self)

    def allocate(self, states: Sequence[Array] | int | None = None) -> int:
        """Take a slot.

        Args:
            states: the value of each state, without the batch axis, or the slot that has them, which are copied on the
                device; None for the initial ones, which costs no copy.

        Raises:
            Full: if ``limit`` slots are taken.
        """
        with self._lock:
            (slot,) = self._slots.take(1)
            self._place[slot] = INITIAL
        if states is not None:
            try:
                if isinstance(states, int):
                    self._copy(states, slot)
                else:
                    self.write(slot, states)
            except BaseException:
                self.free(slot)
                raise
        return slot

    def allocate_many(self, count: int) -> NDArray[np.intp]:
        """Take slots, all or none, with the initial states.

        Raises:
            Full: if more than ``limit`` slots would be taken.
        """
        with self._lock:
            slots = np.array(self._slots.take(count), np.intp)
            self._place[slots] = INITIAL
        return slots

    def reserve_many(self, count: int) -> NDArray[np.intp]:
        """The same: the initial states cost nothing here."""
        return self.allocate_many(count)

    def free(self, slot: int) -> None:
        """Give a slot back. Nobody may use it afterwards."""
        self.free_many(np.array([slot], np.intp))

    def free_many(self, slots: NDArray[np.intp]) -> None:
        """Give slots back. Nobody may use them afterwards."""
        with self._lock:
            self._give_back(self._place[slots])
            self._slots.put_back(slots.tolist())

    def read(self, slot: int) -> list[Array]:
        """Copy a slot's states out, each without the batch axis."""
        return self.read_many([slot])[0]

    def read_many(self, slots: Sequence[int]) -> list[list[Array]]:
        """Copy the states of slots out, each without the batch axis."""
        states = self.peek_many(slots)
        moved = [of_slot for slot, of_slot in zip(slots, states, strict=True) if self._place[slot] != INITIAL]
        if moved:
            self._tell("down", [state for of_slot in moved for state in of_slot])
        return states

    def peek_many(self, slots: Sequence[int]) -> list[list[Array]]:
        """Copy the states of slots out for one's own purposes, which are not counted."""
        found: list[list[Array]] = []
        copied = False
        for slot in slots:
            place = int(self._place[slot])
            states = [initial.copy() for initial in self._initial]
            found.append(states)
            if place != INITIAL:
                for buffer, state in zip(self.buffers, states, strict=True):
                    self._device.ahead.download(buffer.row(place), state)
                copied = True
        if copied:
            # Once for all of them.
            self._device.ahead.mark().wait()
        return found

    def write(self, slot: int, states: Sequence[Array]) -> None:
        """Set a slot's states, each given without the batch axis."""
        given = [
            np.array(state, spec.dtype).reshape(spec.tail) for state, spec in zip(states, self._specs, strict=True)
        ]
        place = self._own_place(slot)
        for buffer, state in zip(self.buffers, given, strict=True):
            self._device.ahead.upload(state, buffer.row(place))
        # What is copied from has to stay till then; nobody waits for it.
        mark = self._device.ahead.mark()
        with self._lock:
            self._let_go()
            self._going_up.append((mark, given))
        self._tell("up", given)

    def _copy(self, source: int, slot: int) -> None:
        """Give a slot the states that another has."""
        if self._place[source] == INITIAL:
            return
        there, here = int(self._place[source]), self._own_place(slot)
        for buffer in self.buffers:
            self._device.ahead.copy(buffer.row(there), buffer.row(here))

    def _let_go(self) -> None:
        """Hold no longer what has arrived."""
        if self._going_up:
            self._going_up = [one for one in self._going_up if not one[0].done]

    def _own_place(self, slot: int) -> int:
        """The place that a slot's states can be written to."""
        with self._lock:
            if self._place[slot] == INITIAL:
                self._place[slot] = self._take(1)[0]
            return int(self._place[slot])

    def reset(self, slot: int) -> None:
        """Put a slot back to the initial states."""
        with self._lock:
            self._give_back(self._place[slot : slot + 1])
            self._place[slot] = INITIAL

    def gather(self, slots: NDArray[np.intp], out: Moves) -> Moves:
        """Say where a tick's rows read their states, and where they write them; ``scatter`` or ``abandon`` ends that.

        Args:
            slots: [N].
            out: to be filled; where it has more than N rows, those after them read the initial states and write what
                nobody keeps.
        """
        rows = len(slots)
        with self._lock:
            self._let_go()
            out.before[:rows] = self._place[slots]
            out.after[:rows] = self._take(rows)
            if out.between is not None:
                out.between[:rows] = self._take(rows)
        out.before[rows:] = INITIAL
        out.after[rows:] = UNWANTED
        if out.between is not None:
            out.between[rows:] = UNWANTED
        return out

    def scatter(self, slots: NDArray[np.intp], rows: NDArray[np.intp], states: Moves) -> None:
        """End a tick whose run succeeded: the states of ``slots[k]`` are now those of row ``rows[k]``."""
        with self._lock:
            kept = states.after[rows]
            self._give_back(self._place[slots])
            self._place[slots] = kept
            self._give_back(np.delete(states.after, rows))
            if states.between is not None:
                self._give_back(states.between)

    def abandon(self, states: Moves) -> None:
        """End a tick whose run came to nothing: every slot is where it was."""
        with self._lock:
            self._give_back(states.after)
            if states.between is not None:
                self._give_back(states.between)

    def by_age(self, slots: Sequence[int]) -> list[int]:
        """Return the indices of slots from those that were taken first to those that were taken last."""
        return self._slots.by_age(slots)

    def _take(self, count: int) -> Places:
        """Take places. There are enough: one for each slot, and for each row of the ticks under way."""
        if count > self._free:
            raise RuntimeError(f"{count} places for states are wanted and {self._free} are free")
        self._free -= count
        return self._stack[self._free : self._free + count].copy()

    def _give_back(self, places: Places) -> None:
        places = places[places >= _RESERVED]
        self._stack[self._free : self._free + len(places)] = places
        self._free += len(places)

    def _take_memory(self, places: int) -> list[Buffer]:
        sizes = [math.prod(spec.tail) for spec in self._specs]
        needed = places * sum(
            size * np.dtype(spec.dtype).itemsize for size, spec in zip(sizes, self._specs, strict=True)
        )
        free, _ = self._device.memory()
        try:
            if needed > free:
                raise MemoryError
            return [
                self._device.empty((places, size), spec.dtype) for size, spec in zip(sizes, self._specs, strict=True)
            ]
        except MemoryError as error:
            raise LoadError(
                f"the states of {places} rows take {needed} bytes on the device, where {free} are free: fewer sessions "
                "(--max-sessions), rows waiting (--max-queued-rows) or rows in a tick (--max-tick-rows) take less"
            ) from error

    def _tell(self, direction: str, states: Sequence[Array]) -> None:
        size = sum(state.nbytes for state in states)
        self.copied[direction] += size
        self._count(direction, size)
