"""Sequences on real operations and a real runner, whose ticks are made by hand: what START, END and position do.

The graph adds up, so that an output tells every step that went before it.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import (
    Cancelled,
    ConveyorError,
    Draining,
    EngineFailed,
    EpochConflict,
    Full,
    InvalidRequest,
    Late,
    Loading,
    ModelUnknown,
    NotStreamable,
    PositionConflict,
    SessionUnknown,
)
from service.manifest import Manifest
from service.metrics import Metrics
from service.operations import Operations
from service.repository import Repository
from service.sequences import Load, Sequences, Step, Stepped, Ticket
from service.ticks.admission import Limits
from service.ticks.row import Block
from service.ticks.runner import Runner
from tests.clock import Clock
from tests.sums import POISON, Sums

Array = NDArray[np.generic]
MUST_START = (
    "inference request for sequence {} to model 'sums' must specify the START flag on the first request of the sequence"
)


class ByHand(Runner):
    """A runner without a thread."""

    def submit(self, blocks: Sequence[Block]) -> None:
        """Queue blocks; nobody is to be woken."""
        self._notifying = True
        super().submit(blocks)

    def tick(self) -> None:
        """Run what waits, as far as one tick holds it, and tell."""
        tick, ended = self._scheduler.cut(self._clock())
        if tick is not None:
            ended = ended + self._completion.complete(self.execution.start(tick, self._clock()))
        for block in ended:
            self.execution.release(block)
        self._deliver(ended)


class Models:
    """Stands for the repository."""

    def __init__(self) -> None:
        self.runners: dict[int, ByHand] = {}

    def find(self, name: str, version: int = 0) -> Runner:
        """Look a model up."""
        runner = self.runners.get(version or max(self.runners, default=0)) if name == "sums" else None
        if runner is None:
            raise ModelUnknown(f"no model {name}, version {version}")
        return runner


@dataclass(eq=False)
class Asked:
    """A step, and what it was answered."""

    step: Step
    x: Sequence[float]
    heard: list[Stepped | ConveyorError] = field(default_factory=list)
    ticket: Ticket | None = None

    @property
    def y(self) -> list[float]:
        """The outputs that were answered."""
        (result,) = self.heard
        assert isinstance(result, Stepped), result
        (y,) = result.reply.outputs
        return [float(value) for value in y]

    @property
    def stepped(self) -> Stepped:
        """The answer, which is no error."""
        (result,) = self.heard
        assert isinstance(result, Stepped), result
        return result

    @property
    def error(self) -> ConveyorError:
        """The answer, which is an error."""
        (result,) = self.heard
        assert isinstance(result, ConveyorError), result
        return result


class House:
    """A server without its doors."""

    def __init__(self, max_waiting: int = 100, max_waiting_bytes: int = 10_000, **limits: Any) -> None:
        self.clock = Clock()
        self.models = Models()
        self.metrics = Metrics()
        self.operations = Operations(
            cast(Repository, self.models),
            max_sessions=limits.get("max_sessions", 50),
            max_reply_bytes=limits.get("max_reply_bytes", 10_000),
            idle_timeout_s=60,
            metrics=self.metrics,
            clock=self.clock,
        )
        self.operations.intake.ready = True
        self.sequences = Sequences(self.operations, max_waiting, max_waiting_bytes, self.clock)
        self.order: list[Asked] = []
        self.serve(1)

    def serve(self, version: int, streamable: bool = True) -> ByHand:
        """Enter a version of the model."""
        graph = Sums()
        graph.manifest = graph.manifest.model_copy(update={"streamable": streamable})
        limits = Limits(queued_rows=20, tick_rows=16, tick_steps=1000)
        loop = cast(asyncio.AbstractEventLoop, None)  # only the thread that this one lacks would call it
        runner = ByHand("sums", version, graph, limits, 100, self.metrics, self.clock, loop)
        self.models.runners[version] = runner
        return runner

    def ask(self, *x: float, identity: str = "5", **more: Any) -> Asked:
        """Submit a step."""
        usual: dict[str, Any] = {"owner": b"", "model": "sums", "version": 0, "start": False, "end": False}
        asked = Asked(
            Step(identity=identity, read=lambda manifest: [np.array(x)], **({"load": Load(8 * len(x))} | usual | more)),
            x,
        )

        def answer(result: Stepped | ConveyorError) -> None:
            asked.heard.append(result)
            self.order.append(asked)

        asked.ticket = self.sequences.submit(asked.step, answer)
        return asked

    def tick(self) -> None:
        """One tick of every version."""
        for runner in list(self.models.runners.values()):
            runner.tick()

    def run(self, *x: float, **more: Any) -> Asked:
        """Submit a step and run it."""
        asked = self.ask(*x, **more)
        while not asked.heard:
            self.tick()
        return asked

    def abandon(self, asked: Asked) -> None:
        """Give a step up."""
        assert asked.ticket is not None
        self.sequences.abandon(asked.ticket)

    @property
    def slots(self) -> int:
        """State slots in use, of all versions."""
        return sum(runner.pool.taken for runner in self.models.runners.values())

    @property
    def graph(self) -> Sums:
        """That of version 1."""
        return cast(Sums, self.models.runners[1].execution.engine)

    def fail(self) -> None:
        """Let every run fail from here on."""

        def fail(x: Array) -> None:
            raise RuntimeError("no")

        self.graph.before = fail


@pytest.fixture
def house() -> House:
    """One of the usual limits."""
    return House()


# --- what START and END do ---


def test_start_steps_end(house: House) -> None:
    """The state goes on from request to request, and the slot is free after END."""
    assert house.run(1, 2, start=True).y == [1, 3]
    assert house.run(10).y == [13]
    assert house.slots == 1
    last = house.run(100, end=True)
    assert (last.y, last.stepped.position, last.stepped.version) == ([113], 4, 1)
    assert (house.slots, len(house.operations.sessions)) == (0, 0)


def test_start_and_end_in_one_request(house: House) -> None:
    """A whole sequence in one request leaves no slot taken; its reply is kept until the id is used again."""
    assert house.run(1, 2, start=True, end=True).y == [1, 3]
    assert house.operations.replies.held == 16
    assert house.run(5, start=True).y == [5]
    assert house.operations.replies.held == 8
    assert house.run(5, start=True, end=True).y == [5]
    assert (house.slots, house.operations.replies.held) == (0, 8)


def test_start_on_a_live_id_begins_anew(house: House) -> None:
    """From the initial state, in a new epoch, at position 0; the former life's slot is free."""
    first = house.run(1, start=True)
    again = house.run(7, start=True)
    assert (again.y, again.stepped.position, house.slots) == ([7], 1, 1)
    assert again.stepped.epoch != first.stepped.epoch
    assert house.run(1).y == [8]


