"""Which slots are taken and which lose their memory, against a plain set over a long random life."""

from __future__ import annotations

import random

import pytest

from service.errors import Full
from service.states.slots import Slots


@pytest.mark.parametrize(("limit", "shelf", "spare"), [(1, 4, 1), (1000, 1, 5), (1000, 7, 3), (1000, 64, 1)])
def test_a_long_life(limit: int, shelf: int, spare: int) -> None:
    """The lowest free slot goes first, and only once; no slot in use is in what is surplus, nor one that is not there.

    Afterwards no more shelves have memory than are in use, as many again, and some to spare.
    """
    chance = random.Random(0)
    slots = Slots(limit, shelf, spare)
    taken: set[int] = set()
    memory: set[int] = set()
    given_back = 0
    for _ in range(300):
        if chance.random() < 0.5:
            count = chance.randint(1, limit)
            if len(taken) + count > limit:
                with pytest.raises(Full, match=f"all {limit} state slots"):
                    slots.take(count)
                continue
            free = [slot for slot in range(limit) if slot not in taken]
            assert slots.take(count) == free[:count]
            taken.update(free[:count])
            memory.update(slot // shelf for slot in free[:count])
        else:
            leaving = chance.sample(sorted(taken), chance.randint(0, len(taken)))
            slots.put_back(leaving)
            taken.difference_update(leaving)
        while surplus := slots.surplus():
            for first, behind in surplus:
                assert 0 <= first < behind <= limit
                assert taken.isdisjoint(range(first, behind))
                whole = range(-(-first // shelf), -(-behind // shelf))
                given_back += len(memory.intersection(whole))
                memory.difference_update(whole)
        assert slots.taken == len(taken)
        assert len(memory) <= 2 * len({slot // shelf for slot in taken}) + 2 * spare
    assert given_back or limit // shelf < 3
