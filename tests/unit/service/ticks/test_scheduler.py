"""The scheduler alone: admission, how ticks are cut, when a row is applied. No threads, no arrays, time handed in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Cancelled, Draining, Full, InvalidRequest, Late, PositionConflict
from service.ticks.admission import Limits
from service.ticks.pace import Pace
from service.ticks.row import Block, Phase, Row, Track
from service.ticks.scheduler import Scheduler, Tick

NOW = 100.0


def scheduler(
    queued_rows: int = 100,
    tick_rows: int = 100,
    tick_steps: int = 1000,
    ragged: bool = True,
    queued_bytes: int = 10_000,
    sliced: bool = True,
) -> Scheduler:
    """A scheduler whose limits are out of the way unless they are given."""
    return Scheduler(Limits(queued_rows, tick_rows, tick_steps, ragged, sliced, queued_bytes))


def row(
    steps: int = 1,
    track: Track | None = None,
    position: int = 0,
    deadline: float | None = None,
    priority: int = 2,
    batch: bool = False,
) -> Block:
    """A row of a track of its own, unless one is given."""
    return Block([Row(track or Track(0), position)], steps, (), lambda row: None, deadline, priority, batch=batch)


def follow(track: Track, *steps: int) -> list[Block]:
    """Rows of one track, each where the one before it ends."""
    starts = [track.position + sum(steps[:index]) for index in range(len(steps))]
    return [row(size, track, start) for size, start in zip(steps, starts, strict=True)]


def ticks(scheduler: Scheduler) -> list[list[Block]]:
    """Cut and seal until nothing is left; the rows of each tick."""
    return [tick.blocks for tick in cut_all(scheduler)]


def cut_all(scheduler: Scheduler) -> list[Tick]:
    """Cut and seal until nothing is left."""
    cut: list[Tick] = []
    while True:
        tick, refused = scheduler.cut(NOW)
        if tick is None and not refused:
            return cut
        if tick is not None:
            finish(scheduler, tick)
            cut.append(tick)


def finish(scheduler: Scheduler, tick: Tick, now: float = NOW) -> list[int]:
    """End a tick whose run succeeded; the rows that were applied."""
    sealed = scheduler.seal(tick, now)
    scheduler.resume(tick, sealed)
    return sealed.applied


def cut(scheduler: Scheduler, now: float = NOW) -> tuple[list[Block], list[Block]]:
    """The rows of the next tick, and those that are refused."""
    tick, refused = scheduler.cut(now)
    return (tick.blocks if tick else []), refused


def lengths(cut: Sequence[Tick]) -> list[list[int]]:
    """How many steps the rows of each tick run."""
    return [tick.lengths for tick in cut]


# --- admission ---


def test_rows_are_taken_all_or_none() -> None:
    """A batch that would pass the limit leaves nothing in the queue, and the error names the limit and what waits."""
    queue = scheduler(queued_rows=4)
    queue.submit([row(), row(), row()])
    with pytest.raises(Full, match=r"3 rows are waiting .* 2 more would pass the limit of 4"):
        queue.submit([row(), row()])
    assert queue.queued == 3
    queue.submit([row()])
    assert lengths(cut_all(queue)) == [[1, 1, 1, 1]]


def test_what_runs_or_was_cancelled_does_not_count_as_waiting() -> None:
    """Room comes back as soon as a row is cut into a tick, refused, or cancelled."""
    queue = scheduler(queued_rows=3, tick_rows=1)
    rows = [row(), row(deadline=NOW), row()]
    queue.submit(rows)
    assert queue.cancel(rows[2].rows)
    assert queue.queued == 2
    assert (*cut(queue), queue.queued) == ([rows[0]], [], 1)
    assert (*cut(queue), queue.queued) == ([], [rows[1]], 0)
    queue.submit([row(), row(), row()])


def test_bytes_that_wait_are_bounded() -> None:
    """Also all or none; what is cut, refused, cancelled or cleared gives its bytes back and lets go of them."""
    queue = scheduler(queued_bytes=100, tick_rows=1)

    def large(size: int, deadline: float | None = None) -> Block:
        return Block([Row(Track(0), 0)], 1, [np.zeros(size, np.int8)], lambda row: None, deadline)

    rows = [large(30), large(30, NOW), large(30)]
    queue.submit(rows)
    with pytest.raises(Full, match=r"90 bytes .* 12 more would pass the limit of 100"):
        queue.submit([large(6), large(6)])
    assert queue.cancel(rows[2].rows)
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


def test_a_wrong_guess_of_the_time_is_learned_from() -> None:
    """After one tick that took minutes, a chunk with a deadline still runs: else nothing would ever be learned."""
    queue = scheduler()
    queue.pace.learn(1, 1, 600.0)
    for _ in range(40):
        queue.submit([row(deadline=NOW + 1)])
        tick, refused = queue.cut(NOW)
        assert tick is not None
        assert not refused
        finish(queue, tick)
        queue.pace.learn(1, 1, 0.001)
    assert queue.pace.step_s(1, 1) < 0.2


def test_what_was_applied_already_is_a_conflict_also_when_it_is_late() -> None:
    """A repetition that comes late is told where its track is, not that nothing has moved."""
    track = Track(0)
    queue = scheduler()
    queue.submit([row(2, track), row(2, track, deadline=NOW)])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    finish(queue, tick)
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


def test_long_rows_run_in_slices() -> None:
    """A tick is as long as what it can do best; who is longer goes on in the next one, and nothing is padded."""
    queue = scheduler()
    rows = [row(4), row(9), row(8)]
    queue.submit(rows)
    cut = cut_all(queue)
    assert all(len(set(tick.lengths)) == 1 for tick in cut)
    assert [sum(tick.lengths[tick.blocks.index(each)] for tick in cut if each in tick.blocks) for each in rows] == [
        4,
        9,
        8,
    ]
    assert [each.rows[0].track.position for each in rows] == [4, 9, 8]


@pytest.mark.parametrize("ragged", [True, False])
def test_steps_of_a_tick_are_bounded(ragged: bool) -> None:
    """Rows times the longest stays within the limit, also where one row alone has more."""
    queue = scheduler(tick_steps=16, ragged=ragged)
    queue.submit([row(steps) for steps in (4, 8, 4, 40, 30, 3, 1)])
    cut = cut_all(queue)
    assert all(tick.rows * tick.steps <= 16 for tick in cut)
    assert sum(sum(tick.lengths) for tick in cut) == 90


def test_a_graph_without_lengths_gets_no_padding() -> None:
    """Where the graph cannot be told lengths, padding would change the state: all rows of a tick run alike."""
    queue = scheduler(ragged=False)
    queue.submit([row(100), *[row(101) for _ in range(99)]])
    cut = cut_all(queue)
    assert all(len(set(tick.lengths)) == 1 for tick in cut)


def test_little_padding_is_better_than_many_ticks() -> None:
    """A row that is a little shorter than a hundred others runs with them, padded."""
    queue = scheduler(tick_steps=100_000)
    queue.submit([row(99), *[row(100) for _ in range(99)]])
    (tick,) = cut_all(queue)
    assert sorted(tick.lengths) == [99, *[100] * 99]


@pytest.mark.parametrize("ragged", [True, False])
def test_rows_that_must_not_be_sliced(ragged: bool) -> None:
    """Where a layer reads backward each row runs whole, beside those of nearly its length."""
    queue = scheduler(tick_steps=400, ragged=ragged, sliced=False)
    queue.pace.learn(1, 1, 1.0)
    queue.submit([row(steps) for steps in (100, 30, 99, 600, 100, 31, 30, 98)])
    cut = cut_all(queue)
    assert [tick.lengths for tick in cut if tick.steps == 600] == [[600]]
    assert sorted(length for tick in cut for length in tick.lengths) == [30, 30, 31, 98, 99, 100, 100, 600]
    assert all(tick.lengths == [each.steps for each in tick.blocks] for tick in cut)
    cells = sum(tick.rows * tick.steps for tick in cut)
    assert cells - sum(sum(tick.lengths) for tick in cut) <= (0.05 * cells if ragged else 0)
    assert len(cut) == (3 if ragged else 6)


def test_a_row_counts_when_its_last_slice_has_run() -> None:
    """Until then its track stays where it was, and it can be taken out; whoever follows waits."""
    queue = scheduler(tick_steps=4)
    track = Track(0, position=5)
    first, second = follow(track, 6, 1)
    queue.submit([first, second])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, tick.lengths) == ([first], [4])
    assert finish(queue, tick) == []
    assert (first.phase, first.done, track.position, queue.queued) == (Phase.QUEUED, 4, 5, 2)
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, tick.lengths) == ([first], [2])
    assert finish(queue, tick) == [0]
    assert (first.phase, track.position) == (Phase.APPLIED, 11)
    assert cut(queue) == ([second], [])


def test_cancel_between_slices() -> None:
    """What has run of the row is thrown away; so it is when it is cancelled while a slice runs."""
    queue = scheduler(tick_steps=4)
    waiting, running = row(6), row(6)
    queue.submit([waiting])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    finish(queue, tick)
    assert queue.cancel(waiting.rows)
    queue.submit([running])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert tick.blocks == [running]
    sealed = queue.seal(tick, NOW)
    assert sealed.advanced == [0]
    assert not queue.cancel(running.rows)
    queue.resume(tick, sealed)
    assert cut(queue) == ([], [running])
    assert [(each.phase, type(each.error), each.rows[0].track.position) for each in (waiting, running)] == [
        (Phase.REFUSED, Cancelled, 0)
    ] * 2
    assert (queue.queued, cut(queue)) == (0, ([], []))


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
    assert ticks(queue)[-1] == [short]
    assert [each.phase for each in (leader, long, short)] == [Phase.APPLIED] * 3


def test_a_row_runs_only_where_its_track_stands() -> None:
    """When a chunk comes to nothing, those behind it are refused with the position where the session is."""
    queue = scheduler()
    track = Track(0, position=7)
    rows = follow(track, 2, 3, 1)
    queue.submit(rows)
    assert queue.cancel(rows[0].rows)
    refused = rows[1:]
    assert cut(queue) == ([], refused)
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
    if runs:
        assert cut(queue) == ([first], [])
    else:
        assert cut(queue) == ([], [first, second])
        assert isinstance(first.error, Late)
        assert isinstance(second.error, PositionConflict)


def test_a_row_that_cannot_be_done_in_time_costs_no_slice() -> None:
    """A row whose steps take longer than its deadline is away is refused before its first slice, not after its last."""
    queue = scheduler(tick_steps=8)
    queue.pace.learn(2, 4, 0.4)
    first, hopeless, last = row(8), row(8, deadline=NOW + 2), row(8, deadline=NOW + 2)
    queue.submit([first])
    queue.submit([hopeless, last], NOW)
    late = NOW + 1.5
    blocks, refused = cut(queue, late)
    assert (blocks, refused) == ([first], [hopeless, last])
    assert isinstance(hopeless.error, Late)


def test_the_first_row_is_judged_by_the_clock_alone() -> None:
    """However slow ticks are taken to be: were everything refused by that, it would never be learned better."""
    queue = scheduler(tick_steps=8)
    queue.pace.learn(2, 4, 400.0)
    first = row(8, deadline=NOW + 2)
    queue.submit([first], NOW)
    assert cut(queue, NOW + 1.5) == ([first], [])


def test_rows_that_do_not_fit_into_a_tick_are_not_looked_at() -> None:
    """Behind a full tick a row waits, late as it is; it is refused when there would be room for it."""
    pace = Pace()
    for rows_seen in (1, 2):
        # One at a time is as quick as any number, step for step.
        pace.learn(rows_seen, 1, rows_seen * 0.001)
    queue = Scheduler(Limits(100, 64, 8192), pace)
    rows = [row(8, deadline=NOW + 1) for _ in range(3)]
    queue.submit(rows, NOW)
    tick, refused = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, refused) == (rows[:1], [])
    finish(queue, tick)
    assert cut(queue, NOW + 2) == ([], rows[1:])


# --- priorities ---


def test_higher_priorities_run_first() -> None:
    """1 before 2 and 3; among equals in the order of arrival, also in one tick."""
    queue = scheduler(tick_rows=2)
    usual, first, second = row(), row(priority=1), row(priority=1)
    queue.submit([usual, first, second])
    assert ticks(queue) == [[first, second], [usual]]


def test_chunks_and_batches_take_turns() -> None:
    """While both wait neither waits behind more than one tick of the other."""
    queue = scheduler(tick_rows=1)
    chunks, batch = [row() for _ in range(4)], [row(batch=True) for _ in range(3)]
    queue.submit([*batch, *chunks])
    assert ticks(queue) == [
        [each] for each in (chunks[0], batch[0], chunks[1], batch[1], chunks[2], batch[2], chunks[3])
    ]


def test_a_priority_leads_and_others_join() -> None:
    """What is first decides the lengths of the tick; rows of lower priority fill it where they are near."""
    queue = scheduler()
    long, short, first = row(9), row(1), row(8, priority=1)
    queue.submit([long, short, first])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, tick.lengths) == ([first, long], [8, 8])


def test_no_priority_overtakes_an_earlier_row_of_its_track() -> None:
    """A later chunk waits behind an earlier one of a lower priority, and is not refused for it."""
    queue = scheduler(tick_rows=1)
    track = Track(0)
    early, late = row(1, track, 0, priority=3), row(1, track, 1, priority=1)
    queue.submit([early, late])
    assert ticks(queue) == [[early], [late]]


def test_no_row_waits_for_ever() -> None:
    """However many of a higher priority come, batches lead every other tick and usual chunks one in eight."""
    queue = scheduler(tick_rows=1)
    batch, usual, last = row(batch=True), row(), row(priority=3)
    queue.submit([batch, usual, last])
    led = []
    for _ in range(24):
        queue.submit([row(priority=1), row(priority=1)])
        led.append(cut(queue)[0][0])
    assert (led.index(batch), led.index(last), led.index(usual)) == (1, 8, 9)


def test_callers_share_the_steps() -> None:
    """One with ten thousand rows does not keep one with a single row waiting."""
    queue = scheduler(queued_rows=20_000, tick_rows=4)
    many = [Block([Row(Track(0), 0)], 1, (), lambda row: None, caller="many") for _ in range(10_000)]
    one = Block([Row(Track(0), 0)], 1, (), lambda row: None, caller="one")
    queue.submit(many)
    for _ in range(3):
        cut(queue)
    queue.submit([one])
    assert one in cut(queue)[0]


def test_what_was_cancelled_does_not_lead() -> None:
    """The oldest row of those that still wait does; one that is late is refused on the way."""
    queue = scheduler(tick_rows=1)
    cancelled, late, low = row(priority=3), row(priority=3, deadline=NOW), row(priority=3)
    queue.submit([cancelled, late, low])
    queue.cancel(cancelled.rows)
    for _ in range(7):
        queue.submit([row(priority=1)])
        cut(queue)
    queue.submit([row(priority=1)])
    assert cut(queue) == ([low], [late])


# --- the end of a row ---


def test_positions_move_when_a_tick_is_sealed() -> None:
    """Not when it is cut: until the run has succeeded the track is where it was."""
    queue = scheduler()
    track = Track(0, position=5)
    queue.submit(follow(track, 3))
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks[0].phase, track.position) == (Phase.RUNNING, 5)
    assert finish(queue, tick) == [0]
    assert (tick.blocks[0].phase, track.position) == (Phase.APPLIED, 8)


def test_seal_applies_some_rows_of_a_tick_and_not_others() -> None:
    """Cancelled and late rows are not applied and their tracks stay; the others' indices come back, in order."""
    queue = scheduler()
    rows = [row(), row(), row(deadline=NOW + 1), row(deadline=NOW + 3)]
    queue.submit(rows)
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert tick.blocks == rows
    queue.cancel(rows[1].rows)
    assert finish(queue, tick, NOW + 1) == [0, 3]
    assert [each.rows[0].track.position for each in rows] == [1, 0, 0, 1]
    assert [type(each.error) for each in rows] == [type(None), Cancelled, Late, type(None)]


