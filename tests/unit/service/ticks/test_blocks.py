"""Blocks of several rows: they share a tick, and each of their rows ends as it would alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Cancelled, Draining, EngineFailed, Full, Late, PositionConflict
from service.ticks.admission import Limits
from service.ticks.pace import Pace
from service.ticks.row import Block, Phase, Row, Track
from service.ticks.scheduler import Scheduler, Tick

NOW = 100.0


def block(
    tracks: Sequence[Track], steps: int = 1, positions: Sequence[int] = (), deadline: float | None = None
) -> Block:
    """A block with a row of each track, whose inputs are the places of the rows."""
    rows = [
        Row(track, position) for track, position in zip(tracks, positions or [t.position for t in tracks], strict=True)
    ]
    x = np.repeat(np.arange(len(rows))[:, np.newaxis], steps, axis=1)
    return Block(rows, steps, [x], lambda block: None, deadline)


def places(one: Block) -> list[int]:
    """Where the rows of a block stood in the block that they came in."""
    return [int(x[0]) for x in one.inputs[0]]


def places_of(one: Block, tracks: Sequence[Track]) -> list[int]:
    """Which tracks a block's rows are of."""
    return [tracks.index(row.track) for row in one.rows]


def scheduler(tick_rows: int = 100, tick_steps: int = 1000, **limits: float) -> Scheduler:
    """A scheduler whose limits are out of the way unless they are given."""
    return Scheduler(Limits(100, tick_rows, tick_steps, **limits))  # type: ignore[arg-type]


def cut(queue: Scheduler, now: float = NOW) -> tuple[list[Block], list[Block]]:
    """The blocks of the next tick, and those that are refused."""
    tick, refused = queue.cut(now)
    return (tick.blocks if tick else []), refused


def cut_all(queue: Scheduler) -> tuple[list[Tick], list[Block]]:
    """All that can run now, tick after tick, and those that are refused: their end may let others run."""
    ticks: list[Tick] = []
    gone: list[Block] = []
    while True:
        tick, refused = queue.cut(NOW)
        gone += refused
        if tick is not None:
            ticks.append(tick)
        elif not refused:
            return ticks, gone


def finish(queue: Scheduler, tick: Tick, now: float = NOW) -> list[Block]:
    """End a tick whose run succeeded; the blocks that were split off meanwhile."""
    sealed = queue.seal(tick, now)
    queue.resume(tick, sealed)
    return sealed.gone


def test_a_block_runs_as_one() -> None:
    """Its rows stand side by side in one tick, next to others, and their tracks move together."""
    queue = scheduler()
    tracks = [Track(slot) for slot in range(4)]
    wide, single = block(tracks[:3], 2), block(tracks[3:], 2)
    queue.submit([wide, single])
    assert queue.queued == 4
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, tick.rows, tick.cells, queue.queued) == ([wide, single], 4, 8, 0)
    finish(queue, tick)
    assert [track.position for track in tracks] == [2, 2, 2, 2]
    assert all(not track.waiting for track in tracks)


def test_a_block_waits_for_the_slowest_of_its_sessions() -> None:
    """It runs when each of its rows is the first of its track, and whoever comes behind it waits for it."""
    queue = scheduler()
    tracks = [Track(slot) for slot in range(3)]
    first, wide = block(tracks[1:2]), block(tracks, 1, [0, 1, 0])
    behind = block(tracks[:1], 1, [1])
    queue.submit([first, wide, behind])
    for expected in (first, wide, behind):
        tick, refused = queue.cut(NOW)
        assert tick is not None
        assert (tick.blocks, refused) == ([expected], [])
        finish(queue, tick)
    assert [track.position for track in tracks] == [2, 2, 1]


