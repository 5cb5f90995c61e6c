"""State slots on a device, held against a plain dict of what each slot should hold."""

from __future__ import annotations

import random
from collections import Counter
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import Full, LoadError
from service.states.device import Buffer, HostDevice, HostStream, Mark
from service.states.resident_pool import INITIAL, UNWANTED, Moves, ResidentPool
from tests.unit.service.states.test_pool import spec

DEVICE = HostDevice()
STATES = [spec((None, 3), initial=np.array([1, 2, 3], np.float32)), spec((2, None), "float64")]


def moves(rows: int, between: bool = False) -> Moves:
    """Room for a tick of so many rows."""
    return Moves(*(np.full(rows, -1, np.int32) for _ in range(3 if between else 2)))


def slots(*numbers: int) -> NDArray[np.intp]:
    """Slots, or rows, as gather and scatter take them."""
    return np.array(numbers, np.intp)


def run(pool: ResidentPool, tick: Moves, add: float) -> None:
    """What a graph does: each row's states go from one place to the other, with something added."""
    for buffer in pool.buffers:
        values = np.empty(buffer.shape, buffer.dtype)
        DEVICE.ahead.download(buffer, values)
        values[tick.after] = values[tick.before] + add
        DEVICE.ahead.upload(values, buffer)


def value(pool: ResidentPool, slot: int) -> list[list[float]]:
    """A slot's states."""
    return [state.tolist() for state in pool.read(slot)]


@pytest.fixture
def pool() -> ResidentPool:
    """Of ten slots, and ticks of four rows, two at a time."""
    return ResidentPool(STATES, 10, 8, DEVICE, in_flight=2)


def test_a_slot_begins_in_the_initial_states(pool: ResidentPool) -> None:
    """Without a copy, and whatever was in it before."""
    slot = pool.allocate()
    assert value(pool, slot) == [[1, 2, 3], [0, 0]]
    pool.write(slot, [np.ones(3, np.float32), np.ones(2)])
    pool.free(slot)
    assert pool.allocate() == slot
    assert value(pool, slot) == [[1, 2, 3], [0, 0]]
    assert pool.copied == {"up": 28}


def test_states_move_when_the_tick_has_succeeded(pool: ResidentPool) -> None:
    """Until then a slot reads as before; afterwards as the run left it."""
    one, other = pool.allocate(), pool.allocate()
    tick = pool.gather(slots(one, other), moves(2))
    run(pool, tick, 1)
    assert value(pool, one) == value(pool, other) == [[1, 2, 3], [0, 0]]
    pool.scatter(slots(one, other), slots(0, 1), tick)
    assert value(pool, one) == value(pool, other) == [[2, 3, 4], [1, 1]]


def test_only_rows_that_count_move(pool: ResidentPool) -> None:
    """The places that the others had written to are free again."""
    taken = [pool.allocate() for _ in range(3)]
    free = pool.free_places
    tick = pool.gather(slots(*taken), moves(3))
    assert pool.free_places == free - 3
    run(pool, tick, 5)
    pool.scatter(slots(taken[2]), slots(2), tick)
    assert pool.free_places == free - 1
    assert [value(pool, slot)[1] for slot in taken] == [[0, 0], [0, 0], [5, 5]]


@pytest.mark.parametrize("between", [False, True], ids=["one run", "several runs"])
def test_a_tick_that_came_to_nothing(pool: ResidentPool, between: bool) -> None:
    """Nothing has moved, and no place is lost."""
    slot = pool.allocate([np.full(3, 9, np.float32), np.full(2, 9.0)])
    free = pool.free_places
    tick = pool.gather(slots(slot), moves(1, between))
    run(pool, tick, 1)
    pool.abandon(tick)
    assert value(pool, slot) == [[9, 9, 9], [9, 9]]
    assert pool.free_places == free


