"""What follows from how long runs took: threads, rows in a tick, and the first pace."""

from __future__ import annotations

import pytest

from service.versions.tuning import Bounds, Measurement, Tuning, choose, sizes, speedup, thread_counts, worth_it


def took(threads: int, rows: int, steps: int, seconds: float) -> Measurement:
    """A measurement."""
    return Measurement(threads=threads, rows=rows, steps=steps, seconds=seconds, cpu_s=seconds * threads)


def busy(**speedups: float) -> list[Measurement]:
    """Two sizes of a busy server, with as many threads as each name says and so many times the speed of one."""
    counts = {1: 1.0} | {int(name.removeprefix("x")): speedup for name, speedup in speedups.items()}
    return [took(count, rows, 1, rows * 1e-4 / gain) for count, gain in counts.items() for rows in (16, 64)]


@pytest.mark.parametrize(
    ("measured", "threads"),
    [
        (busy(), 1),
        (busy(x2=1.49), 1),
        (busy(x2=1.51), 2),
        (busy(x2=1.9, x4=2.7), 2),
        (busy(x2=1.9, x4=2.9), 4),
        (busy(x2=1.4, x4=2.6), 4),
        (busy(x2=1.9, x3=2.5), 3),
        (busy(x2=0.8), 1),
    ],
)
def test_more_threads_have_to_pay(measured: list[Measurement], threads: int) -> None:
    """Twice as many have to give 1.5 times the steps, half as many again 1.25 times, four times as many 2.5 times."""
    assert choose(measured).threads == threads


def test_threads_are_judged_by_busy_ticks() -> None:
    """What a single row gains says nothing of a busy server, and is heard only where nothing else is known."""
    alone = [took(1, 1, 1, 1e-3), took(2, 1, 1, 0.5e-3)]
    assert worth_it(alone, 1, 2)
    assert not worth_it(alone + busy(x2=1.2), 1, 2)
    assert worth_it([took(1, 1, 1, 1e-3), took(2, 1, 1, 2e-3), *busy(x2=1.8)], 1, 2)
    assert not worth_it([took(1, 16, 1, 1e-3), took(2, 64, 1, 1e-6)], 1, 2)


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({rows: 1e-3 + 1e-6 * rows for rows in (1, 16, 64, 256, 512)}, 512),  # ever better: perhaps more is, too
        ({rows: 1e-2 * max(rows, 128) for rows in (1, 64, 128, 256, 512)}, 128),  # no better from 128 on
        ({rows: 1e-2 * rows for rows in (1, 64, 128, 256, 512)}, 64),  # one by one: as good as any, and 64 at least
        ({rows: 1e-6 * rows for rows in (1, 64, 128, 256, 512)}, 512),  # so fast that the tick itself is what costs
        ({rows: 1e-3 * max(rows, 4096) for rows in (1, 4096, 8192)}, 512),  # from elsewhere: never more than are tried
        ({1: 1.0}, 512),  # not enough seen to tell
    ],
)
def test_rows_in_a_tick(seconds: dict[int, float], rows: int) -> None:
    """As many as gain something, with what the tick costs itself."""
    measured = [took(1, count, 1, each) for count, each in seconds.items()]
    # With other threads, or with more steps, other numbers hold; they are not asked.
    others = [took(2, 64, 1, 1e2), took(2, 512, 1, 1e2), took(1, 1, 16, 1e-9)]
    assert choose([*measured, *others]).tick_rows == rows


def test_the_pace_is_that_of_the_chosen_threads() -> None:
    """Seconds a step by rows and steps; nothing is known where nothing was measured."""
    measured = (took(1, 16, 1, 3e-3), took(1, 16, 16, 16e-3), took(2, 16, 1, 9.0))
    pace = Tuning(1, measured=measured).pace
    assert pace.step_s(16, 1) == pytest.approx(3e-3)
    assert pace.step_s(16, 16) == pytest.approx(1e-3)
    assert Tuning(1).pace.step_s(1, 1) == 0


@pytest.mark.parametrize(("cores", "counts"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_thread_counts(cores: int, counts: tuple[int, ...]) -> None:
    """Powers of two, and one a core."""
    assert thread_counts(cores) == counts


def test_sizes() -> None:
    """The smallest first, then what tells most; each once, none too large; without a time axis of one step only."""
    every = sizes(timed=True)
    assert every[:4] == [(1, 1), (16, 1), (64, 1), (256, 1)]
    assert len(set(every)) == len(every) == 20
    assert max(rows * steps for rows, steps in every) == 8192
    assert {steps for _, steps in sizes(timed=False)} == {1}


def test_sizes_have_bounds() -> None:
    """Those of the server's ticks, and 64 MiB of inputs and states; one step of one row is looked at in any case."""
    assert max(sizes(True, Bounds(rows=64))) == (64, 16)
    assert max(sizes(True, Bounds(steps=4))) == (512, 1)
    assert max(sizes(True, Bounds(cells=40))) == (32, 1)
    assert max(sizes(True, step_bytes=2**20)) == (64, 1)
    assert max(sizes(True, step_bytes=1, state_bytes=2**21)) == (16, 16)
    assert sizes(True, Bounds(1, 1, 1), step_bytes=2**30) == [(1, 1)]


def test_devices_are_judged_by_busy_ticks() -> None:
    """How many times the steps per second: of 16 rows and more, where both were seen, with each one's own threads."""
    cuda = Tuning(1, measured=(took(1, 1, 1, 9.0), took(1, 16, 1, 2.0), took(1, 64, 1, 2.0), took(1, 256, 1, 9.0)))
    cpu = Tuning(2, measured=(took(2, 1, 1, 1.0), took(2, 16, 1, 4.0), took(2, 64, 1, 16.0), took(1, 64, 1, 1.0)))
    assert speedup(cuda, cpu) == pytest.approx(4)
    assert speedup(cpu, cuda) == pytest.approx(1 / 4)
    assert speedup(cuda, Tuning(1)) is None