def test_a_block_wider_than_a_tick_runs_in_several() -> None:
    """No tick has more rows than it may; nothing is copied, and the order stays."""
    queue = scheduler(tick_rows=4)
    wide = block([Track(slot) for slot in range(10)])
    queue.submit([wide])
    seen = []
    while queue.queued:
        tick, _ = queue.cut(NOW)
        assert tick is not None
        assert tick.rows <= 4
        (part,) = tick.blocks
        seen.append(places(part))
        assert part.inputs[0].base is not None
        finish(queue, tick)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_row_out_of_place_is_refused_alone() -> None:
    """It is told where its session is; the rest of the block runs."""
    queue = scheduler()
    tracks = [Track(slot, position=slot) for slot in range(4)]
    wide = block(tracks, 1, [0, 7, 2, 7])
    queue.submit([wide])
    (rest,), refused = cut(queue)
    assert rest is wide
    assert (places(wide), [places_of(one, tracks) for one in refused]) == ([0, 2], [[1], [3]])
    assert [(type(one.error), one.error.position) for one in refused if isinstance(one.error, PositionConflict)] == [
        (PositionConflict, 1),
        (PositionConflict, 3),
    ]
    assert queue.queued == 0


def test_a_late_block_does_not_run() -> None:
    """As a whole: its rows have one deadline."""
    queue = scheduler()
    wide = block([Track(0), Track(1)], deadline=NOW)
    queue.submit([wide])
    assert cut(queue) == ([], [wide])
    assert isinstance(wide.error, Late)


def test_some_rows_of_a_block_that_waits_are_given_up() -> None:
    """They have ended by that; the others run, and what stood behind a row that was given up is told where it is."""
    queue = scheduler()
    tracks = [Track(slot) for slot in range(4)]
    wide, behind = block(tracks, 2), block(tracks[1:2], 1, [2])
    queue.submit([wide, behind])
    (gone,) = queue.cancel([wide.rows[1], wide.rows[3]])
    assert (gone.phase, type(gone.error), len(gone.rows), queue.queued) == (Phase.REFUSED, Cancelled, 2, 3)
    assert all(row.block is gone for row in gone.rows)
    tick, refused = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, places(wide), refused) == ([wide], [0, 2], [behind])
    finish(queue, tick)
    assert [track.position for track in tracks] == [2, 0, 2, 0]
    assert queue.cancel(wide.rows) == []


def test_a_block_runs_once_what_held_it_up_is_given_up() -> None:
    """When the only row that stood behind another block is taken out, nothing else wakes the rest."""
    queue = scheduler()
    tracks = [Track(0), Track(1)]
    first, wide = block(tracks[:1]), block(tracks, 1, [1, 0])
    queue.submit([first])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    queue.submit([wide])
    assert cut(queue) == ([], [])
    queue.cancel(wide.rows[:1])
    assert cut(queue) == ([wide], [])
    assert places(wide) == [1]


def test_some_rows_of_a_block_that_runs_are_given_up() -> None:
    """They end unapplied with the tick, in a block of their own; whose states are kept is told by their places."""
    queue = scheduler()
    tracks = [Track(slot) for slot in range(4)]
    wide = block(tracks)
    queue.submit([wide])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert queue.cancel([wide.rows[0], wide.rows[2]]) == []
    sealed = queue.seal(tick, NOW)
    (gone,) = sealed.gone
    assert (sealed.applied, sealed.kept, type(gone.error), places_of(gone, tracks)) == (
        [0],
        {0: [1, 3]},
        Cancelled,
        [0, 2],
    )
    assert [track.position for track in tracks] == [0, 1, 0, 1]


def test_a_block_in_slices() -> None:
    """All of its rows go on together; one that is given up in between ends, and the rest goes on."""
    queue = scheduler(tick_steps=6)
    tracks = [Track(slot) for slot in range(3)]
    wide = block(tracks, 5)
    queue.submit([wide])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert (tick.lengths, tick.rows) == ([2], 3)
    sealed = queue.seal(tick, NOW)
    queue.cancel(wide.rows[:1])
    assert queue.resume(tick, sealed) == [wide]
    tick, (gone,) = queue.cut(NOW)
    assert tick is not None
    assert (places_of(gone, tracks), places_of(wide, tracks), wide.done) == ([0], [1, 2], 2)
    while not finish(queue, tick) and wide.phase is Phase.QUEUED:
        tick, _ = queue.cut(NOW)
        assert tick is not None
    assert [track.position for track in tracks] == [0, 5, 5]


