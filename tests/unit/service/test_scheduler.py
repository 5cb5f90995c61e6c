"""The scheduler alone: admission, how ticks are cut, when a row is applied. No threads, no arrays, time handed in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Cancelled, Draining, Full, InvalidRequest, Late, PositionConflict
from service.scheduler import Limits, Phase, Row, Scheduler, Track

NOW = 100.0


def scheduler(
    queued_rows: int = 100,
    tick_rows: int = 100,
    tick_steps: int = 1000,
    ragged: bool = True,
    queued_bytes: int = 10_000,
) -> Scheduler:
    """A scheduler whose limits are out of the way unless they are given."""
    return Scheduler(Limits(queued_rows, tick_rows, tick_steps, ragged, queued_bytes))


def row(
    steps: int = 1, track: Track | None = None, position: int = 0, deadline: float | None = None, priority: int = 2
) -> Row:
    """A row of a track of its own, unless one is given."""
    return Row(track or Track(0), position, steps, (), lambda row: None, deadline, priority)


def follow(track: Track, *steps: int) -> list[Row]:
    """Rows of one track, each where the one before it ends."""
    starts = [track.position + sum(steps[:index]) for index in range(len(steps))]
    return [row(size, track, start) for size, start in zip(steps, starts, strict=True)]


def ticks(scheduler: Scheduler) -> list[list[Row]]:
    """Cut and seal until nothing is left."""
    cut: list[list[Row]] = []
    while True:
        tick, refused = scheduler.cut(NOW)
        if not tick and not refused:
            return cut
        scheduler.seal(tick, NOW)
        cut.append(tick)


def lengths(cut: Sequence[Sequence[Row]]) -> list[list[int]]:
    """How long the rows of each tick are."""
    return [[row.steps for row in tick] for tick in cut]


# --- admission ---


def test_rows_are_taken_all_or_none() -> None:
    """A batch that would pass the limit leaves nothing in the queue, and the error names the limit and what waits."""
    queue = scheduler(queued_rows=4)
    queue.submit([row(), row(), row()])
    with pytest.raises(Full, match=r"3 rows are waiting .* 2 more would pass the limit of 4"):
        queue.submit([row(), row()])
    assert queue.queued == 3
    queue.submit([row()])
    assert lengths(ticks(queue)) == [[1, 1, 1, 1]]


def test_what_runs_or_was_cancelled_does_not_count_as_waiting() -> None:
    """Room comes back as soon as a row is cut into a tick, refused, or cancelled."""
    queue = scheduler(queued_rows=3, tick_rows=1)
    rows = [row(), row(deadline=NOW), row()]
    queue.submit(rows)
    assert queue.cancel(rows[2])
    assert queue.queued == 2
    tick, refused = queue.cut(NOW)
    assert (tick, refused, queue.queued) == ([rows[0]], [], 1)
    tick, refused = queue.cut(NOW)
    assert (tick, refused, queue.queued) == ([], [rows[1]], 0)
    queue.submit([row(), row(), row()])


def test_bytes_that_wait_are_bounded() -> None:
    """Also all or none; what is cut, refused, cancelled or cleared gives its bytes back and lets go of them."""
    queue = scheduler(queued_bytes=100, tick_rows=1)

    def large(size: int, deadline: float | None = None) -> Row:
        return Row(Track(0), 0, 1, [np.zeros(size, np.int8)], lambda row: None, deadline)

    rows = [large(30), large(30, NOW), large(30)]
    queue.submit(rows)
    with pytest.raises(Full, match=r"90 bytes .* 12 more would pass the limit of 100"):
        queue.submit([large(6), large(6)])
    assert queue.cancel(rows[2])
    queue.submit([large(40)])
    for _ in range(2):
        queue.cut(NOW)
    with pytest.raises(InvalidRequest, match=r"101 bytes never fit: .* 100 bytes"):
        queue.submit([large(101)])
    queue.submit([large(100)])
    queue.clear(Draining("stopping"))
    queue.submit([large(100)])
    assert [len(row.inputs) for row in rows] == [1, 0, 0]


def test_more_rows_than_the_queue_holds_never_fit() -> None:
    """Trying again later would not help, so the error does not say so."""
    with pytest.raises(InvalidRequest, match=r"3 rows of 0 bytes never fit: .* 2 rows"):
        scheduler(queued_rows=2).submit([row(), row(), row()])


def test_what_was_applied_already_is_a_conflict_also_when_it_is_late() -> None:
    """A repetition that comes late is told where its track is, not that nothing has moved."""
    track = Track(0)
    queue = scheduler()
    queue.submit([row(2, track), row(2, track, deadline=NOW)])
    tick, _ = queue.cut(NOW)
    queue.seal(tick, NOW)
    _, (refused,) = queue.cut(NOW)
    assert isinstance(refused.error, PositionConflict)
    assert refused.error.position == 2


# --- cutting ticks ---


def test_ticks_are_cut_in_the_order_of_arrival() -> None:
    """First come, first run, up to the limit of rows."""
    queue = scheduler(tick_rows=2)
    rows = [row() for _ in range(5)]
    queue.submit(rows)
    assert ticks(queue) == [rows[0:2], rows[2:4], rows[4:5]]


def test_rows_that_share_a_tick_are_near_in_length() -> None:
    """The oldest leads; twice as long and half as short still joins it, more or less waits, in its old order."""
    queue = scheduler()
    queue.submit([row(4), row(9), row(8), row(2), row(1), row(3)])
    assert lengths(ticks(queue)) == [[4, 8, 2, 3], [9], [1]]


@pytest.mark.parametrize(
    ("submitted", "cut", "ragged"),
    [
        ([4, 4, 4, 4, 4], [[4, 4, 4, 4], [4]], True),
        ([4, 8, 4], [[4, 8], [4]], True),
        ([8, 4, 4], [[8, 4], [4]], True),
        ([40, 30, 3], [[40], [30], [3]], True),
        ([4, 4, 4, 4, 4], [[4, 4, 4, 4], [4]], False),
        ([40, 40], [[40], [40]], False),
    ],
    ids=["full", "longer pads others", "shorter is padded", "one alone has more", "equal", "equal, one alone has more"],
)
def test_steps_of_a_tick_are_bounded_with_padding(submitted: list[int], cut: list[list[int]], ragged: bool) -> None:
    """Rows times the longest stays within the limit, unless one row alone is over it."""
    queue = scheduler(tick_steps=16, ragged=ragged)
    queue.submit([row(steps) for steps in submitted])
    assert lengths(ticks(queue)) == cut


def test_a_graph_without_lengths_gets_rows_of_one_length() -> None:
    """Where the graph cannot be told lengths, padding would change the state: only equal rows share a tick."""
    queue = scheduler(ragged=False)
    queue.submit([row(3), row(4), row(3), row(4), row(2)])
    assert lengths(ticks(queue)) == [[3, 3], [4, 4], [2]]


def test_a_tick_holds_one_row_of_each_track() -> None:
    """Chunks of one session follow each other from tick to tick while others run beside them."""
    queue = scheduler()
    first, second = follow(Track(0), 1, 1, 1), follow(Track(1), 1, 1)
    queue.submit([*first, *second])
    assert ticks(queue) == [[first[0], second[0]], [first[1], second[1]], [first[2]]]


def test_a_row_does_not_overtake_an_earlier_one_of_its_track() -> None:
    """A short chunk waits behind a long one of its session, although it would fit a tick where that one does not."""
    queue = scheduler()
    leader, (long, short) = row(1), follow(Track(1), 9, 1)
    queue.submit([leader, long, short])
    assert ticks(queue) == [[leader], [long], [short]]
    assert [each.phase for each in (leader, long, short)] == [Phase.APPLIED] * 3


def test_a_row_runs_only_where_its_track_stands() -> None:
    """When a chunk comes to nothing, those behind it are refused with the position where the session is."""
    queue = scheduler()
    track = Track(0, position=7)
    rows = follow(track, 2, 3, 1)
    queue.submit(rows)
    assert queue.cancel(rows[0])
    tick, refused = queue.cut(NOW)
    assert (tick, refused) == ([], rows[1:])
    for each in refused:
        assert isinstance(each.error, PositionConflict)
        assert each.error.position == 7
    assert "begins at position 9, and the session is at 7" in str(rows[1].error)
    assert (queue.queued, track.position) == (0, 7)


@pytest.mark.parametrize(("deadline", "runs"), [(NOW - 1, False), (NOW, False), (NOW + 1, True), (None, True)])
def test_a_late_row_does_not_run(deadline: float | None, runs: bool) -> None:
    """A row whose deadline has come while it waited costs no run; the row behind it is told where the session is."""
    queue = scheduler()
    track = Track(0)
    first, second = row(2, track, 0, deadline), row(2, track, 2)
    queue.submit([first, second])
    tick, refused = queue.cut(NOW)
    if runs:
        assert (tick, refused) == ([first], [])
    else:
        assert (tick, refused) == ([], [first, second])
        assert isinstance(first.error, Late)
        assert isinstance(second.error, PositionConflict)


# --- priorities ---


def test_higher_priorities_run_first() -> None:
    """1 before 2 before 3; among equals in the order of arrival, also in one tick."""
    queue = scheduler(tick_rows=2)
    last, usual, first, second = row(priority=3), row(), row(priority=1), row(priority=1)
    queue.submit([last, usual, first, second])
    assert ticks(queue) == [[first, second], [usual, last]]


def test_a_priority_leads_and_others_join() -> None:
    """What is first decides the lengths of the tick; rows of lower priority fill it."""
    queue = scheduler()
    long, short, first = row(9), row(1), row(8, priority=1)
    queue.submit([long, short, first])
    assert ticks(queue) == [[first, long], [short]]


def test_no_priority_overtakes_an_earlier_row_of_its_track() -> None:
    """A later chunk waits behind an earlier one of a lower priority, and is not refused for it."""
    queue = scheduler(tick_rows=1)
    track = Track(0)
    early, late = row(1, track, 0, priority=3), row(1, track, 1, priority=1)
    other = row()
    queue.submit([early, late, other])
    assert ticks(queue) == [[other], [early], [late]]
    after = row(1, track, 2, priority=1)
    queue.submit([row(), after])
    assert queue.cut(NOW)[0] == [after]


def test_no_row_waits_for_ever() -> None:
    """However many of a higher priority come, one tick in eight is led by the row that has waited longest."""
    queue = scheduler(tick_rows=1)
    low = [row(priority=3), row(priority=2), row(priority=3)]
    queue.submit(low)
    led = []
    for _ in range(24):
        queue.submit([row(priority=1), row(priority=1)])
        led.append(queue.cut(NOW)[0][0])
    assert [led.index(each) for each in low] == [7, 15, 23]


def test_what_was_cancelled_does_not_lead() -> None:
    """The oldest row of those that still wait does; one that is late is refused on the way."""
    queue = scheduler(tick_rows=1)
    cancelled, late, low = row(priority=3), row(priority=3, deadline=NOW), row(priority=3)
    queue.submit([cancelled, late, low])
    queue.cancel(cancelled)
    for _ in range(7):
        queue.submit([row(priority=1)])
        queue.cut(NOW)
    queue.submit([row(priority=1)])
    assert queue.cut(NOW) == ([low], [late])


# --- the end of a row ---


def test_positions_move_when_a_tick_is_sealed() -> None:
    """Not when it is cut: until the run has succeeded the track is where it was."""
    queue = scheduler()
    track = Track(0, position=5)
    queue.submit(follow(track, 3))
    tick, _ = queue.cut(NOW)
    assert (tick[0].phase, track.position) == (Phase.RUNNING, 5)
    assert queue.seal(tick, NOW) == [0]
    assert (tick[0].phase, track.position) == (Phase.APPLIED, 8)


def test_seal_applies_some_rows_of_a_tick_and_not_others() -> None:
    """Cancelled and late rows are not applied and their tracks stay; the others' indices come back, in order."""
    queue = scheduler()
    rows = [row(), row(), row(deadline=NOW + 1), row(deadline=NOW + 3)]
    queue.submit(rows)
    tick, _ = queue.cut(NOW)
    assert tick == rows
    queue.cancel(rows[1])
    assert queue.seal(tick, NOW + 1) == [0, 3]
    assert [each.track.position for each in rows] == [1, 0, 0, 1]
    assert [type(each.error) for each in rows] == [type(None), Cancelled, Late, type(None)]