def test_ids_are_each_models_and_each_keys_own(house: House) -> None:
    """One id under two keys is two sequences; and the native door knows neither."""
    house.run(1, start=True, owner=b"mine")
    house.run(2, start=True, owner=b"yours")
    assert house.run(0, owner=b"mine").y == [1]
    assert house.run(0, owner=b"yours").y == [2]
    assert "must specify the START" in str(house.run(0).error)
    assert [session.owner for session in house.operations.sessions] == [b"mine/sums", b"yours/sums"]
    with pytest.raises(SessionUnknown):
        house.operations.find(b"mine", "5")


def test_a_missing_start_is_told_apart(house: House) -> None:
    """Never seen, ended, expired, lost: one beginning that clients know, and what became of the last one."""
    assert str(house.run(1).error) == MUST_START.format(5)
    house.run(1, start=True, end=True)
    assert str(house.run(1).error) == MUST_START.format(5) + "; the last one was ended at position 1"
    house.run(1, start=True)
    house.clock.now += 60
    assert str(house.run(1).error) == (
        MUST_START.format(5) + "; the last one has expired: it was idle for more than 60 s"
    )
    house.operations.sessions.lose(b"/sums", "lost")
    assert str(house.run(1, identity="lost").error) == (
        MUST_START.format("lost") + "; the last one is lost: the server was started anew without its state"
    )
    assert isinstance(house.run(1).error, InvalidRequest)
    for identity in ("5", "lost"):
        assert house.run(1, identity=identity, start=True).y == [1]
        house.run(1, identity=identity, end=True)
        assert "ended" in str(house.run(1, identity=identity).error)


