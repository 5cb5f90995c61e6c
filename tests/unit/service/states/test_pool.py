"""State slots, held against a plain dict of what each slot should hold, with the batch axis in every place."""

from __future__ import annotations

import base64
import math
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service.copying import FEW, HELD_BYTES
from service.errors import Full
from service.manifest import StateSpec
from service.states.pool import Pool, initial_value

Array = NDArray[np.generic]

SHAPES: list[tuple[int | None, ...]] = [(None, 3), (1, None, 3), (2, 3, None), (None,)]


def spec(shape: tuple[int | None, ...], dtype: str = "float32", initial: Array | None = None) -> StateSpec:
    """A state of that shape."""
    return StateSpec.model_validate(
        {
            "name": "h",
            "input": "h0",
            "output": "hT",
            "dtype": dtype,
            "shape": shape,
            "batch_axis": shape.index(None),
            "initial": None if initial is None else base64.b64encode(initial.tobytes()).decode(),
        }
    )


def value(spec: StateSpec, seed: int) -> Array:
    """A state of one row."""
    return np.random.default_rng(seed).standard_normal(spec.tail).astype(spec.dtype)


def slots(*numbers: int) -> NDArray[np.intp]:
    """Slots as gather and scatter take them."""
    return np.array(numbers, np.intp)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [FEW // 2 + 1, FEW + 1])
def test_many_are_gathered_and_scattered_as_few_are(shape: tuple[int | None, ...], rows: int) -> None:
    """Whether whole rows are copied as one element or not."""
    state = spec(shape)
    pool = Pool([state], rows + 2)
    taken = pool.allocate_many(rows + 1)
    order = np.random.default_rng(0).permutation(taken)[:rows]
    values = np.random.default_rng(1).standard_normal([rows if n is None else n for n in shape]).astype(np.float32)
    pool.scatter(order, np.arange(rows), [values])
    out = np.full_like(values, np.nan)
    (gathered,) = pool.gather(order, [out])
    assert gathered is out
    np.testing.assert_array_equal(out, values)
    (rest,) = pool.read(int(np.setdiff1d(taken, order)[0]))
    assert not rest.any()
    # Also into arrays, and from such, whose rows do not lie one behind the other.
    wide = np.full((*values.shape, 2), np.nan, np.float32)
    pool.gather(order[::-1].copy(), [wide[..., 0]])
    np.testing.assert_array_equal(wide[..., 0], np.flip(values, state.batch_axis))
    pool.scatter(order, np.arange(rows), [wide[..., 0]])
    np.testing.assert_array_equal(pool.gather(order)[0], np.flip(values, state.batch_axis))


def test_rows_that_are_large_and_such_that_do_not_fit() -> None:
    """Rows of more than a moment's copying are gathered too; what is of another shape is refused, not stretched."""
    wide = HELD_BYTES // 4 + 1
    pool = Pool([spec((None, wide))], 2)
    taken = pool.allocate_many(2)
    given = np.arange(2 * wide, dtype=np.float32).reshape(2, wide)
    pool.scatter(taken, np.arange(2), [given])
    np.testing.assert_array_equal(pool.gather(taken[::-1].copy())[0], given[::-1])
    small = Pool([spec((None, 3))], 4)
    taken = small.allocate_many(2)
    with pytest.raises(ValueError, match="shape"):
        small.scatter(taken, np.arange(3), [np.zeros((3, 3), np.float32)])
    # Of another type it is converted, bits are not taken for what they are not.
    small.scatter(taken, np.arange(2), [np.ones((2, 3), np.int32)])
    np.testing.assert_array_equal(small.gather(taken)[0], np.ones((2, 3)))


def test_many_are_read_as_one_is() -> None:
    """In the order in which they are asked for, as copies."""
    pool = Pool([spec((None, 3))], 4)
    taken = [pool.allocate([np.full(3, n, np.float32)]) for n in range(3)]
    found = pool.read_many([taken[2], taken[0]])
    assert [[state.tolist() for state in states] for states in found] == [[[2] * 3], [[0] * 3]]
    found[0][0][:] = 9
    assert pool.read(taken[2])[0].tolist() == [2] * 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_lays_slots_side_by_side_in_the_graphs_axes(shape: tuple[int | None, ...]) -> None:
    """Row n of each state comes from the n-th slot asked for, in any order, repetitions too."""
    states = [spec(shape), spec(shape, "float64")]
    pool = Pool(states, limit=10)
    held = {pool.allocate([value(s, 2 * n), value(s, 2 * n + 1)]): n for n, s in ((n, states[0]) for n in range(4))}
    order = [*reversed(held), next(iter(held))]
    for index, (state, gathered) in enumerate(zip(states, pool.gather(slots(*order)), strict=True)):
        assert gathered.shape == tuple(5 if size is None else size for size in shape)
        assert gathered.dtype == state.dtype
        for row, slot in enumerate(order):
            expected = value(states[0], 2 * held[slot] + index).astype(state.dtype)
            np.testing.assert_array_equal(gathered.take(row, state.batch_axis), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [0, 2]], ids=["all", "one", "some"])
