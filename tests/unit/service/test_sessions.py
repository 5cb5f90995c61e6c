"""The session table alone: what a chunk means to a session, who owns it, when it expires, what is remembered of it."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    ConveyorError,
    Full,
    InvalidRequest,
    Late,
    PositionConflict,
    SessionExists,
    SessionExpired,
    SessionUnknown,
)
from service.session import Pending, Reply, Session
from service.sessions import SessionTable
from service.ticks.row import Block, Track
from tests.clock import Clock

ME, YOU = b"me", b"you"


class Listener:
    """A waiter that keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[Reply | ConveyorError] = []

    def answer(self, result: Reply | ConveyorError) -> None:
        """Keep it."""
        self.heard.append(result)


class Model(NamedTuple):
    """Stands for the model version that sessions run on."""

    name: str = "lstm"
    version: int = 1


class Table(SessionTable):
    """A table with its clock, that notes whose slot came back."""

    def __init__(self, limit: int = 10, idle_timeout_s: float = 60) -> None:
        self.clock = Clock()
        self.ended: list[str] = []
        super().__init__(limit, idle_timeout_s, self.clock, lambda session, _: self.ended.append(session.identity))

    def open(self, identity: str = "", owner: bytes = ME) -> Session:
        """Check and add."""
        return self.add(owner, self.check_new(owner, identity), Model(), Track(0))


class Sheet(str):
    """Stands for an array of outputs."""

    nbytes = 1


def begin(session: Session, position: int, steps: int, listener: Listener | None = None) -> Pending:
    """Take a chunk in, as it is done after the queue has it."""
    assert session.match(0, position, steps) is None
    pending = Pending(session, position, listener or Listener())
    Block([pending], steps, (), lambda block: None)
    session.pending[position] = pending
    return pending


def apply(session: Session, pending: Pending, outputs: str = "y") -> None:
    """End a chunk well."""
    session.track.position = pending.position + pending.block.steps
    tell(session, pending, Reply(pending.position, pending.block.steps, (Sheet(outputs),), 1))


def refuse(session: Session, pending: Pending, error: ConveyorError | None = None) -> None:
    """End a chunk unapplied."""
    tell(session, pending, error or Late("late"))


def tell(session: Session, pending: Pending, result: Reply | ConveyorError) -> None:
    """End a chunk, and tell who waited for it."""
    waiters, told = session.end(pending, result)
    for waiter in waiters:
        waiter.answer(told)


def test_the_next_chunk_begins_where_the_session_is() -> None:
    """At first at 0, then after each chunk where it ended, also while earlier ones are under way."""
    session = Table().open()
    first = begin(session, 0, 3)
    second = begin(session, 3, 2)
    apply(session, first)
    apply(session, second)
    begin(session, 5, 1)
    assert session.track.position == 5


def test_the_last_chunk_sent_again_gets_its_reply() -> None:
    """The same steps at the same position: the stored reply, which is the newest one's only."""
    session = Table().open()
    for position in (0, 2):
        apply(session, begin(session, position, 2), outputs=f"y at {position}")
    assert session.match(0, 2, 2) == Reply(2, 2, (Sheet("y at 2"),), 1)
    for position, steps in ((2, 1), (2, 3), (0, 2)):
        with pytest.raises(PositionConflict) as conflict:
            session.match(0, position, steps)
        assert conflict.value.position == 4
        assert f"a chunk of {steps} steps at position {position}" in str(conflict.value)
        assert "the session is at position 4" in str(conflict.value)


def test_the_last_chunk_can_be_sent_again_while_the_next_is_under_way() -> None:
    """A reply that got lost is there although the sender has sent further chunks."""
    session = Table().open()
    apply(session, begin(session, 0, 2))
    begin(session, 2, 2)
    assert isinstance(session.match(0, 0, 2), Reply)


def test_a_chunk_under_way_sent_again_is_waited_for_by_both() -> None:
    """It is not queued a second time; whoever waits is told the same, once each."""
    session = Table().open()
    first, second = Listener(), Listener()
    row = begin(session, 0, 2, first)
    pending = session.match(0, 0, 2)
    assert isinstance(pending, Pending)
    pending.waiters[second] = None
    apply(session, row)
    assert first.heard == second.heard == [Reply(0, 2, (Sheet("y"),), 1)]


@pytest.mark.parametrize("position", [1, 6, 100])
def test_a_chunk_out_of_place_is_told_where_the_session_is(position: int) -> None:
    """Too late and too early alike; the error names what is applied and what is accepted."""
    session = Table().open()
    apply(session, begin(session, 0, 2))
    begin(session, 2, 3)
    with pytest.raises(PositionConflict, match=r"at position 2, with chunks accepted up to 5") as conflict:
        session.match(0, position, 1)
    assert conflict.value.position == 2