def test_cancel_a_row_that_waits() -> None:
    """It has ended by that, and no tick will hold it."""
    queue = scheduler()
    first, second = row(), row()
    queue.submit([first, second])
    assert queue.cancel(first)
    assert (first.phase, type(first.error), queue.queued) == (Phase.REFUSED, Cancelled, 1)
    assert ticks(queue) == [[second]]


def test_cancel_a_row_that_runs() -> None:
    """It ends when its tick is sealed, unapplied."""
    queue = scheduler()
    only = row()
    queue.submit([only])
    tick, _ = queue.cut(NOW)
    assert not queue.cancel(only)
    assert only.phase is Phase.RUNNING
    assert queue.seal(tick, NOW) == []
    assert (only.phase, type(only.error), only.track.position) == (Phase.REFUSED, Cancelled, 0)


@pytest.mark.parametrize("end", [Phase.APPLIED, Phase.REFUSED])
def test_cancel_a_row_that_has_ended(end: Phase) -> None:
    """Nothing changes any more."""
    queue = scheduler()
    only = row(deadline=None if end is Phase.APPLIED else NOW)
    queue.submit([only])
    ticks(queue)
    before = (only.phase, only.error, only.track.position)
    assert before[0] is end
    assert not queue.cancel(only)
    assert (only.phase, only.error, only.track.position) == before


