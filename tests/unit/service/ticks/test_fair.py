"""The queue of many callers: who is next, and what is remembered of those that have nothing in it."""

from __future__ import annotations

import pytest

from service.ticks.fair import Fair


def test_who_has_one_item_at_a_time_pays_too() -> None:
    """A caller whose line is empty between its turns is not taken for a new one each time."""
    queue: Fair[str] = Fair()
    queue.push("many", "a")
    for _ in range(50):
        queue.push("few", "b")
    taken = []

    def give(item: str, room: int) -> tuple[int, int]:
        taken.append(item)
        return 1, 100 if item == "a" else 1

    while queue:
        queue.take(give, 1)
        if taken[-1] == "a" and taken.count("b") < 50:
            queue.put_back("many", "a")
    assert taken.count("a") <= 2


def test_what_is_put_back_is_no_credit() -> None:
    """Steps that were not used count no longer, but nobody gets further ahead by them than whoever comes anew."""
    queue: Fair[str] = Fair()
    queue.push("a", "a")
    queue.push("b", "b")
    queue.take(lambda item, room: (1, 100), 2)
    queue.put_back("a", "a", 100)
    assert queue._lines["a"].served == 0
    queue.put_back("c", "c", 100)
    assert queue._lines["c"].served == queue._served


def test_callers_that_have_gone_are_forgotten() -> None:
    """So many callers may come, one after the other: what is remembered of them is bounded, and goes when all have."""
    queue: Fair[int] = Fair()
    queue.push("waits", -1)
    for caller in range(10_000):
        queue.push(caller, caller)
        queue.keep(lambda item: item == -1)
    assert len(queue._lines) <= 2
    for caller in range(10_000):
        queue.push(caller, caller)
    queue.take(lambda item, room: (1, 5), 10_000)
    queue.take(lambda item, room: (1, 5), 0)
    assert len(queue._lines) <= 4096 + 1
    queue.take(lambda item, room: (1, 5), 1)
    queue.push("new", 0)
    assert [*queue._lines] == ["new"]


def test_no_more_are_offered_in_vain_than_a_few_hundred() -> None:
    """Though thousands wait; they stay in their places."""
    queue: Fair[int] = Fair()
    for caller in range(5000):
        queue.push(caller, caller)
    offered: list[int] = []
    queue.take(lambda item, room: offered.append(item), 100)
    assert len(offered) == 256
    assert queue.drain() == [*range(5000)]


def test_nothing_is_lost_where_taking_fails() -> None:
    """What was put aside, and what was just offered, is there again."""
    queue: Fair[str] = Fair()
    for item in "abc":
        queue.push("one", item)

    def give(item: str, room: int) -> None:
        if item == "b":
            raise MemoryError

    with pytest.raises(MemoryError):
        queue.take(give, 3)
    assert len(queue) == 3
    assert queue.drain() == ["a", "b", "c"]