def test_a_chunk_that_was_refused_is_the_next_one_again() -> None:
    """After an error nothing has moved: the same chunk is new, and there is no reply to repeat."""
    session = Table().open()
    listener = Listener()
    refuse(session, begin(session, 0, 2, listener))
    (heard,) = listener.heard
    assert isinstance(heard, Late)
    assert session.match(0, 0, 2) is None


def test_a_refused_chunk_does_not_cost_the_stored_reply() -> None:
    """The reply before it can still be asked for."""
    session = Table().open()
    apply(session, begin(session, 0, 2))
    refuse(session, begin(session, 2, 2))
    assert isinstance(session.match(0, 0, 2), Reply)
    assert session.match(0, 2, 2) is None


@pytest.mark.parametrize("applied", [True, False])
def test_a_chunk_that_all_have_left_can_be_sent_again_while_it_runs(applied: bool) -> None:
    """It is new then, with other steps too; if the run was applied after all, the repetition gets its reply."""
    session = Table().open()
    left, listener = Listener(), Listener()
    row = begin(session, 0, 2, left)
    session.orphan(session.pending[0])
    assert not session.at_rest
    again = begin(session, 0, 2, listener)
    if applied:
        apply(session, row)
        refuse(session, again, PositionConflict("at 2", 2))
    else:
        refuse(session, row)
        apply(session, again)
    assert (left.heard, listener.heard) == ([], [Reply(0, 2, (Sheet("y"),), 1)])
    assert (session.position, session.at_rest) == (2, True)


def test_a_conflict_that_no_reply_answers_stays_one() -> None:
    """Other steps than those that were applied are told where the session is."""
    session = Table().open()
    listener = Listener()
    row = begin(session, 0, 2)
    session.orphan(session.pending[0])
    other = begin(session, 0, 3, listener)
    apply(session, row)
    refuse(session, other, PositionConflict("at 2", 2))
    (heard,) = listener.heard
    assert isinstance(heard, PositionConflict)
    assert session.position == 2


def test_a_session_that_is_being_closed_takes_nothing() -> None:
    """Not even a repetition."""
    session = Table().open()
    apply(session, begin(session, 0, 2))
    session.closing = 1
    for position in (0, 2):
        with pytest.raises(SessionUnknown, match="being closed"):
            session.match(0, position, 2)