def test_what_no_sequence_can_be(house: House) -> None:
    """An unknown model, one that reads backward, malformed ids, positions and epochs are refused, each by its name."""
    assert isinstance(house.run(1, model="other").error, ModelUnknown)
    assert isinstance(house.run(1, start=True, version=9).error, ModelUnknown)
    assert "1 to 128" not in str(house.run(1, identity="5").error)
    assert "a sequence id is up to 128" in str(house.run(1, identity="x" * 129, start=True).error)
    assert "position is -1" in str(house.run(1, position=-1).error)
    assert "a START begins at position 0, and this request says 3" in str(house.run(1, start=True, position=3).error)
    assert "the epoch is -1" in str(house.run(1, start=True, epoch=-1).error)
    house.serve(2, streamable=False)
    for start in (True, False):
        assert isinstance(house.run(1, start=start).error, NotStreamable)
    assert house.slots == 0


def test_an_id_that_is_none(house: House) -> None:
    """The empty id opens nothing: a door that lets it through is told."""
    assert isinstance(house.run(1, identity="", start=True).error, InvalidRequest)
    assert house.slots == 0


def test_a_server_that_loads(house: House) -> None:
    """Whether a sequence is live is not known before those of the last process are there."""
    house.operations.intake.ready = False
    for start in (True, False):
        assert isinstance(house.run(1, start=start).error, Loading)


# --- versions ---


def test_a_sequence_stays_on_its_version_until_it_starts_anew(house: House) -> None:
    """A newer version takes over at START; asking for another one without START names both."""
    house.run(1, start=True)
    house.serve(2)
    assert house.run(1).stepped.version == 1
    assert house.run(1, version=1).stepped.version == 1
    wrong = house.run(1, version=2).error
    assert "is on version 1" in str(wrong)
    assert "for version 2" in str(wrong)
    again = house.run(1, start=True)
    assert (again.y, again.stepped.version) == ([1], 2)
    assert [runner.pool.taken for runner in house.models.runners.values()] == [0, 1]
    assert house.run(4, version=1, start=True).stepped.version == 1


def test_a_start_on_another_version_that_fails_changes_nothing(house: House) -> None:
    """The former life goes on, on the version that it was on."""
    house.run(1, start=True)
    newer = cast(Sums, house.serve(2).execution.engine)

    def fail(x: Array) -> None:
        raise RuntimeError("no")

    newer.before = fail
    assert isinstance(house.run(1, start=True).error, EngineFailed)
    still = house.run(1)
    assert (still.y, still.stepped.version) == ([2], 1)


def test_an_ended_sequence_does_not_hold_its_model(house: House) -> None:
    """The reply that is kept outlives the model version; the resent END still gets it once that has gone."""
    house.run(1, start=True, end=True, position=0)
    house.serve(2)
    runner = weakref.ref(house.models.runners.pop(1))
    gc.collect()
    assert runner() is None
    again = house.run(1, position=0)
    assert (again.y, again.stepped.version) == ([1], 1)


# --- commit after success ---

FAILURES = [
    "bad input",
    "full",
    "late",
    "failed",
    "abandoned while queued",
    "abandoned while running",
    "late in its run",
]