def test_rows_that_only_fill_a_tick_up(pool: ResidentPool) -> None:
    """They begin in the initial states and write what nobody keeps; giving places back leaves both alone."""
    slot = pool.allocate()
    free = pool.free_places
    tick = pool.gather(slots(slot), moves(4))
    assert tick.before[1:].tolist() == [INITIAL] * 3
    assert tick.after[1:].tolist() == [UNWANTED] * 3
    run(pool, tick, 1)
    pool.scatter(slots(slot), slots(0), tick)
    assert pool.free_places == free - 1
    assert value(pool, slot) == [[2, 3, 4], [1, 1]]
    assert value(pool, pool.allocate()) == [[1, 2, 3], [0, 0]]


def test_no_place_is_read_and_written_in_one_tick(pool: ResidentPool) -> None:
    """Nor written by two ticks that are under way at once."""
    taken = pool.allocate_many(4)
    first = pool.gather(taken[:2], moves(2, between=True))
    second = pool.gather(taken[2:], moves(2, between=True))
    written: list[int] = []
    for tick in (first, second):
        assert tick.between is not None
        written += [*tick.after.tolist(), *tick.between.tolist()]
    assert len(set(written)) == 8
    assert not {*first.before.tolist(), *second.before.tolist(), INITIAL, UNWANTED} & set(written)


def test_reset_and_write(pool: ResidentPool) -> None:
    """Either sets the states whatever they were."""
    slot = pool.allocate()
    pool.write(slot, [np.full(3, 4, np.float32), np.full(2, 5.0)])
    pool.write(slot, [np.full(3, 6, np.float32), np.full(2, 7.0)])
    assert value(pool, slot) == [[6, 6, 6], [7, 7]]
    free = pool.free_places
    pool.reset(slot)
    assert value(pool, slot) == [[1, 2, 3], [0, 0]]
    assert pool.free_places == free + 1


def test_a_slot_that_begins_where_another_is(pool: ResidentPool) -> None:
    """Copied on the device; what becomes of one is nothing to the other."""
    for given in (None, [np.full(3, 4, np.float32), np.full(2, 5.0)]):
        source = pool.allocate(given)
        before = value(pool, source)
        copied = dict(pool.copied)
        copy = pool.allocate(source)
        assert pool.copied == copied
        tick = pool.gather(slots(source), moves(1))
        run(pool, tick, 1)
        pool.scatter(slots(source), slots(0), tick)
        assert value(pool, copy) == before
        assert value(pool, source) != before


def test_too_many_slots(pool: ResidentPool) -> None:
    """All or none, and the limit is said."""
    pool.allocate_many(9)
    with pytest.raises(Full, match="all 10 state slots"):
        pool.allocate_many(2)
    assert pool.taken == 9


def test_what_is_copied_is_counted() -> None:
    """Each way in bytes, at somebody's wish alone: ticks copy nothing."""
    told: Counter[str] = Counter()

    def count(way: str, size: int) -> None:
        told[way] += size

    pool = ResidentPool(STATES, 10, 8, DEVICE, count=count)
    slot = pool.allocate()
    for _ in range(3):
        tick = pool.gather(slots(slot), moves(1))
        run(pool, tick, 1)
        pool.scatter(slots(slot), slots(0), tick)
    assert told == {}
    pool.read(slot)
    pool.write(slot, pool.read(slot))
    assert told == pool.copied == {"up": 28, "down": 56}


class Counting(HostStream):
    """A stream that counts its marks, which are reached when the test says so.

    Attributes:
        marks: that were made.
        done: whether they have been reached.
    """

    def __init__(self) -> None:
        self.marks = 0
        self.done = True

    def mark(self) -> Mark:
        """A mark that is never behind, for those who wait."""
        self.marks += 1
        return cast(Mark, self)

    def wait(self) -> None:
        """Reached."""


