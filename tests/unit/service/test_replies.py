"""The account of the replies that are kept, alone."""

from __future__ import annotations

import numpy as np
import pytest

from service.errors import Full
from service.replies import Ended, Replies
from service.session import Reply
from tests.clock import Clock
from tests.sums import Sums


def reply(size: int) -> Reply:
    """One of so many bytes."""
    return Reply(0, 1, [np.zeros(size, np.int8)], size)


def ended(size: int, clock: Clock) -> Ended:
    """What is left of a sequence whose last reply has so many bytes."""
    return Ended(reply(size), 1, 1, Sums().manifest, clock.now)


def key(name: str) -> tuple[bytes, str]:
    """Owner and id."""
    return b"", name


@pytest.fixture
def clock() -> Clock:
    """It stands still."""
    return Clock()


@pytest.fixture
def replies(clock: Clock) -> Replies:
    """An account of 100 bytes."""
    return Replies(100, 60, clock)


def test_room_is_held_and_given_back(replies: Replies) -> None:
    """Over the limit the error says what is held; a reply takes the place of the one before it."""
    replies.reserve(60, 0)
    with pytest.raises(Full, match=r"hold 60 bytes, and 50 more would pass the limit of 100"):
        replies.reserve(50, 0)
    replies.replace(0, 60, 60)
    replies.reserve(80, 60)
    replies.replace(60, 80, 80)
    assert replies.held == 80
    replies.replace(80, 0)
    assert replies.held == 0


def test_ended_sequences_make_room_for_live_ones(replies: Replies, clock: Clock) -> None:
    """The oldest goes first, and only as many as it takes; they never cost a live session its reply."""
    for name in ("a", "b", "c"):
        replies.keep(key(name), ended(30, clock))
    replies.reserve(50, 0)
    assert [replies.ended(key(name)) is not None for name in ("a", "b", "c")] == [False, False, True]
    replies.reserve(50, 0)
    assert (replies.ended(key("c")), replies.held) == (None, 100)
    replies.keep(key("d"), ended(1, clock))
    assert replies.ended(key("d")) is None


def test_an_ended_sequence_is_kept_once(replies: Replies, clock: Clock) -> None:
    """Ended again, or forgotten, its former bytes are not counted any more."""
    replies.keep(key("a"), ended(30, clock))
    replies.keep(key("a"), ended(20, clock))
    assert replies.held == 20
    replies.forget(key("a"))
    replies.forget(key("never"))
    assert replies.held == 0


def test_ended_sequences_are_forgotten_after_their_time(replies: Replies, clock: Clock) -> None:
    """Each after the idle timeout, and not a moment before."""
    replies.keep(key("a"), ended(10, clock))
    clock.now += 30
    replies.keep(key("b"), ended(10, clock))
    clock.now += 29.9
    assert replies.ended(key("a")) is not None
    clock.now += 0.1
    replies.expire()
    assert replies.held == 10
    assert replies.ended(key("b")) is not None


def test_their_number_is_bounded(replies: Replies, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where their replies hold next to nothing."""
    monkeypatch.setattr("service.replies._REMEMBERED", 2)
    for name in ("a", "b", "c"):
        replies.keep(key(name), ended(0, clock))
    assert [replies.ended(key(name)) is not None for name in ("a", "b", "c")] == [False, True, True]