def come_to_nothing(house: House, how: str, **more: Any) -> None:
    """Submit a step that is not applied."""
    if how == "bad input":

        def refuse(manifest: Manifest) -> Sequence[Array]:
            raise InvalidRequest("no such input")

        heard: list[Stepped | ConveyorError] = []
        plain = house.ask(1, identity="unused").step
        rest = {"start": False, "end": False, "position": None, "epoch": 0} | more
        step = Step(plain.owner, plain.model, 0, "5", read=refuse, **rest)
        house.sequences.submit(step, heard.append)
        assert isinstance(heard[0], InvalidRequest)
    elif how == "full":
        error = house.run(*[1.0] * 5000, **more).error
        assert isinstance(error, Full)
    elif how == "late":
        assert isinstance(house.run(1, deadline=house.clock.now, **more).error, Late)
    elif how == "failed":
        house.fail()
        assert isinstance(house.run(1, **more).error, EngineFailed)
        house.graph.before = lambda x: None
    elif how == "abandoned while queued":
        asked = house.ask(1, **more)
        house.abandon(asked)
        house.tick()
        assert not asked.heard
    elif how == "abandoned while running":
        asked = house.ask(1, **more)
        house.graph.before = lambda x: house.abandon(asked)
        house.tick()
        house.graph.before = lambda x: None
        assert not asked.heard
    else:
        house.graph.before = lambda x: setattr(house.clock, "now", house.clock.now + 2)
        assert isinstance(house.run(1, deadline=house.clock.now + 1, **more).error, Late)
        house.graph.before = lambda x: None


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("more", [{}, {"end": True}, {"start": True}, {"start": True, "end": True, "epoch": 99}])
def test_a_step_that_comes_to_nothing_leaves_a_live_sequence_as_it_was(
    house: House, how: str, more: dict[str, Any]
) -> None:
    """State, position, epoch, last reply and slots, whatever the flags: START has not restarted, END has not ended."""
    first = house.run(1, start=True, position=0)
    come_to_nothing(house, how, **more)
    assert house.slots == 1
    replayed = house.run(1, position=0, epoch=first.stepped.epoch)
    assert replayed.stepped == first.stepped
    going_on = house.run(10, position=1)
    assert (going_on.y, going_on.stepped.epoch) == ([11], first.stepped.epoch)
    house.run(0, end=True)
    assert (house.slots, house.operations.replies.held) == (0, 24 - 16)


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("before", ["never", "ended", "expired", "lost"])
def test_a_start_that_comes_to_nothing_opens_nothing(house: House, how: str, before: str) -> None:
    """The id is what it was: never seen, ended with its reply kept, expired or lost."""
    if before == "ended":
        house.run(3, start=True, end=True)
    elif before == "expired":
        house.run(3, start=True)
        house.clock.now += 60
    elif before == "lost":
        house.operations.sessions.lose(b"/sums", "5")
    said = str(house.run(1).error)
    come_to_nothing(house, how, start=True)
    assert str(house.run(1).error) == said
    if before == "ended":
        assert house.run(3, position=0).y == [3]
    assert (house.slots, len(house.operations.sessions)) == (0, 0)
    assert house.run(1, start=True).y == [1]


def test_a_start_without_room_opens_nothing() -> None:
    """Over the limit of sessions the answer says so; a live one can start anew all the same."""
    house = House(max_sessions=1)
    house.run(1, start=True)
    assert isinstance(house.run(1, identity="6", start=True).error, Full)
    assert house.run(5, start=True).y == [5]
    assert house.slots == 1


# --- one after the other ---


def test_steps_of_one_sequence_keep_their_order(house: House) -> None:
    """Each begins in the state that the one before left, is answered in its turn, and others run beside them."""
    asked = [house.ask(1, start=True), *(house.ask(n) for n in range(2, 5))]
    other = house.ask(7, identity="6", start=True)
    for _ in range(4):
        house.tick()
    assert [each.y for each in asked] == [[1], [3], [6], [10]]
    assert other.y == [7]
    assert house.graph.runs == [2, 1, 1, 1]
    assert [each for each in house.order if each is not other] == asked


def test_a_step_that_fails_does_not_stop_those_behind_it(house: House) -> None:
    """Without positions the next one goes on from where the sequence is; with them it is told where that is."""
    house.run(1, start=True)
    late = house.ask(5, deadline=house.clock.now)
    plain = house.ask(2)
    placed = house.ask(9, position=5)
    for _ in range(3):
        house.tick()
    assert isinstance(late.error, Late)
    assert plain.y == [3]
    assert isinstance(placed.error, PositionConflict)
    assert placed.error.position == 2
    assert house.order[1:] == [late, plain, placed]


