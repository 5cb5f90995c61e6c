"""Runs that go on in their stream, and now and then one that waits, so that what kernels copied is freed."""

from __future__ import annotations

from service.engines.engine import run_options
from service.engines.resident_graph import Options


def test_now_and_then_a_run_waits() -> None:
    """One in sixty-four, and none where every run waits anyway."""
    usual, waiting = run_options(waits=False), run_options()
    options = Options(usual, waiting)
    taken = [options.next() for _ in range(200)]
    assert [number for number, one in enumerate(taken, 1) if one is waiting] == [64, 128, 192]
    assert all(one is usual or one is waiting for one in taken)
    alone = Options(waiting)
    assert all(alone.next() is waiting for _ in range(200))


def test_an_interrupt_ends_runs_of_either_kind() -> None:
    """Whichever is under way, and whichever comes next."""
    usual, waiting = run_options(waits=False), run_options()
    Options(usual, waiting).interrupt()
    assert usual.terminate
    assert waiting.terminate