def test_cancel_a_row_that_waits() -> None:
    """It has ended by that, and no tick will hold it."""
    queue = scheduler()
    first, second = row(), row()
    queue.submit([first, second])
    assert queue.cancel(first.rows)
    assert (first.phase, type(first.error), queue.queued) == (Phase.REFUSED, Cancelled, 1)
    assert ticks(queue) == [[second]]


def test_cancel_a_row_that_runs() -> None:
    """It ends when its tick is sealed, unapplied."""
    queue = scheduler()
    only = row()
    queue.submit([only])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert not queue.cancel(only.rows)
    assert only.phase is Phase.RUNNING
    assert finish(queue, tick) == []
    assert (only.phase, type(only.error), only.rows[0].track.position) == (Phase.REFUSED, Cancelled, 0)


@pytest.mark.parametrize("end", [Phase.APPLIED, Phase.REFUSED])
def test_cancel_a_row_that_has_ended(end: Phase) -> None:
    """Nothing changes any more."""
    queue = scheduler()
    only = row(deadline=None if end is Phase.APPLIED else NOW)
    queue.submit([only])
    ticks(queue)
    before = (only.phase, only.error, only.rows[0].track.position)
    assert before[0] is end
    assert not queue.cancel(only.rows)
    assert (only.phase, only.error, only.rows[0].track.position) == before