def test_many_are_read_with_one_wait() -> None:
    """Of those that have states of their own; each copy from the device is counted."""
    stream, device = Counting(), HostDevice()
    device.ahead = stream
    pool = ResidentPool(STATES, 10, 8, device)
    taken = [pool.allocate([np.full(3, n, np.float32), np.full(2, n)]) for n in range(3)]
    fresh = pool.allocate()
    stream.marks = 0
    found = pool.read_many([*taken, fresh])
    assert [[state.tolist() for state in states] for states in found] == [
        *([[n] * 3, [n] * 2] for n in range(3)),
        [[1, 2, 3], [0, 0]],
    ]
    assert (stream.marks, pool.copied["down"]) == (1, 3 * 28)
    pool.read_many([fresh])
    pool.read_many([])
    assert (stream.marks, pool.copied["down"]) == (1, 3 * 28)


def test_what_has_gone_up_is_not_kept() -> None:
    """Until it has arrived it is; the next tick lets go of it."""
    stream, device = Counting(), HostDevice()
    device.ahead = stream
    pool = ResidentPool(STATES, 10, 8, device)
    stream.done = False
    slot = pool.allocate([np.ones(3, np.float32), np.ones(2)])
    pool.abandon(pool.gather(slots(slot), moves(1)))
    assert len(pool._going_up) == 1
    stream.done = True
    pool.abandon(pool.gather(slots(slot), moves(1)))
    assert pool._going_up == []


def test_no_memory_for_so_many() -> None:
    """The refusal says how many bytes for how many rows, and which settings make it less."""

    class Small(HostDevice):
        def memory(self) -> tuple[int, int]:
            return 100, 100

    with pytest.raises(LoadError, match=r"states of 20 rows take 560 bytes.*100 are free.*--max-sessions"):
        ResidentPool(STATES, 10, 8, Small())

    class Full(HostDevice):
        def empty(self, shape: object, dtype: str) -> Buffer:
            raise MemoryError

    with pytest.raises(LoadError, match="560 bytes"):
        ResidentPool(STATES, 10, 8, Full())


def test_a_graph_without_states() -> None:
    """Slots are taken and given back, and hold nothing."""
    pool = ResidentPool([], 3, 2, DEVICE)
    slot = pool.allocate()
    assert pool.read(slot) == []
    tick = pool.gather(slots(slot), moves(1))
    pool.scatter(slots(slot), slots(0), tick)
    pool.free(slot)
    assert pool.taken == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_long_life(seed: int) -> None:
    """Whatever comes in whatever order, with up to two ticks under way: each slot holds what it should."""
    chance = random.Random(seed)
    pool = ResidentPool(STATES[1:], 10, 8, DEVICE, in_flight=2)
    should: dict[int, float] = {}
    under_way: list[tuple[list[int], Moves]] = []
    for number in range(300):
        busy = {slot for taken, _ in under_way for slot in taken}
        idle = [slot for slot in should if slot not in busy]
        match chance.choice(["open", "close", "write", "reset", "start", "start", "end", "end"]):
            case "open" if len(should) < 10:
                given = chance.choice([None, [np.full(2, float(number))]])
                should[pool.allocate(given)] = 0 if given is None else number
            case "close" if idle:
                slot = chance.choice(idle)
                pool.free(slot)
                del should[slot]
            case "write" if idle:
                slot = chance.choice(idle)
                pool.write(slot, [np.full(2, float(number))])
                should[slot] = number
            case "reset" if idle:
                slot = chance.choice(idle)
                pool.reset(slot)
                should[slot] = 0
            case "start" if idle and len(under_way) < 2:
                taken = chance.sample(idle, min(4, len(idle)))
                tick = pool.gather(slots(*taken), moves(len(taken)))
                run(pool, tick, 1)
                under_way.append((taken, tick))
            case "end" if under_way:
                taken, tick = under_way.pop(0)
                rows = sorted(chance.sample(range(len(taken)), chance.randint(0, len(taken))))
                if rows:
                    pool.scatter(slots(*(taken[row] for row in rows)), slots(*rows), tick)
                else:
                    pool.abandon(tick)
                for row in rows:
                    should[taken[row]] += 1
        assert {slot: value(pool, slot) for slot in should} == {slot: [[s, s]] for slot, s in should.items()}
    for _, tick in under_way:
        pool.abandon(tick)
    for slot in should:
        pool.free(slot)
    assert (pool.taken, pool.free_places) == (0, 18)