def test_blocks_of_near_equal_length_share_a_tick() -> None:
    """Padding is counted in rows, not in blocks: a hundred short rows beside one long one would be mostly padding."""
    queue = scheduler(tick_rows=200, tick_steps=100_000, sliced=False)
    wide, long = block([Track(slot) for slot in range(90)], 10), block([Track(0)], 100)
    queue.submit([long, wide])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert tick.blocks == [long]


def test_a_tick_is_halved_down_to_single_rows() -> None:
    """So that one row that the model fails on does not cost the others theirs."""
    queue = scheduler()
    tracks = [Track(slot) for slot in range(5)]
    queue.submit([block(tracks[:4]), block(tracks[4:])])
    tick, _ = queue.cut(NOW)
    assert tick is not None
    ticks = [tick]
    while any(one.rows > 1 for one in ticks):
        ticks = [half for one in ticks for half in (queue.halve(one) if one.rows > 1 else (one,))]
    assert [places_of(one.blocks[0], tracks) for one in ticks] == [[0], [1], [2], [3], [4]]
    assert all(track.waiting[0] is one.blocks[0] for track, one in zip(tracks, ticks, strict=True))


def test_many_long_chunks_run_in_turn() -> None:
    """No more side by side than is to advantage: the first are done first, and single steps fill the tick."""
    pace = Pace()
    for rows in (1, 2, 4, 64):
        # Four rows at a time are as quick as any number, step for step.
        pace.learn(rows, 1, max(rows, 4) * 0.001)
    queue = Scheduler(Limits(1000, 64, 8192, short_tick_s=0.001), pace)
    long, short = [block([Track(n)], 8) for n in range(40)], block([Track(99)])
    queue.submit([*long[:10], short, *long[10:]])
    done: list[Block] = []
    while queue.queued:
        tick, _ = queue.cut(NOW)
        assert tick is not None
        assert len([one for one in tick.blocks if one in long]) <= 4
        finish(queue, tick)
        done += [one for one in tick.blocks if one.phase is Phase.APPLIED]
    assert [one for one in done if one is not short] == long
    assert short in done[:5]