def test_cancel_twice() -> None:
    """The second time it has ended already, and the count of what waits is right."""
    queue = scheduler()
    only = row()
    queue.submit([only, row()])
    assert queue.cancel(only.rows)
    assert not queue.cancel(only.rows)
    assert queue.queued == 1


def test_clear_refuses_what_waits() -> None:
    """Every row that waits ends with the given error, once, the oldest first; cancelled ones are not ended again."""
    queue = scheduler(tick_rows=1)
    running, low, waiting, cancelled = row(), row(priority=3), row(), row()
    queue.submit([running, waiting, cancelled])
    queue.submit([low], NOW)
    tick, _ = queue.cut(NOW)
    assert tick is not None
    queue.cancel(cancelled.rows)
    behind = follow(Track(0), 1, 1)
    queue.submit(behind, NOW + 1)
    assert queue.clear(Draining("stopping")) == [waiting, low, *behind]
    assert (type(waiting.error), type(cancelled.error), queue.queued) == (Draining, Cancelled, 0)
    assert finish(queue, tick) == [0]
    assert cut(queue) == ([], [])


@given(st.data())
def test_random_traffic_ends_every_row_once_and_in_order(data: st.DataObject) -> None:
    """Whatever is submitted, cancelled, late: limits hold, each row ends once, a track's steps are applied in a row."""
    limits = Limits(queued_rows=12, tick_rows=3, tick_steps=12, ragged=data.draw(st.booleans()))
    queue = Scheduler(limits)
    tracks = [Track(slot) for slot in range(4)]
    ends = [0] * 4
    accepted: list[Block] = []
    ended: list[Block] = []
    applied: dict[Track, list[Block]] = {track: [] for track in tracks}
    now = 0.0

    def run(tick: Tick) -> None:
        for index in finish(queue, tick, now):
            applied[tick.blocks[index].rows[0].track].append(tick.blocks[index])
        ended.extend(each for each in tick.blocks if each.phase in (Phase.APPLIED, Phase.REFUSED))

    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["submit", "submit", "cancel", "tick"]))
        if action == "submit":
            which = data.draw(st.integers(0, 3))
            steps = data.draw(st.integers(1, 20))
            deadline = data.draw(st.none() | st.floats(now - 1, now + 3))
            start = data.draw(st.sampled_from([ends[which], tracks[which].position]))
            new = row(steps, tracks[which], start, deadline, data.draw(st.integers(1, 3)), data.draw(st.booleans()))
            try:
                queue.submit([new])
            except Full:
                assert queue.queued
            else:
                accepted.append(new)
                ends[which] = start + steps
        elif action == "cancel" and accepted:
            given_up = data.draw(st.sampled_from(accepted))
            if queue.cancel(given_up.rows):
                ended.append(given_up)
        else:
            tick, refused = queue.cut(now)
            ended += refused
            if tick is None:
                continue
            assert tick.rows <= limits.tick_rows
            assert len({each.rows[0].track for each in tick.blocks}) == tick.rows
            assert tick.rows * tick.steps <= limits.tick_steps
            victim = data.draw(st.sampled_from([None, *tick.blocks]))
            if victim is not None:
                queue.cancel(victim.rows)
            now += data.draw(st.floats(0, 2))
            queue.pace.learn(tick.rows, tick.steps, data.draw(st.floats(0, 2)))
            run(tick)
        assert queue.queued <= limits.queued_rows + limits.tick_rows
    while queue.queued:
        tick, refused = queue.cut(now)
        assert tick or refused
        ended += refused
        if tick is not None:
            run(tick)
    assert len(ended) == len(accepted)
    assert {id(each) for each in ended} == {id(each) for each in accepted}
    for each in accepted:
        assert (each.phase is Phase.APPLIED) == (each in applied[each.rows[0].track])
        assert (each.phase is Phase.REFUSED) == (each.error is not None)
    for track, rows in applied.items():
        assert [each.rows[0].position for each in rows] == [
            sum(before.steps for before in rows[:index]) for index in range(len(rows))
        ]
        assert track.position == sum(each.steps for each in rows)


def test_what_is_given_up_does_not_pile_up() -> None:
    """While no tick is cut, callers that come and go leave no more behind than a few times what waits."""
    queue = scheduler(tick_rows=3)
    waiting = [row() for _ in range(10)]
    queue.submit(waiting[:5])
    for _ in range(1000):
        gone = row()
        queue.submit([gone])
        assert queue.cancel(gone.rows)
        assert sum(map(len, queue._queues.values())) <= 2 * 5 + 65
    queue.submit(waiting[5:])
    assert queue.queued == 10
    assert [one for tick in ticks(queue) for one in tick] == waiting
    assert not any(queue._stale.values())


def test_a_row_that_has_been_told_holds_nobody() -> None:
    """Whom it told is let go of: a row may stay in its queue for a while after that."""
    told: list[Block] = []
    one = Block([Row(Track(0), 0)], 1, (), told.append)
    one.tell()
    one.tell()
    assert told == [one]
    assert one.on_end is not told.append