def test_scatter_takes_only_the_rows_that_it_is_told(shape: tuple[int | None, ...], rows: list[int]) -> None:
    """Slots of other rows, and slots that are not in the tick, stay as they were."""
    state = spec(shape)
    pool = Pool([state], limit=10)
    held = {pool.allocate([value(state, n)]): value(state, n) for n in range(4)}
    tick = [3, 0, 2]
    results = np.stack([value(state, 100 + n) for n in range(3)], state.batch_axis)
    pool.scatter(slots(*(tick[row] for row in rows)), slots(*rows), [results])
    for row in rows:
        held[tick[row]] = value(state, 100 + row)
    for slot, expected in held.items():
        (read,) = pool.read(slot)
        np.testing.assert_array_equal(read, expected)


def test_what_is_read_is_a_copy() -> None:
    """Neither read nor gather gives a view of the pool: a later scatter does not reach into an exported state."""
    state = spec((1, None, 3))
    pool = Pool([state], limit=2)
    slot = pool.allocate([value(state, 1)])
    (read,), (gathered,) = pool.read(slot), pool.gather(slots(slot))
    pool.write(slot, [value(state, 2)])
    np.testing.assert_array_equal(read, value(state, 1))
    np.testing.assert_array_equal(gathered[:, 0], value(state, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_growth_keeps_contents(shape: tuple[int | None, ...]) -> None:
    """All slots hold what they held however many there come to be, and each slot is handed out once."""
    state = spec(shape)
    pool = Pool([state], limit=21)
    held = {pool.allocate([value(state, n)]): n for n in range(21)}
    assert len(held) == pool.taken == 21
    for slot, n in held.items():
        (read,) = pool.read(slot)
        np.testing.assert_array_equal(read, value(state, n))


def test_the_number_of_slots_is_limited() -> None:
    """Over the limit the error names it, nothing changes, and a slot that is given back can be taken."""
    pool = Pool([spec((None, 3))], limit=3)
    taken = [pool.allocate() for _ in range(3)]
    with pytest.raises(Full, match="all 3 state slots"):
        pool.allocate()
    assert pool.taken == 3
    pool.free(taken[1])
    assert (pool.taken, pool.allocate()) == (2, taken[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_a_slot_begins_with_the_initial_state(shape: tuple[int | None, ...], learned: bool) -> None:
    """Zeros or the learned value: in a fresh slot, in one that somebody else had, and after a reset."""
    plain = spec(shape)
    initial = value(plain, 7) if learned else np.zeros(plain.tail, np.float32)
    pool = Pool([spec(shape, initial=initial if learned else None)], limit=1)
    slot = pool.allocate()
    np.testing.assert_array_equal(pool.read(slot)[0], initial)
    pool.write(slot, [value(plain, 8)])
    pool.free(slot)
    assert pool.allocate() == slot
    np.testing.assert_array_equal(pool.read(slot)[0], initial)
    pool.write(slot, [value(plain, 9)])
    pool.reset(slot)
    np.testing.assert_array_equal(pool.read(slot)[0], initial)


def test_a_learned_value_that_does_not_fill_its_shape_is_refused() -> None:
    """Too few bytes, too many, and bytes that are not base64."""
    for text in (base64.b64encode(b"\0" * 8).decode(), base64.b64encode(b"\0" * 16).decode(), "no base64!"):
        with pytest.raises(ValueError, match=r"reshape|base64|Only base64"):
            initial_value(spec((None, 3)).model_copy(update={"initial": text}))


def test_a_model_without_states_has_slots_all_the_same() -> None:
    """Rows of a model that carries nothing need no arrays."""
    pool = Pool([], limit=2)
    slot = pool.allocate()
    assert (pool.read(slot), pool.gather(slots(slot))) == ([], [])
    pool.scatter(slots(slot), slots(0), [])


def test_address_space_that_cannot_be_had() -> None:
    """The pool is not made, and the error says how much it would have taken."""
    with pytest.raises(MemoryError, match=f"cannot reserve {12 << 60} bytes of address space"):
        Pool([spec((None, 3))], limit=1 << 60)


def test_states_that_cannot_be_written_take_no_slot() -> None:
    """What does not fit is raised, and the slot is free."""
    pool = Pool([spec((None, 3))], limit=4)
    with pytest.raises(ValueError, match="broadcast"):
        pool.allocate([np.zeros(5, np.float32)])
    assert pool.taken == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
def test_gather_into_arrays_that_are_there(shape: tuple[int | None, ...], dtype: str) -> None:
    """They hold what new ones would, and are the ones that were given."""
    states = [spec(shape, dtype), spec((None,), dtype)]
    pool = Pool(states, limit=5)
    held = [pool.allocate([value(states[0], n), value(states[1], n)]) for n in range(5)]
    chosen = slots(held[3], held[0], held[3])
    new = pool.gather(chosen)
    out = [np.ones_like(array) for array in new]
    for given, copied, expected in zip(out, pool.gather(chosen, out), new, strict=True):
        assert copied is given
        np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_slots_that_are_not_there(wrong: int) -> None:
    """Raised, whether the arrays are given or not, instead of another slot's state."""
    pool = Pool([spec((None, 3))], limit=3)
    out = [np.ones((2, 3), np.float32)]
    with pytest.raises(IndexError, match="slots"):
        pool.gather(slots(0, wrong), out)
    assert out[0].all()
    with pytest.raises(IndexError, match="slots"):
        pool.gather(slots(0, wrong))


@pytest.mark.parametrize("learned", [False, True], ids=["zeros", "learned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_slots_at_once(shape: tuple[int | None, ...], learned: bool) -> None:
    """They hold the initial states whatever their last owners left, and are taken all or none."""
    plain = spec(shape)
    initial = value(plain, 7) if learned else np.zeros(plain.tail, np.float32)
    pool = Pool([spec(shape, initial=initial if learned else None)], limit=4)
    before = [pool.allocate([value(plain, n)]) for n in range(3)]
    pool.free_many(slots(*before[1:]))
    with pytest.raises(Full, match="all 4 state slots"):
        pool.allocate_many(4)
    many = pool.allocate_many(3)
    assert len({before[0], *many.tolist()}) == pool.taken == 4
    for slot in many.tolist():
        np.testing.assert_array_equal(pool.read(slot)[0], initial)
    np.testing.assert_array_equal(pool.read(before[0])[0], value(plain, 0))


def resident_bytes(pool: Pool) -> int:
    """Memory that the states of all slots take, as the system counts it."""
    page, entry = mmap.PAGESIZE, 8
    total = 0
    # Page by page: a mapping of somebody else's may lie right beside, and be counted as one with the pool's.
    with Path("/proc/self/pagemap").open("rb") as pages:
        for kept in pool._kept:
            first = kept.array.ctypes.data // page
            behind = -(-(kept.array.ctypes.data + kept.array.nbytes) // page)
            pages.seek(first * entry)
            entries = np.frombuffer(pages.read((behind - first) * entry), np.uint64)
            total += int((entries >> np.uint64(63)).sum()) * page
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")
@pytest.mark.parametrize(("layers", "hidden"), [(1, 128), (2, 64), (3, 43)])
def test_a_hundred_thousand_slots_and_back(layers: int, hidden: int) -> None:
    """Slots that were never taken cost nothing; most of a peak is given back; those who stay keep their states."""
    state = spec((layers, None, hidden))
    pool = Pool([state, state], limit=1_000_000)
    assert resident_bytes(pool) < 1 << 16
    used = 100_000 * 2 * 4 * math.prod(state.tail)
    taken = np.concatenate([pool.allocate_many(500) for _ in range(200)])
    assert used <= resident_bytes(pool) < 1.01 * used
    stay = taken[::1000]
    held = [np.random.default_rng(n).standard_normal((layers, len(stay), hidden)).astype(np.float32) for n in (0, 1)]
    pool.scatter(stay, np.arange(len(stay)), held)
    leave = np.random.default_rng(2).permutation(np.setdiff1d(taken, stay))
    for part in np.array_split(leave, 300):
        pool.free_many(part)
    assert pool.taken == len(stay) == 100
    assert resident_bytes(pool) < 0.2 * used
    for gathered, expected in zip(pool.gather(stay), held, strict=True):
        np.testing.assert_array_equal(gathered, expected)
    # What is taken again is full of what it should be, not of what the system gives or somebody left.
    again = pool.allocate_many(50_000)
    assert not any(array.any() for array in pool.gather(again))
    for gathered, expected in zip(pool.gather(stay), held, strict=True):
        np.testing.assert_array_equal(gathered, expected)


def test_the_lowest_free_slot_goes_first() -> None:
    """Sessions stay together at the front, in whatever order others end."""
    pool = Pool([], limit=100)
    taken = pool.allocate_many(50)
    pool.free_many(taken[::-3])
    assert [pool.allocate() for _ in range(3)] == sorted(taken[::-3])[:3]


def test_threads_that_take_and_give_back_while_others_gather() -> None:
    """Each slot has one owner at a time, and no owner sees another's state, however memory comes and goes."""
    state = spec((2, None, 512))
    pool = Pool([state], limit=20_000)
    wrong: list[str] = []

    def come_and_go(number: int) -> None:
        random = np.random.default_rng(number)
        mine = np.full((2, 1, 512), number, np.float32)
        for _ in range(6):
            many = pool.allocate_many(int(random.integers(1000, 3000)))
            if pool.gather(many)[0].any():
                wrong.append("not the initial state")
            pool.scatter(many, np.arange(len(many)), [mine.repeat(len(many), 1)])
            out = [np.empty((2, len(many), 512), np.float32)]
            if not (pool.gather(many, out)[0] == number).all():
                wrong.append("another's state")
            for part in np.array_split(random.permutation(many), 5):
                pool.free_many(part)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, pool.taken) == ([], 0)


def test_a_slot_that_begins_where_another_is() -> None:
    """A copy: what becomes of one is nothing to the other."""
    state = spec((1, None, 3))
    pool = Pool([state], limit=3)
    source = pool.allocate([value(state, 1)])
    copy = pool.allocate(source)
    pool.write(source, [value(state, 2)])
    assert np.array_equal(pool.read(copy)[0], value(state, 1))