def test_single_steps_keep_the_slices_of_others_short() -> None:
    """The more of them come the shorter; a rare one costs the others little, and without any slices are long."""
    pace = Pace()
    for rows in (1, 2, 4, 64):
        pace.learn(rows, 1, max(rows, 4) * 0.001)
    queue = Scheduler(Limits(1000, 64, 8192, short_tick_s=0.008, long_tick_s=0.064), pace)

    def longest(now: float) -> int:
        queue.submit([block([Track(n)], 100) for n in range(40)], now)
        tick, _ = queue.cut(now)
        assert tick is not None
        queue.clear(Draining("enough"))
        queue.fail(tick.blocks, Draining("enough"))
        return max(tick.lengths)

    def single_steps(a_second: int, begin: float) -> float:
        """Come for some seconds; when the last one did."""
        for number in range(5 * a_second):
            queue.submit([block([Track(99)])], begin + number / a_second)
            queue.clear(Draining("enough"))
        return begin + 5 - 1 / a_second

    assert longest(NOW) == 16
    now = single_steps(100, NOW + 1)
    assert longest(now) == 2
    assert longest(now + 60) == 16
    now = single_steps(1, NOW + 100)
    # Four rows of one step take 4 ms, and 10 ms are right for one a second.
    assert 2 <= longest(now + 0.5) <= 4
    lengths = [longest(now + 0.5 + late) for late in range(6)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 16


@pytest.mark.parametrize("long_s", [0.01, 0.05, 0.06, 0.064, 0.09])
def test_no_tick_is_longer_than_the_longest_nor_shorter_than_the_shortest(long_s: float) -> None:
    """However long ago the last single step came."""
    queue = Scheduler(Limits(1000, 64, 8192, short_tick_s=0.002, long_tick_s=long_s))
    queue.submit([block([Track(n) for n in range(50)])], NOW)
    lengths = [queue._slice_s(NOW + late / 20) for late in range(400)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0.002
    assert lengths[-1] == max(lengths) == long_s


def test_what_runs_is_work_that_is_ahead() -> None:
    """A deadline that leaves no time for the tick that runs, and for the steps of one's own, is refused at once."""
    pace = Pace()
    pace.learn(1, 1, 1.0)
    pace.learn(8, 1, 1.0)
    queue = Scheduler(Limits(1000, 8, 8192), pace)
    queue.submit([block([Track(n) for n in range(8)], 20)], NOW)
    tick, _ = queue.cut(NOW)
    assert tick is not None
    assert queue.queued == 0
    with pytest.raises(Full, match="their deadline comes sooner"):
        queue.submit([block([Track(9)], 1, deadline=NOW + 20)], NOW)
    queue.submit([block([Track(9)], 1, deadline=NOW + 40)], NOW)
    queue.resume(tick, queue.seal(tick, NOW))
    with pytest.raises(Full, match="their deadline comes sooner"):
        queue.submit([block([Track(10)], 9, deadline=NOW + 10)], NOW)


def test_what_was_just_refused_for_want_of_time_is_refused_at_one_glance() -> None:
    """As long as there is no less to do than then, and only what would take no less and has no more time."""
    pace = Pace()
    pace.learn(1, 1, 1.0)
    pace.learn(8, 1, 1.0)
    queue = Scheduler(Limits(1000, 8, 8192), pace)
    kind = (False, 2)
    ahead = block([Track(n) for n in range(8)], 20)
    queue.submit([ahead], NOW)
    assert queue.refuses(kind, 4, NOW + 20, NOW) is None
    with pytest.raises(Full) as full:
        queue.submit([block([Track(9)], 4, deadline=NOW + 20)], NOW)
    assert str(queue.refuses(kind, 4, NOW + 20, NOW)) == str(full.value)
    assert str(queue.refuses(kind, 5, NOW + 19, NOW + 1)) == str(full.value)
    assert queue.refuses(kind, 3, NOW + 20, NOW) is None
    assert queue.refuses(kind, 4, NOW + 40, NOW) is None
    assert queue.refuses((True, 2), 4, NOW + 20, NOW) is None
    # It has passed: that is another answer.
    assert queue.refuses(kind, 4, NOW - 1, NOW) is None
    queue.cancel(ahead.rows)
    assert queue.refuses(kind, 4, NOW + 20, NOW) is None
    queue.submit([block([Track(9)], 4, deadline=NOW + 20)], NOW)


def test_what_is_refused_for_want_of_time_is_let_go_of() -> None:
    """At once, not when the collector comes by: over capacity there would be thousands, each with its inputs."""
    pace = Pace()
    pace.learn(1, 1, 1.0)
    queue = Scheduler(Limits(1000, 8, 8192), pace)
    queue.submit([block([Track(0)], 20)], NOW)
    gc.collect()
    gc.disable()
    try:
        late = block([Track(1)], 4, deadline=NOW + 10)
        inputs = weakref.ref(late.inputs[0])
        try:
            queue.submit([late], NOW)
        except Full:
            late.let_go()
        del late
        assert queue.refuses((False, 2), 4, NOW + 10, NOW) is not None
        assert inputs() is None
    finally:
        gc.enable()


def test_what_a_block_was_refused_for_says_nothing_of_a_row() -> None:
    """Many rows take longer than one."""
    pace = Pace()
    pace.learn(1, 1, 1.0)
    queue = Scheduler(Limits(1000, 1, 8192), pace)
    queue.submit([block([Track(0)], 4)], NOW)
    with pytest.raises(Full):
        queue.submit([block([Track(n) for n in range(1, 9)], 1, deadline=NOW + 10)], NOW)
    assert queue.refuses((False, 2), 1, NOW + 10, NOW) is None
    queue.submit([block([Track(1)], 1, deadline=NOW + 10)], NOW)


@given(data=st.data())
def test_one_glance_says_what_a_longer_look_would(data: st.DataObject) -> None:
    """Whatever has been queued, run, ended or given up: what is refused at one glance would be refused anyway."""
    pace = Pace()
    for rows in (1, 2, 4, 8):
        pace.learn(rows, 1, 0.5 + 0.1 * rows)
    queue = Scheduler(Limits(1000, 8, 8192), pace)
    now, number, tick = NOW, 0, None
    waiting: list[Block] = []
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.0, 0.1, 2.0]))
        what = data.draw(st.sampled_from(["come", "come", "come", "late", "late", "late", "tick", "cancel"]))
        if what == "tick":
            if tick is not None:
                pace.learn(tick.rows, tick.steps, data.draw(st.sampled_from([0.1, 1.0, 5.0])))
                queue.resume(tick, queue.seal(tick, now))
            tick, _ = queue.cut(now)
            continue
        if what == "cancel" and waiting:
            queue.cancel(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))).rows)
            continue
        steps, left_s = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([0.5, 3.0, 10.0, 40.0]))
        if what == "late":
            one = block([Track(number)], steps, deadline=now + left_s)
            number += 1
        else:
            width = data.draw(st.integers(1, 3))
            one = block([Track(number + n) for n in range(width)], steps)
            one.kind = (data.draw(st.booleans()), data.draw(st.integers(1, 3)))
            number += width
        refused = queue.refuses(one.kind, steps, now + left_s, now) if what == "late" else None
        try:
            queue.submit([one], now)
        except Full:
            continue
        assert refused is None
        waiting.append(one)


