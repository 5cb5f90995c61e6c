"""Loads and measurements of several models at once: who waits for whom, and how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from service.versions.quiet import Quiet

LONG_S = 30.0


@contextmanager
def waiting(inside: AbstractContextManager[Any]) -> Iterator[tuple[threading.Thread, threading.Event]]:
    """A thread that goes in there and out again, and what says that it was inside."""
    entered = threading.Event()

    def work() -> None:
        with inside:
            entered.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread, entered
    finally:
        thread.join(10)
    assert entered.is_set()


def test_loads_go_side_by_side() -> None:
    """None waits for another."""
    quiet = Quiet()
    with quiet.loading(0), waiting(quiet.loading(LONG_S)) as (thread, _):
        thread.join(10)
        assert not thread.is_alive()


def test_a_measurement_goes_alone() -> None:
    """It waits for loads and other measurements; loads wait for it."""
    quiet = Quiet()
    for held, other in (
        (quiet.loading(0), quiet.measuring(LONG_S)),
        (quiet.measuring(0), quiet.measuring(LONG_S)),
        (quiet.measuring(0), quiet.loading(LONG_S)),
    ):
        with held as turn:
            other_waits = waiting(other)
            _, entered = other_waits.__enter__()
            assert not entered.wait(0.02)
        other_waits.__exit__(None, None, None)
        assert turn is None or turn.alone
    with quiet.measuring(0) as turn:
        assert turn.alone


def test_nobody_waits_for_ever() -> None:
    """What never ends holds nobody up; a measurement that was not alone knows it."""
    quiet = Quiet()
    with quiet.measuring(0) as first:
        assert first.alone
        with quiet.loading(0):
            assert not first.alone
            with quiet.measuring(0) as second:
                assert not second.alone
    with quiet.measuring(0) as first, quiet.measuring(0) as second:
        assert not first.alone
        assert not second.alone


def test_what_fails_leaves_nothing_behind() -> None:
    """Neither a load nor a measurement."""
    quiet = Quiet()
    for inside in (quiet.loading(0), quiet.measuring(0)):
        with pytest.raises(RuntimeError), inside:
            raise RuntimeError
    with quiet.measuring(0) as turn:
        assert turn.alone