def test_what_ends_at_once_in_a_row_is_not_a_deep_call(house: House) -> None:
    """Many that fail behind each other are all answered."""
    house = House(max_waiting=5000, max_waiting_bytes=1 << 30)
    first = house.ask(1, start=True)
    behind = [house.ask(1, position=77) for _ in range(5000)]
    house.tick()
    assert first.y == [1]
    assert all(isinstance(each.error, PositionConflict) for each in behind)


def test_what_waits_is_bounded() -> None:
    """By number and by bytes, at once and by name; what is done, or given up, makes room."""
    house = House(max_waiting=3, max_waiting_bytes=100)
    house.ask(1, start=True)
    small = [house.ask(1), house.ask(1)]
    error = house.ask(*[1.0] * 12).error
    assert isinstance(error, Full)
    assert "16 bytes are waiting" in str(error)
    assert "limit of 100" in str(error)
    small.append(house.ask(1))
    error = house.ask(1, identity="5").error
    assert isinstance(error, Full)
    assert "3 steps are waiting" in str(error)
    house.abandon(small[1])
    last = house.ask(1)
    assert not last.heard
    for _ in range(4):
        house.tick()
    assert (last.y, house.sequences._waiting, house.sequences._waiting_bytes) == ([4], 0, 0)
    assert not house.sequences._lines


def test_an_answer_that_cannot_be_taken_does_not_stop_the_sequence(house: House) -> None:
    """Whoever is behind is served all the same."""

    def choke(result: Stepped | ConveyorError) -> None:
        raise RuntimeError("gone")

    plain = house.ask(1, start=True).step
    house.sequences.submit(Step(plain.owner, "sums", 0, "5", False, False, lambda manifest: [np.ones(1)]), choke)
    last = house.ask(1)
    for _ in range(3):
        house.tick()
    assert last.y == [3]


def test_a_reader_that_breaks_is_an_internal_error(house: House) -> None:
    """Nobody is told what broke, and the next step is served."""

    def read(manifest: Manifest) -> Sequence[Array]:
        raise KeyError("secret")

    heard: list[Stepped | ConveyorError] = []
    house.sequences.submit(Step(b"", "sums", 0, "5", True, False, read), heard.append)
    assert isinstance(heard[0], EngineFailed)
    assert "secret" not in str(heard[0])
    assert house.run(1, start=True).y == [1]


def test_a_caller_that_asks_again_when_it_is_answered(house: House) -> None:
    """The next step may be submitted from inside the answer to the last."""
    house.run(1, start=True)
    later: list[Asked] = []
    step = Step(b"", "sums", 0, "5", False, False, lambda manifest: [np.ones(1)])
    house.sequences.submit(step, lambda _: later.append(house.ask(5)))
    house.tick()
    house.tick()
    assert later[0].y == [7]


# --- exactly once ---


def test_the_last_step_sent_again_gets_its_reply(house: House) -> None:
    """Also when it was the one that ended the sequence; and nothing moves."""
    house.run(1, start=True, position=0)
    for end in (False, True):
        first = house.run(2, 3, position=1, end=end)
        again = house.run(2, 3, position=1, end=end)
        assert again.stepped == first.stepped
        assert first.y == [3, 6]
    assert house.graph.runs == [1, 1]
    assert house.metrics.registry.get_sample_value("conveyor_replayed_chunks_total") == 3


def test_a_resent_end_closes(house: House) -> None:
    """A step that was applied without END, sent again with it, ends the sequence and gets its reply."""
    house.run(1, start=True, position=0)
    again = house.run(1, position=0, end=True)
    assert (again.y, house.slots) == ([1], 0)


def test_a_step_out_of_place_is_told_where_the_sequence_is(house: House) -> None:
    """Too early and too late alike."""
    house.run(1, 2, start=True, position=0)
    house.run(3, position=2)
    for position in (0, 1, 4):
        error = house.run(1, position=position).error
        assert isinstance(error, PositionConflict)
        assert error.position == 3
    assert house.run(0, position=3).y == [6]