@given(data=st.data())
def test_what_is_taken_all_at_once_is_what_would_be_taken_one_by_one(data: st.DataObject) -> None:
    """Chunks of one step without deadlines, whoever they are of, given up or out of place: the same run and end."""
    quick, thorough = scheduler(tick_rows=12), scheduler(tick_rows=12)
    # As though something else were waiting somewhere.
    thorough._admission._others += 1
    tracks = [[Track(n) for n in range(20)] for _ in range(2)]
    under_way: list[list[Block]] = [[], []]
    ticks: list[list[Tick]] = [[], []]
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["come", "come", "tick", "cancel", "fail"]))
        if what == "come":
            chosen = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=4, unique=True))
            ahead = data.draw(st.integers(0, 1))
            caller = data.draw(st.integers(0, 2))
            for n, queue in enumerate((quick, thorough)):
                mine = [tracks[n][slot] for slot in chosen]
                one = block(mine, 1, [track.position + len(track.waiting) + ahead for track in mine])
                one.caller = caller
                queue.submit([one], NOW)
                under_way[n].append(one)
        elif what == "cancel" and under_way[0]:
            which = data.draw(st.integers(0, len(under_way[0]) - 1))
            row = data.draw(st.integers(0, len(under_way[0][which].rows) - 1))
            told = [
                sorted(places_of(one, tracks[n])[0] for one in queue.cancel([under_way[n][which].rows[row]]))
                for n, queue in enumerate((quick, thorough))
            ]
            assert told[0] == told[1]
        else:
            ran: list[list[list[int]]] = []
            refused: list[list[tuple[list[int], str]]] = []
            for n, queue in enumerate((quick, thorough)):
                for tick in ticks[n]:
                    if what == "fail":
                        queue.fail(tick.blocks, EngineFailed("broken"))
                    else:
                        finish(queue, tick)
                ticks[n], gone = cut_all(queue)
                ran.append(sorted(places_of(one, tracks[n]) for tick in ticks[n] for one in tick.blocks))
                refused.append(sorted((places_of(one, tracks[n]), type(one.error).__name__) for one in gone))
            assert ran[0] == ran[1]
            assert refused[0] == refused[1]
        for one, other in zip(*under_way, strict=True):
            assert (one.phase, len(one.rows)) == (other.phase, len(other.rows))
        assert [track.position for track in tracks[0]] == [track.position for track in tracks[1]]
        assert quick.queued == thorough.queued


