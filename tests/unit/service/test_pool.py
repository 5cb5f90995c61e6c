"""State slots, held against a plain dict of what each slot should hold, with the batch axis in every place."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import Full
from service.manifest import StateSpec
from service.pool import Pool, initial_value

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
    """All slots hold what they held however often the pool grows, and each slot is handed out once."""
    state = spec(shape)
    pool = Pool([state], limit=21, capacity=2)
    held = {pool.allocate([value(state, n)]): n for n in range(21)}
    assert len(held) == pool.taken == 21
    for slot, n in held.items():
        (read,) = pool.read(slot)
        np.testing.assert_array_equal(read, value(state, n))


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_the_number_of_slots_is_limited(capacity: int) -> None:
    """Over the limit the error names it, nothing changes, and a slot that is given back can be taken."""
    pool = Pool([spec((None, 3))], limit=3, capacity=capacity)
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


def test_memory_that_runs_out_while_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is as it was, whichever of its arrays had grown already, and grows the next time."""
    states = [spec((None, 3)), spec((None, 3))]
    pool = Pool(states, limit=4, capacity=2)
    held = [value(states[0], 1), value(states[1], 2)]
    first, _ = pool.allocate(held), pool.allocate()
    real, calls = np.concatenate, []

    def second_fails(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", second_fails)
        with pytest.raises(MemoryError):
            pool.allocate()
    assert pool.taken == 2
    assert {array.shape for array in pool._arrays} == {(2, 3)}
    third = pool.allocate(held)
    for array, other in zip(pool.read(first), pool.read(third), strict=True):
        np.testing.assert_array_equal(array, other)


def test_states_that_cannot_be_written_take_no_slot() -> None:
    """What does not fit is raised, and the slot is free."""
    pool = Pool([spec((None, 3))], limit=4)
    with pytest.raises(ValueError, match="broadcast"):
        pool.allocate([np.zeros(5, np.float32)])
    assert pool.taken == 0
