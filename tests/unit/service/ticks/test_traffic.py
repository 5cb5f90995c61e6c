"""The scheduler under hours of traffic, which pass in seconds: who waits how long, and what is computed for nothing.

Within each run it is checked that steps of a session follow each other, that no row ends twice or never, that no track
is twice in a tick, and that the engine rests only when nothing waits.
"""

from __future__ import annotations

from typing import Any

import pytest

from service.ticks.admission import Limits
from tests.unit.service.ticks.traffic import World

BEGIN_S, STEP_S, ROW_S = 0.02, 0.01, 0.0025
SHORT_S = 0.1


def cost_s(rows: int, steps: int) -> float:
    """A slow model that is worth batching: a row alone costs thirteen times what it costs among many."""
    return BEGIN_S + steps * (STEP_S + ROW_S * rows)


def world(**limits: float) -> World:
    """A world with roomy limits."""
    given: dict[str, Any] = {"queued_rows": 8192, "tick_rows": 512, "tick_steps": 8192, "queued_s": 36_000}
    return World(Limits(**given | {"short_tick_s": SHORT_S} | limits), cost_s)


def test_hours_of_streams_and_batches() -> None:
    """A chunk waits for one short tick of the batches beside its own, as long as these go on; and they do go on.

    How long a tick will take is a guess, so that some are longer than they should be.
    """
    quiet, busy = world(), world()
    for each in (quiet, busy):
        each.streams("stream", 32, period_s=40.0)
    busy.batches("batch", 4, rows=32)
    quiet.run(2 * 3600)
    busy.run(2 * 3600)
    assert len(busy.seen["stream"].waited_s) > 0.98 * len(quiet.seen["stream"].waited_s) > 5000
    assert busy.seen["stream"].percentile(0.99) <= quiet.seen["stream"].percentile(0.99) + 1.75 * SHORT_S
    assert busy.busy_s > 0.99 * busy.now
    # Of what it could do with nothing but the largest ticks.
    assert busy.useful / busy.busy_s > 0.5 / ROW_S


@pytest.mark.parametrize("rows", [4, 16, 64, 256])
def test_little_is_padded(rows: int) -> None:
    """With log-normal lengths, sigma 1, at most 5% of what is computed is thrown away."""
    some = world()
    some.batches("batch", 4, rows)
    some.run(1200)
    assert 1 - some.useful / some.cells <= 0.05


def test_alone_batches_get_long_ticks() -> None:
    """When nobody else waits, little of the time goes into beginning ticks."""
    alone = world(long_tick_s=2.5)
    alone.batches("batch", 4, rows=64)
    alone.run(1200)
    assert alone.ticks * BEGIN_S < 0.05 * alone.busy_s


def test_one_session_beside_thousands() -> None:
    """A client with one session waits for the tick that runs and its own, whatever others have queued."""
    crowd = world()
    crowd.streams("many", 4000, period_s=0.0)
    crowd.streams("one", 1, period_s=0.0)
    crowd.run(300)
    longest = cost_s(512, 1)
    assert crowd.seen["one"].percentile(1) <= 2 * longest + 0.001
    assert crowd.seen["many"].percentile(0.5) > 6 * longest


def test_wide_blocks_beside_single_chunks() -> None:
    """Neither keeps the other waiting for more than the tick that runs and its own, wider than a tick or not."""
    mixed = world(tick_rows=64)
    mixed.streams("wide", 2, period_s=0.0, width=200)
    mixed.streams("narrow", 8, period_s=5.0)
    mixed.run(1800)
    longest = cost_s(64, 1)
    assert mixed.seen["narrow"].percentile(1) <= 2 * longest + 0.001
    assert len(mixed.seen["wide"].waited_s) * 200 > 0.9 * 1800 * 64 / longest


def test_a_long_chunk_does_not_hold_others_up() -> None:
    """A session that sends thousands of steps at once runs in slices between the others' steps."""
    mixed = world()
    mixed.streams("short", 16, period_s=10.0)
    mixed.streams("long", 2, period_s=0.0, steps=2000)
    mixed.run(1800)
    assert mixed.seen["short"].percentile(0.99) <= 4 * SHORT_S
    assert len(mixed.seen["long"].waited_s) > 20


@pytest.mark.parametrize("load", [0.8, 1.0, 2.0, 4.0])
def test_overload(load: float) -> None:
    """What is accepted is done in time, however much more comes; the rest is refused at once."""
    late_s, rows, seconds, sessions = 2.5, 64, 300, 2000
    peak = rows / cost_s(rows, 1)
    crowd = World(Limits(queued_rows=8192, tick_rows=rows, tick_steps=8192, short_tick_s=SHORT_S), cost_s)
    crowd.streams("stream", sessions, period_s=sessions / (load * peak), late_s=late_s)
    crowd.run(seconds)
    seen = crowd.seen["stream"]
    done = len(seen.waited_s)
    assert done / seconds >= 0.9 * min(0.9, load) * peak
    assert seen.late <= 0.02 * done
    assert seen.percentile(1) <= late_s
    assert bool(seen.refused) == (load > 1)