def test_of_a_batch_only_the_slice_that_runs_is_ahead_of_a_chunk() -> None:
    """However long the batch is: a chunk waits for one of its slices, not for all. Neither it nor its rest is lost."""
    pace = Pace()
    pace.learn(1, 1, 0.001)
    queue = Scheduler(Limits(1000, 64, 8192), pace)
    batch = block([Track(0)], 100_000)
    batch.kind = (True, 2)
    queue.submit([batch], NOW)
    for _ in range(2):
        tick, _ = queue.cut(NOW)
        assert tick is not None
        for state in ("runs", "is sealed", "waits"):
            chunk = block([Track(1)], deadline=NOW + 1)
            queue.submit([chunk], NOW)
            queue.cancel(chunk.rows)
            assert queue._admission._running_steps + queue._admission._waiting_steps == batch.rows[0].block.left
            with pytest.raises(Full):
                other = block([Track(2)], deadline=NOW + 1)
                other.kind = (True, 2)
                queue.submit([other], NOW)
            if state == "runs":
                sealed = queue.seal(tick, NOW)
            elif state == "is sealed":
                queue.resume(tick, sealed)


def test_a_wide_block_in_front_gets_a_short_tick() -> None:
    """Though the others are narrow: what a tick may hold, and how long it may take, is said of what is in it."""
    pace = Pace()
    for rows, seconds in ((1, 1e-4), (256, 256e-6)):
        pace.learn(rows, 1, seconds)
    for tick_steps, steps in ((1000, 5), (100_000, 15)):
        queue = Scheduler(Limits(1000, 256, tick_steps, queued_s=1000), pace)
        queue.submit([block([Track(900 + n) for n in range(100)])], NOW)
        queue.clear(Draining("many single steps come"))
        chain = Track(0)
        queue.submit([block([Track(n) for n in range(200)], 500)], NOW)
        queue.submit([block([chain], 500, [500 * n]) for n in range(99)], NOW)
        tick, _ = queue.cut(NOW)
        assert tick is not None
        assert (len(tick.blocks[0].rows), tick.steps) == (200, steps)
        assert tick.rows * tick.steps <= tick_steps


def test_one_slow_tick_does_not_make_all_late() -> None:
    """Of many that come together all were refused as late for ever after: so many were never seen again."""
    pace = Pace()
    for rows in (1, 2, 16):
        pace.learn(rows, 1, 0.001 + rows * 1e-5)
    pace.learn(200, 1, 3.0)
    queue = Scheduler(Limits(1000, 256, 8192), pace)
    blocks = [block([Track(n)], deadline=NOW + 0.05) for n in range(200)]
    for one in blocks:
        one.kind = (True, 2)
    queue.submit(blocks, NOW)
    assert cut(queue) == (blocks, [])


def test_what_came_too_late_says_nothing_of_the_work() -> None:
    """A client whose deadlines are past when they come does not make admission more careful for others."""
    queue = scheduler()
    for _ in range(10):
        queue.submit([block([Track(0)], deadline=NOW - 1), block([Track(1)])], NOW)
        tick, (late,) = queue.cut(NOW)
        assert tick is not None
        assert isinstance(late.error, Late)
        finish(queue, tick)
    assert queue._admission._caution == 1.25


