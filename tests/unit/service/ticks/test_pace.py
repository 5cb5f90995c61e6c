"""How long a tick takes, as far as it has been learned."""

from __future__ import annotations

import pytest

from service.ticks.pace import Pace


def test_rows_seen_at_a_bad_moment_are_tried_again() -> None:
    """A machine that was slow for a while does not run a row at a time for ever."""
    pace = Pace()
    for rows in (1, 2, 4, 8):
        pace.learn(rows, 1, 1.0)
    for _ in range(20):
        pace.learn(1, 1, 0.001)
    seen = []
    for _ in range(5000):
        seen.append(pace.rows_within(0.1, 8))
        pace.learn(seen[-1], 1, 0.001)
    assert (seen[0], seen[-1]) == (1, 8)
    assert seen[:100].count(2) == 3


def test_rows_that_are_slow_are_tried_rarely() -> None:
    """And never more than twice as many as are quick enough."""
    pace = Pace()
    for rows in (1, 2, 4, 8):
        pace.learn(rows, 1, 0.001 * rows)
    seen = [pace.rows_within(0.002, 8) for _ in range(320)]
    assert (seen.count(2), seen.count(4)) == (310, 10)


def test_what_was_worked_out_holds_until_more_is_learned() -> None:
    """What as many rows take at best is told anew after each tick, also of another number of rows."""
    pace = Pace()
    pace.learn(16, 1, 0.016)
    assert pace.step_at_best_s(16, 1) == pytest.approx(0.016)
    pace.learn(8, 1, 0.004)
    assert pace.step_at_best_s(16, 1) == pytest.approx(0.008)


def test_a_tick_that_was_held_up_says_little_of_the_next() -> None:
    """One that took a thousand times as long raises what is expected by less than its double; many soon say more."""
    pace = Pace()
    pace.learn(16, 4, 0.004)
    pace.learn(16, 4, 4.0)
    assert 0.001 < pace.step_s(16, 4) < 0.002
    for _ in range(20):
        pace.learn(16, 4, 4.0)
    assert pace.step_s(16, 4) > 0.9


def test_work_in_slices_takes_as_long_as_its_slices() -> None:
    """Rows that run a few steps at a time are expected to take what such ticks took, not what long ones did."""
    pace = Pace()
    pace.learn(16, 16, 16 * 0.001)
    pace.learn(16, 4, 4 * 0.002)
    assert pace.work_s(64, 64 * 16, 16, longest=16) == pytest.approx(0.064)
    assert pace.work_s(64, 64 * 16, 16, longest=4) == pytest.approx(0.128)


def test_how_many_steps_fit_is_told_anew_when_more_is_learned() -> None:
    """The answer is kept only until the next tick."""
    pace = Pace()
    pace.learn(16, 1, 0.001)
    assert pace.steps_within(16, 0.008, 100) == 8
    for _ in range(30):
        pace.learn(16, 1, 0.004)
    assert pace.steps_within(16, 0.008, 100) == 2


def test_a_slice_is_as_long_as_its_time_allows_and_not_as_its_first_step_says() -> None:
    """Much of a tick may not grow with its steps; two lengths that were seen tell what lies between them."""
    pace = Pace()
    pace.learn(64, 1, 0.009)
    assert pace.steps_within(64, 0.016, 100) == 1
    pace.learn(64, 16, 0.054)
    assert pace.steps_within(64, 0.016, 100) == 3
    assert pace.steps_within(64, 0.027, 100) == 7
    assert pace.steps_within(64, 0.1, 100) == 29
    assert pace.steps_within(64, 0.1, 20) == 20
    assert pace.steps_within(64, 0.001, 100) == 1


def test_one_bad_moment_does_not_say_how_many_rows_are_quick() -> None:
    """The best of what was seen of so many rows counts."""
    pace = Pace()
    for rows, seconds in ((1, 0.0005), (16, 0.0009), (64, 0.0033)):
        pace.learn(rows, 1, seconds * (3 if rows == 16 else 1))
        pace.learn(rows, 16, 16 * seconds)
    assert pace.efficient_rows(256) == 16


def test_long_ticks_that_were_seen_at_a_bad_moment_are_tried_again() -> None:
    """Slices of one step say that longer ones take no more a step: else they would be of one step for ever."""
    pace = Pace()
    for steps in (1, 2, 4, 8, 16):
        pace.learn(16, steps, steps * 0.020)
    assert pace.steps_within(16, 0.016, 512) == 1
    seen = []
    for _ in range(60):
        seen.append(pace.steps_within(16, 0.016, 512))
        pace.learn(16, seen[-1], 0.001 + seen[-1] * 0.001)
    assert seen[-1] in range(13, 17)


def test_ticks_of_few_rows_are_not_quick_where_the_model_is_small() -> None:
    """What a tick takes beside its run is shared by its rows: a run that is quick with few of them is not enough."""
    small, large = Pace(), Pace()
    for rows in (1, 4, 16, 64):
        for steps in (1, 16):
            small.learn(rows, steps, steps * max(rows, 2) * 7e-6)
            large.learn(rows, steps, steps * max(rows, 10) * 5e-5)
    assert (small.efficient_rows(256), large.efficient_rows(256)) == (16, 16)