def test_cancel_twice() -> None:
    """The second time it has ended already, and the count of what waits is right."""
    queue = scheduler()
    only = row()
    queue.submit([only, row()])
    assert queue.cancel(only)
    assert not queue.cancel(only)
    assert queue.queued == 1


def test_clear_refuses_what_waits() -> None:
    """Every row that waits ends with the given error, once, the oldest first; cancelled ones are not ended again."""
    queue = scheduler(tick_rows=1)
    running, low, waiting, cancelled = row(), row(priority=3), row(), row()
    queue.submit([running, low, waiting, cancelled])
    tick, _ = queue.cut(NOW)
    queue.cancel(cancelled)
    assert queue.clear(Draining("stopping")) == [low, waiting]
    assert (type(waiting.error), type(cancelled.error), queue.queued) == (Draining, Cancelled, 0)
    assert queue.seal(tick, NOW) == [0]
    assert queue.cut(NOW) == ([], [])


@given(st.data())
def test_random_traffic_ends_every_row_once_and_in_order(data: st.DataObject) -> None:
    """Whatever is submitted, cancelled, late: limits hold, each row ends once, a track's steps are applied in a row."""
    limits = Limits(queued_rows=12, tick_rows=3, tick_steps=12, ragged=data.draw(st.booleans()))
    queue = Scheduler(limits)
    tracks = [Track(slot) for slot in range(4)]
    ends = [0] * 4
    accepted: list[Row] = []
    ended: list[Row] = []
    applied: dict[Track, list[Row]] = {track: [] for track in tracks}
    now = 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["submit", "submit", "cancel", "tick"]))
        if action == "submit":
            which = data.draw(st.integers(0, 3))
            steps = data.draw(st.integers(1, 20))
            deadline = data.draw(st.none() | st.floats(now - 1, now + 3))
            start = data.draw(st.sampled_from([ends[which], tracks[which].position]))
            new = row(steps, tracks[which], start, deadline, data.draw(st.integers(1, 3)))
            try:
                queue.submit([new])
            except Full:
                assert queue.queued == limits.queued_rows
            else:
                accepted.append(new)
                ends[which] = start + steps
        elif action == "cancel" and accepted:
            given_up = data.draw(st.sampled_from(accepted))
            if queue.cancel(given_up):
                ended.append(given_up)
        else:
            tick, refused = queue.cut(now)
            assert len(tick) <= limits.tick_rows
            assert len({each.track for each in tick}) == len(tick)
            assert len(tick) <= 1 or len(tick) * max(each.steps for each in tick) <= limits.tick_steps
            victim = data.draw(st.sampled_from([None, *tick]))
            if victim is not None:
                queue.cancel(victim)
            now += data.draw(st.floats(0, 2))
            for index in queue.seal(tick, now):
                applied[tick[index].track].append(tick[index])
            ended += [*tick, *refused]
        assert queue.queued <= limits.queued_rows
    while queue.queued:
        tick, refused = queue.cut(now)
        for index in queue.seal(tick, now):
            applied[tick[index].track].append(tick[index])
        ended += [*tick, *refused]
    assert len(ended) == len(accepted)
    assert {id(each) for each in ended} == {id(each) for each in accepted}
    for each in accepted:
        assert (each.phase is Phase.APPLIED) == (each in applied[each.track])
        assert (each.phase is Phase.REFUSED) == (each.error is not None)
    for track, rows in applied.items():
        assert [each.position for each in rows] == [
            sum(before.steps for before in rows[:index]) for index in range(len(rows))
        ]
        assert track.position == sum(each.steps for each in rows)
