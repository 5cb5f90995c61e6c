"""A bell: no ring is lost, none counts twice, and its descriptors go with it."""

from __future__ import annotations

import os
import threading
import time

import pytest

from service.ticks.bell import Bell


@pytest.fixture(params=["counter", "pipe"])
def bell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bell:
    """A bell of either kind."""
    if request.param == "pipe":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("this system has no eventfd")
    return Bell()


def waits(bell: Bell) -> bool:
    """Whether a wait of a moment is waited out."""
    began = time.monotonic()
    bell.wait(0.02)
    return time.monotonic() - began >= 0.015


def test_a_ring_before_the_wait_counts_once(bell: Bell) -> None:
    """However often it rang: the next wait is over at once, and the one after that is not."""
    for _ in range(100_000):
        bell.ring()
    bell.wait()
    assert waits(bell)


def test_whoever_waits_is_woken(bell: Bell) -> None:
    """By another thread, without a time."""
    heard = threading.Event()

    def listen() -> None:
        bell.wait()
        heard.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert not heard.wait(0.02)
    bell.ring()
    assert heard.wait(10)
    listener.join()


def test_a_wait_may_be_as_long_as_it_likes(bell: Bell) -> None:
    """Longer than the system counts: it is over with the ring all the same."""
    bell.ring()
    bell.wait(1e12)


def test_a_bell_that_is_gone_holds_no_descriptors() -> None:
    """However many there were."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(50):
        Bell().ring()
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 2