def test_after_end_only_the_last_step_is_answered(house: House) -> None:
    """Other positions, lengths, epochs and versions, or no position at all, are told that START is missing."""
    house.run(1, start=True, epoch=7)
    house.run(2, 3, position=1, end=True)
    for more in ({"position": 0}, {"position": 3}, {}, {"position": 1, "epoch": 8}, {"position": 1, "version": 2}):
        house.serve(2)
        assert "ended at position 3" in str(house.run(2, 3, **more).error)
    assert "ended at position 3" in str(house.run(2, position=1).error)
    assert house.run(2, 3, position=1, epoch=7).y == [3, 6]


def test_what_is_kept_of_ended_sequences_is_bounded() -> None:
    """By the idle timeout, and by bytes: the oldest goes first, and live sequences take the room that they need."""
    house = House(max_reply_bytes=80)
    for n in range(4):
        house.run(*[1.0] * 3, identity=str(n), start=True, end=True)
    assert house.operations.replies.held == 72
    assert "ended" not in str(house.run(1, identity="0").error)
    assert house.run(1, 1, 1, identity="1", position=0).y == [1, 2, 3]
    house.run(*[1.0] * 8, identity="live", start=True)
    assert house.operations.replies.held == 64
    house.run(1, identity="live", end=True)
    assert house.run(1, identity="live", position=8).y == [9]
    house.clock.now += 60
    assert "ended" not in str(house.run(1, identity="live", position=8).error)
    assert house.operations.replies.held == 0


def test_a_start_sent_twice_in_one_epoch_restarts_nothing(house: House) -> None:
    """It gets its reply while it is the last step; later it is a conflict, and the later steps stay."""
    first = house.run(1, start=True, epoch=42)
    assert first.stepped.epoch == 42
    assert house.run(1, start=True, epoch=42).stepped == first.stepped
    house.run(2)
    error = house.run(1, start=True, epoch=42).error
    assert isinstance(error, PositionConflict)
    assert error.position == 2
    assert house.run(3).y == [6]
    house.run(4, end=True)
    error = house.run(1, start=True, epoch=42).error
    assert isinstance(error, PositionConflict)
    assert error.position == 4
    assert house.run(1, start=True, epoch=43).y == [1]


def test_a_whole_sequence_sent_twice_in_one_epoch(house: House) -> None:
    """START and END in one request, sent again: one run, one reply."""
    first = house.run(1, 2, start=True, end=True, epoch=42)
    assert house.run(1, 2, start=True, end=True, epoch=42).stepped == first.stepped
    assert house.graph.runs == [1]


def test_a_step_of_another_epoch_is_refused(house: House) -> None:
    """What was held up since before a START does not step the new life."""
    house.run(1, start=True, epoch=1)
    house.run(2, start=True, epoch=2)
    assert isinstance(house.run(5, epoch=1).error, EpochConflict)
    assert house.run(5, epoch=2).y == [7]


# --- drain ---


async def test_a_drain_finishes_what_waits(house: House) -> None:
    """Steps that were accepted are applied, STARTs among them; new ones are refused; resting waits for the last."""
    asked = [house.ask(1, start=True), house.ask(2, end=True), house.ask(3, start=True), house.ask(4)]
    house.operations.intake.draining = True
    rest = asyncio.create_task(house.operations.intake.rest())
    for late in (house.ask(9), house.ask(9, identity="6", start=True)):
        assert isinstance(late.error, Draining)
    for _ in asked:
        await asyncio.sleep(0)
        assert not rest.done()
        house.tick()
    await rest
    assert [each.y for each in asked] == [[1], [3], [3], [7]]
    assert isinstance(house.run(9).error, Draining)
    # The state of a live sequence is kept for the next process; its last step can still be asked for.
    assert house.run(4, position=1).y == [7]


# --- random traffic ---