async def test_idle_waits_for_everything_under_way() -> None:
    """Also for what begins while it waits, and for each of several who wait; at once where nothing is under way."""
    session = Table().open()
    await session.idle()
    first = begin(session, 0, 1)
    waiting = [asyncio.create_task(session.idle()) for _ in range(2)]
    await asyncio.sleep(0)
    apply(session, first)
    second = begin(session, 1, 1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    refuse(session, second)
    await waiting[1]


# --- which sessions there are ---


def test_ids_are_given_or_made() -> None:
    """Made ones differ and are too long to guess; given ones are kept."""
    table = Table()
    assert table.open("mine").identity == "mine"
    made = {table.open().identity for _ in range(5)}
    assert len(made) == 5
    assert all(len(identity) >= 22 and identity.isascii() for identity in made)


@pytest.mark.parametrize("identity", ["x" * 129, "é", "a\nb", "\x00", "\x7f"])
def test_malformed_ids_are_refused(identity: str) -> None:
    """The error says what an id is."""
    with pytest.raises(InvalidRequest, match="up to 128 printable ASCII characters"):
        Table().open(identity)


@pytest.mark.parametrize("identity", ["x" * 128, "a b~!", "é".encode().hex()])
def test_well_formed_ids_are_taken(identity: str) -> None:
    """Any printable ASCII, up to the longest."""
    assert Table().open(identity).identity == identity


def test_an_id_is_taken_once() -> None:
    """Opened again while it is open: refused. After it has ended it is free."""
    table = Table()
    session = table.open("one")
    with pytest.raises(SessionExists, match="'one' is open already"):
        table.open("one")
    table.end(session)
    assert table.open("one") is not session


def test_owners_do_not_see_each_other() -> None:
    """One id, two owners: two sessions; and a third owner is told what it would be told of none."""
    table = Table()
    mine, yours = table.open("one", ME), table.open("one", YOU)
    assert table.find(ME, "one") is mine
    assert table.find(YOU, "one") is yours
    told = []
    for identity in ("one", "none"):
        with pytest.raises(SessionUnknown) as unknown:
            table.find(b"", identity)
        told.append(str(unknown.value).replace(identity, "ID"))
    assert told[0] == told[1]
    table.end(mine)
    assert table.find(YOU, "one") is yours


def test_the_number_of_sessions_is_limited() -> None:
    """Over the limit the error names it; a session that ends makes room."""
    table = Table(limit=2)
    first, _ = table.open(), table.open()
    with pytest.raises(Full, match="2 sessions are open, which is the limit"):
        table.open()
    table.end(first)
    table.open()
    assert len(table) == 2


def test_expired_sessions_make_room() -> None:
    """Opening one at the limit ends those that have expired first."""
    table = Table(limit=1)
    table.open("old")
    table.clock.now += 60
    table.open("new")
    assert table.ended == ["old"]


# --- expiry ---


def test_a_session_expires_after_its_idle_time() -> None:
    """Not a moment before, and its slot comes back once."""
    table = Table(idle_timeout_s=60)
    session = table.open("one")
    table.clock.now += 59.9
    assert table.find(ME, "one") is session
    table.clock.now += 0.1
    with pytest.raises(SessionExpired, match="idle for more than 60 s"):
        table.find(ME, "one")
    assert (table.ended, len(table), table.expire()) == (["one"], 0, 0)


def test_use_puts_expiry_off_and_looking_does_not() -> None:
    """Only a touch counts."""
    table = Table(idle_timeout_s=60)
    used, seen = table.open("used"), table.open("seen")
    table.clock.now += 50
    table.touch(used)
    assert table.find(ME, "seen") is seen
    table.clock.now += 50
    assert table.expire() == 1
    assert (table.ended, table.find(ME, "used")) == (["seen"], used)


@pytest.mark.parametrize("busy", ["pending", "closing"])
def test_a_session_at_work_does_not_expire(busy: str) -> None:
    """However long its chunk takes; afterwards its idle time begins anew."""
    table = Table(idle_timeout_s=60)
    session = table.open("one")
    row = begin(session, 0, 1)
    session.closing = busy == "closing"
    table.clock.now += 1000
    assert table.expire() == 0
    assert table.find(ME, "one") is session
    apply(session, row)
    session.closing = False
    table.touch(session)
    table.clock.now += 59
    assert table.expire() == 0
    table.clock.now += 1
    assert table.expire() == 1


def test_expired_closed_and_unknown_are_told_apart() -> None:
    """Expired is remembered until the id is used again; a closed one and one that never was are unknown."""
    table = Table()
    table.open("expired")
    table.clock.now += 60
    table.expire()
    table.end(table.open("closed"))
    for identity, error in (("expired", SessionExpired), ("closed", SessionUnknown), ("never", SessionUnknown)):
        with pytest.raises(error):
            table.find(ME, identity)
    with pytest.raises(SessionUnknown):
        table.find(YOU, "expired")
    table.end(table.open("expired"))
    with pytest.raises(SessionUnknown):
        table.find(ME, "expired")


def test_what_is_remembered_of_expired_sessions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten, and is unknown then."""
    monkeypatch.setattr("service.sessions._REMEMBERED", 2)
    table = Table()
    for name in ("a", "b", "c"):
        table.open(name)
        table.clock.now += 60
        table.expire()
    with pytest.raises(SessionUnknown):
        table.find(ME, "a")
    for name in ("b", "c"):
        with pytest.raises(SessionExpired):
            table.find(ME, name)


def test_a_session_that_was_set_aside_comes_back_as_used() -> None:
    """Meanwhile its id is free and it does not expire; afterwards those used before it expire before it."""
    table = Table(idle_timeout_s=60)
    first, second = table.open("first"), table.open("second")
    table.set_aside(first)
    table.clock.now += 30
    other = table.open("first")
    table.set_aside(other)
    table.put_back(first)
    assert table.find(ME, "first") is first
    table.clock.now += 30
    assert table.expire() == 1
    assert (table.ended, list(table)) == (["second"], [first])
    assert second not in list(table)


def test_what_is_remembered_outlives_a_session_that_never_was() -> None:
    """One that is opened over an expired id and taken out again leaves the id expired; one that ends does not."""
    table = Table()
    table.open("one")
    table.clock.now += 60
    table.expire()
    table.set_aside(table.open("one"))
    with pytest.raises(SessionExpired):
        table.find(ME, "one")
    table.end(table.open("one"))
    with pytest.raises(SessionUnknown):
        table.find(ME, "one")


@given(st.lists(st.tuples(st.sampled_from(["open", "touch", "end", "wait", "expire"]), st.integers(0, 7)), max_size=60))
def test_expire_ends_exactly_who_is_idle_too_long(actions: list[tuple[str, int]]) -> None:
    """Against a plain dict of last uses, under any order of opening, using, ending and waiting."""
    table = Table(limit=100, idle_timeout_s=10)
    used: dict[str, float] = {}
    for action, number in actions:
        name = str(number)
        if action == "open" and name not in used:
            table.open(name)
            # Opening expires first.
            used = {key: at for key, at in used.items() if table.clock.now - at < 10} | {name: table.clock.now}
        elif action == "touch" and name in used:
            try:
                table.touch(table.find(ME, name))
                used[name] = table.clock.now
            except SessionExpired:
                assert table.clock.now - used.pop(name) >= 10
        elif action == "end" and name in used:
            try:
                table.end(table.find(ME, name))
            except SessionExpired:
                assert table.clock.now - used[name] >= 10
            del used[name]
        elif action == "wait":
            table.clock.now += number
        elif action == "expire":
            alive = {key: at for key, at in used.items() if table.clock.now - at < 10}
            assert table.expire() == len(used) - len(alive)
            used = alive
        assert len(table) == len(used)