def test_rows_out_of_place_are_not_split_off_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are at one place go together, and others in halves; each is told its own place."""
    moved = 0
    split = Block.split

    def counted(self: Block, rows: Sequence[int]) -> Block:
        nonlocal moved
        moved += len(self.rows)
        return split(self, rows)

    monkeypatch.setattr(Block, "split", counted)
    for places, most in ((1, 256), (256, 256 * 9)):
        moved = 0
        queue = Scheduler(Limits(1000, 512, 8192))
        tracks = [Track(n, position=n % places) for n in range(256)]
        wide = block([*tracks, Track(256)], 1, [1000] * 256 + [0])
        queue.submit([wide], NOW)
        (rest,), refused = cut(queue)
        assert (rest, len(rest.rows), len(refused), queue.queued, queue._admission._bytes) == (wide, 1, places, 0, 0)
        assert moved <= most + 257
        for one in refused:
            assert isinstance(one.error, PositionConflict)
            assert {row.track.position for row in one.rows} == {one.error.position}


def test_the_margin_follows_what_becomes_of_the_rows() -> None:
    """Late rows make admission more careful, up to a bound, and rows in time less; it never locks itself shut."""
    queue = Scheduler(Limits(1000, 8, 8192), Pace())
    for _ in range(100):
        queue.submit([block([Track(0)], deadline=NOW + 1)], NOW)
        tick, _ = queue.cut(NOW)
        assert tick is not None
        finish(queue, tick, NOW + 2)
    assert queue._admission._caution == 2.5
    for _ in range(100):
        queue.submit([block([Track(0)], deadline=NOW + 1)], NOW)
        tick, _ = queue.cut(NOW)
        assert tick is not None
        finish(queue, tick, NOW)
    assert queue._admission._caution == 1.25


def test_an_optional_delay_lets_others_come() -> None:
    """A tick waits until it is full or its first row has waited for so long; what a tick left over does not wait."""
    queue = scheduler(tick_rows=3, delay_s=0.5)
    queue.submit([block([Track(0)])], NOW)
    assert queue.delay_s(NOW + 0.2) == pytest.approx(0.3)
    queue.submit([block([Track(1)])], NOW + 0.4)
    assert queue.delay_s(NOW + 0.4) == pytest.approx(0.1)
    assert queue.delay_s(NOW + 0.5) == 0
    queue.submit([block([Track(2), Track(3)])], NOW + 0.4)
    assert queue.delay_s(NOW + 0.4) == 0
    queue.cut(NOW + 0.4)
    assert (queue.queued, queue.delay_s(NOW + 0.4)) == (2, 0)
    cut(queue)
    queue.submit([block([Track(4)], deadline=NOW + 0.8)], NOW + 0.6)
    # Of the time that a deadline leaves, no more than half.
    assert queue.delay_s(NOW + 0.6) == pytest.approx(0.1)
    assert queue.delay_s(NOW + 0.75) == 0


@given(st.data())
def test_random_blocks_end_each_row_once_and_in_order(data: st.DataObject) -> None:
    """Whatever is submitted, given up, late, split or halved: each row ends once, a track's steps in a row."""
    limits = Limits(queued_rows=20, tick_rows=4, tick_steps=data.draw(st.sampled_from([8, 100])))
    queue = Scheduler(limits)
    tracks = [Track(slot) for slot in range(6)]
    ends = [0] * 6
    accepted: list[Row] = []
    ended: list[Row] = []
    applied: dict[Track, list[Row]] = {track: [] for track in tracks}
    now = 0.0

    def end(blocks: Sequence[Block]) -> None:
        for one in blocks:
            assert one.phase in (Phase.APPLIED, Phase.REFUSED)
            assert all(row.block is one for row in one.rows)
            assert one.phase is Phase.APPLIED or not one.inputs
            ended.extend(one.rows)

    def run(tick: Tick) -> None:
        if tick.rows > 1 and data.draw(st.booleans()):
            for half in queue.halve(tick):
                run(half)
            return
        sealed = queue.seal(tick, now)
        end(sealed.gone)
        for index in sealed.applied:
            for row in tick.blocks[index].rows:
                applied[row.track].append(row)
        resumed = queue.resume(tick, sealed)
        end([one for one in tick.blocks if one not in resumed])

    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "cancel", "tick"]))
        if action == "submit":
            which = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
            steps = data.draw(st.integers(1, 5))
            starts = [data.draw(st.sampled_from([ends[n], tracks[n].position])) for n in which]
            deadline = data.draw(st.none() | st.floats(now - 1, now + 3))
            new = block([tracks[n] for n in which], steps, starts, deadline)
            try:
                queue.submit([new], now)
            except Full:
                assert queue.queued
            else:
                accepted += new.rows
                for n, start in zip(which, starts, strict=True):
                    ends[n] = start + steps
        elif action == "cancel" and accepted:
            end(queue.cancel(data.draw(st.lists(st.sampled_from(accepted), min_size=1, max_size=5, unique=True))))
        else:
            tick, refused = queue.cut(now)
            end(refused)
            if tick is None:
                continue
            assert tick.rows <= limits.tick_rows
            running = [row for one in tick.blocks for row in one.rows]
            assert len({row.track for row in running}) == len(running)
            for victim in data.draw(st.lists(st.sampled_from(running), max_size=2, unique=True)):
                assert queue.cancel([victim]) == []
            now += data.draw(st.floats(0, 2))
            queue.pace.learn(tick.rows, tick.steps, data.draw(st.floats(0, 2)))
            run(tick)
    while queue.queued:
        tick, refused = queue.cut(now)
        assert tick or refused
        end(refused)
        if tick is not None:
            run(tick)
    assert len(ended) == len(accepted)
    assert set(ended) == set(accepted)
    assert all(not track.waiting for track in tracks)
    for track, rows in applied.items():
        assert [row.position for row in rows] == [
            sum(before.block.steps for before in rows[:index]) for index in range(len(rows))
        ]
        assert track.position == sum(row.block.steps for row in rows)
    assert queue._admission._waiting_steps == queue._admission._bytes == queue._admission.blocks == 0