class Shadow:
    """What one sequence should be."""

    def __init__(self) -> None:
        self.live = False
        self.sum = 0.0
        self.position = 0
        self.epoch = 0
        self.last: tuple[int, int, list[float]] | None = None
        self.ended = False

    def expect(self, step: Step, x: Sequence[float]) -> type[ConveyorError] | list[float] | None:
        """Say what a step must be answered: an error, a kept reply, or None where it runs."""
        if step.start and step.position:
            return InvalidRequest
        known = self.live or self.ended
        resent = step.start and step.epoch != 0 and known and step.epoch == self.epoch
        if step.start and not resent:
            return None
        position = 0 if step.start else step.position
        same = self.last is not None and (position, len(x)) == self.last[:2]
        if not self.live:
            if self.ended and same and step.epoch in (0, self.epoch):
                assert self.last is not None
                return self.last[2]
            return PositionConflict if step.start else InvalidRequest
        if step.epoch not in (0, self.epoch):
            return EpochConflict
        if position is None or position == self.position:
            return None
        if same:
            assert self.last is not None
            return self.last[2]
        return PositionConflict

    def take(self, step: Step, x: Sequence[float], stepped: Stepped) -> list[float]:
        """Apply a step, and say what it gives."""
        if step.start and not (self.live and step.epoch not in (0,) and step.epoch == self.epoch):
            self.sum, self.position, self.live, self.ended = 0.0, 0, True, False
            assert step.epoch in (0, stepped.epoch)
            self.epoch = stepped.epoch
        y = [self.sum + float(value) for value in np.cumsum(x)]
        self.last = (self.position, len(x), y)
        self.sum, self.position = y[-1], self.position + len(x)
        return y


def check(house: House, shadow: Shadow, asked: Asked, failed: type[ConveyorError] | None) -> None:
    """Hold one answer against the shadow."""
    (result,) = asked.heard
    expected = shadow.expect(asked.step, asked.x)
    if isinstance(expected, type):
        assert isinstance(result, expected), (result, expected)
        if isinstance(result, PositionConflict):
            assert result.position == shadow.position
        return
    if isinstance(result, ConveyorError):
        assert expected is None
        assert failed is not None
        assert isinstance(result, failed)
        return
    assert failed is None or expected is not None, "a step that had to fail was applied"
    y = shadow.take(asked.step, asked.x, result) if expected is None else expected
    assert asked.y == y
    assert (result.position, result.epoch) == (shadow.position, shadow.epoch)
    if asked.step.end:
        shadow.live, shadow.ended = False, True


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_random_traffic(data: st.DataObject) -> None:
    """Whatever is asked, fails, is late or given up: answered once and in order, as a plain model of it says."""
    house = House()
    asked: dict[str, list[Asked]] = {"5": [], "6": []}
    must_fail: dict[Asked, type[ConveyorError] | None] = {}
    given_up: set[Asked] = set()
    # Small whole numbers: sums of them are exact.
    values = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=3)
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["ask", "ask", "ask", "tick", "abandon", "abandon in the run"]))
        if action == "ask":
            identity = data.draw(st.sampled_from(["5", "6"]))
            x = data.draw(values)
            fate = data.draw(st.sampled_from([None, None, None, Late, EngineFailed]))
            each = house.ask(
                *(x if fate is not EngineFailed else [POISON] * len(x)),
                identity=identity,
                start=data.draw(st.integers(0, 3)) == 0,
                end=data.draw(st.integers(0, 4)) == 0,
                position=data.draw(st.none() | st.integers(0, 6)),
                epoch=data.draw(st.sampled_from([0, 0, 0, 1, 2])),
                deadline=house.clock.now if fate is Late else None,
                priority=data.draw(st.integers(1, 3)),
            )
            asked[identity].append(each)
            must_fail[each] = fate
        elif action.startswith("abandon"):
            waiting = [each for line in asked.values() for each in line if not each.heard and each not in given_up]
            if not waiting:
                continue
            victim = waiting[data.draw(st.integers(0, len(waiting) - 1))]
            if action == "abandon in the run":

                def give_up(x: Array, victim: Asked = victim) -> None:
                    house.abandon(victim)
                    poisoned(x)

                house.graph.before = give_up
                house.tick()
            if not victim.heard:
                house.abandon(victim)
                given_up.add(victim)
        house.graph.before = poisoned
        if action != "ask":
            house.tick()
    house.graph.before = poisoned
    for _ in range(sum(map(len, asked.values()))):
        house.tick()
    for identity, line in asked.items():
        shadow = Shadow()
        answered = [each for each in house.order if each.step.identity == identity]
        assert answered == [each for each in line if each not in given_up]
        for each in answered:
            check(house, shadow, each, must_fail[each])
    live = sum(1 for _ in house.operations.sessions)
    assert house.slots == live
    assert not house.sequences._lines
    assert (house.sequences._waiting, house.sequences._waiting_bytes, house.operations.intake._working) == (0, 0, 0)


def poisoned(x: Array) -> None:
    """Refuse a run with poison in it."""
    if (x == POISON).any():
        raise RuntimeError("poison")


def test_cancelled_is_told_where_somebody_still_waits(house: House) -> None:
    """A model that is stopped refuses what waits for it; the sequence's step is answered with that, and not lost."""
    asked = house.ask(1, start=True)
    runner = house.models.runners[1]
    runner._deliver(runner._scheduler.clear(Cancelled("stopped")))
    assert isinstance(asked.error, Cancelled)
    assert house.slots == 0


# --- what comes to nothing leaves nothing ---


def test_a_start_that_breaks_leaves_the_live_sequence(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory runs out: the sequence is there still, and no slot is lost."""
    house.run(1, start=True)

    def full(states: object = None) -> int:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(house.models.runners[1].pool, "allocate", full)
        assert isinstance(house.ask(5, start=True).error, EngineFailed)
    assert (house.slots, len(house.operations.sessions)) == (1, 1)
    assert house.run(2).y == [3]


def test_a_start_takes_the_place_of_the_former_reply() -> None:
    """Where replies leave no more room, a sequence may begin anew as it may go on."""
    house = House(max_reply_bytes=32)
    house.run(1, 2, 3, start=True)
    assert house.run(1, 2, 3).y == [7, 9, 12]
    assert house.run(1, 2, 3, start=True).y == [1, 3, 6]
    assert house.operations.replies.held == 24
    assert isinstance(house.run(1, 2, 3, start=True, identity="6").error, Full)


def test_what_became_of_a_sequence_is_told_to_programs(house: House) -> None:
    """Unknown, ended, expired and lost have a reason each."""
    assert house.ask(1).error.reason == "sequence_unknown"
    house.run(1, start=True, end=True)
    assert house.ask(1).error.reason == "sequence_ended"
    house.run(1, start=True, identity="old")
    house.clock.now += 60
    assert house.ask(1, identity="old").error.reason == "sequence_expired"
    house.operations.sessions.lose(b"/sums", "away")
    assert house.ask(1, identity="away").error.reason == "sequence_lost"


def test_a_resent_end_is_looked_into_also_when_its_model_has_gone(house: House) -> None:
    """It gets the reply that is kept only if it has as many steps as that one answers."""
    house.run(1, 2, start=True, end=True, position=0)
    house.models.runners.clear()
    assert house.ask(1, 2, end=True, position=0).y == [1, 3]
    assert isinstance(house.ask(1, end=True, position=0).error, ModelUnknown)


def test_a_request_of_several_steps_that_wait_counts_once() -> None:
    """Its bytes are held until the last of its steps waits no more."""
    house = House(max_waiting_bytes=100)
    for identity in ("5", "6"):
        house.ask(1, identity=identity, start=True)
    load = Load(80)
    first, second = (house.ask(1, identity=identity, load=load) for identity in ("5", "6"))
    assert isinstance(house.ask(1, 2, 3, identity="5").error, Full)
    house.abandon(first)
    assert isinstance(house.ask(1, 2, 3, identity="5").error, Full)
    house.abandon(second)
    assert not house.ask(1, 2, 3, identity="5").heard


def test_an_ended_step_is_held_by_nobody(house: House) -> None:
    """Whoever keeps its ticket keeps neither the step nor who was told, nor does an error that is kept."""
    gc.collect()
    gc.disable()
    try:
        kept = [house.run(1, start=True), house.ask(2), house.ask(3), house.ask(1, identity="6")]
        house.abandon(kept[2])
        house.tick()
        steps = [weakref.ref(asked.step.read) for asked in kept]
        tickets, errors = [asked.ticket for asked in kept], kept[3].heard
        house.order.clear()
        del kept
        assert tickets
        assert errors
        assert [step() for step in steps] == [None] * 4
    finally:
        gc.enable()