def test_a_chunk_leaves_no_small_rest() -> None:
    """A fifth of it would cost another tick: it runs whole. Of a batch the rest runs beside others."""
    pace = Pace()
    for rows in (1, 2, 4, 64):
        pace.learn(rows, 1, max(rows, 4) * 0.001)
    for batch, slices in ((False, [10]), (True, [8, 2])):
        queue = Scheduler(Limits(1000, 64, 8192, short_tick_s=0.032, long_tick_s=0.032), pace)
        one = block([Track(0)], 10)
        one.kind = (batch, 2)
        queue.submit([one], NOW)
        ran = []
        while queue.queued:
            tick, _ = queue.cut(NOW)
            assert tick is not None
            ran += tick.lengths
            finish(queue, tick)
        assert ran == slices


def linear(rows_seen: Sequence[int] = (1, 16, 64), first_s: float = 0.0001, each_s: float = 0.00004) -> Pace:
    """What was learned of a model that takes ``first_s`` and ``each_s`` a row for each step."""
    pace = Pace()
    for rows in rows_seen:
        for steps in (1, 16):
            pace.learn(rows, steps, steps * (first_s + rows * each_s))
    return pace


def sequence(steps: int, track: Track) -> Block:
    """A sequence of a batch."""
    one = block([track], steps)
    one.kind = (True, 2)
    return one


def test_batches_do_not_make_a_tick_of_chunks_long() -> None:
    """They fill it only as far as it then takes no longer than it may: the next chunk waits for one short tick."""
    queue = Scheduler(Limits(1000, 64, 8192, short_tick_s=0.004), linear())
    queue.submit([block([Track(200 + n) for n in range(100)])], NOW)
    queue.clear(Draining("many single steps come"))
    queue.submit([sequence(100, Track(n)) for n in range(63)], NOW)
    queue.submit([block([Track(98)])], NOW)
    queue.submit([block([Track(99)], 100)], NOW)
    kinds = set()
    for _ in range(6):
        tick, _ = queue.cut(NOW)
        assert tick is not None
        assert tick.steps * (0.0001 + tick.rows * 0.00004) <= 0.0041
        kinds |= {one.batch for one in tick.blocks}
        finish(queue, tick)
    assert kinds == {True, False}


def test_batches_that_wait_make_no_chunk_late() -> None:
    """Whether a chunk can be done in time is told from the tick that it would be in, not from all that waits."""
    queue = Scheduler(Limits(1000, 64, 8192, short_tick_s=0.004), linear())
    chunks = [block([Track(1)]), block([Track(2)], deadline=NOW + 0.002)]
    queue.submit([sequence(100, Track(10 + n)) for n in range(100)], NOW)
    for chunk in chunks:
        queue.submit([chunk], NOW)
    tick, refused = queue.cut(NOW)
    assert tick is not None
    assert (tick.blocks, refused) == (chunks, [])
