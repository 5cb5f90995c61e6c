"""Sequences: what START, END and a position mean to a request that names its sequence by an id.

Owns the line of each sequence, in which its steps run one after the other in the order of their arrival, and what
becomes of a START or an END that comes to nothing. The rules are those of the Open Inference Protocol's sequence
extension as Triton serves it; positions and epochs add to them what exactly once needs. Must not know grpc. Lives on
the event loop's thread.

A sequence is a session whose owner is the caller's key with the model's name behind it: ids are each model's and each
key's own, and the native door does not see them. START opens one, in the place of a live one if there is: both exist
until the first step has been applied, or has come to nothing, and only then is one of them given up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from service.chunks import runner_of
from service.errors import (
    ConveyorError,
    EngineFailed,
    Full,
    InvalidRequest,
    NotFound,
    PositionConflict,
    SequenceEnded,
    SequenceExpired,
    SequenceLost,
    SequenceMissing,
    SessionExpired,
    SessionLost,
)
from service.manifest import Manifest
from service.operations import Operations, Start
from service.replies import Ended
from service.session import Pending, Reply, Session
from service.sessions import check_id
from service.ticks.runner import Runner

Array = NDArray[np.generic]
Key = tuple[bytes, str]
log = structlog.get_logger()


class Load:
    """What a request holds while steps of it wait for their turns, counted once however many they are.

    Attributes:
        size: bytes.
        steps: how many of its steps wait.
    """

    __slots__ = ("size", "steps")

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.steps = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Consecutive steps of one sequence, as they were asked for.

    Attributes:
        owner: digest of the caller's key; empty for none.
        model: name of the model.
        version: of it; 0 for the newest, or for the one that the sequence is on.
        identity: the sequence's id as text; the number 5 and the text "5" are one sequence.
        start: whether the sequence begins with them; a live one begins anew.
        end: whether it ends with them.
        read: decodes the inputs for the manifest of the model that the sequence is on: one array [T, ...] an input.
            Called at most once, when the turn of the steps has come; what it raises is the answer.
        load: of the request that they are part of.
        position: where they begin; None for where the sequence then is.
        epoch: the life of the sequence that they are meant for, a number that its client drew for the START; 0 for
            whichever there is.
        deadline: on the clock; None for none.
        priority: 1 first, 2 as usual, 3 last.
        caller: among whom a model's time is shared out.
    """

    owner: bytes
    model: str
    version: int
    identity: str
    start: bool
    end: bool
    read: Callable[[Manifest], Sequence[Array]]
    load: Load = field(default_factory=Load)
    position: int | None = None
    epoch: int = 0
    deadline: float | None = None
    priority: int = 2
    caller: Hashable = None

    @property
    def key(self) -> Key:
        """Owner and id of the sequence's session."""
        return _key(self.owner, self.model, self.identity)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step is answered.

    Attributes:
        reply: the outputs, and the steps that they belong to.
        version: of the model, that the sequence is on.
        manifest: of that version.
        position: how many steps of the sequence have been applied.
        epoch: of the sequence.
    """

    reply: Reply
    version: int
    manifest: Manifest
    position: int
    epoch: int


Answer = Callable[[Stepped | ConveyorError], None]


class Ticket:
    """A step on its way, to be given back to ``Sequences.abandon`` if its caller goes away."""

    __slots__ = ("_answer", "_settle", "accepted", "key", "pending", "session", "start", "step", "waits", "wanted")

    def __init__(self, step: Step, answer: Answer, settle: Callable[[Ticket, Reply | ConveyorError], None]) -> None:
        self.step = step
        self.key = step.key
        # When it was accepted, if it has to wait before it is begun.
        self.accepted: float | None = None
        self.waits = False
        self.wanted = True
        self.session: Session | None = None
        self.start: Start | None = None
        self.pending: Pending | None = None
        self._answer = answer
        self._settle = settle

    def answer(self, result: Reply | ConveyorError) -> None:
        """Take what the session says has become of the step."""
        self._settle(self, result)

    def tell(self, result: Stepped | ConveyorError) -> None:
        """Tell the caller, unless it has gone."""
        answer = self._answer
        self.let_go()
        if self.wanted:
            answer(result)

    def let_go(self) -> None:
        """Hold nothing any more: whoever keeps the ticket must not keep inputs, model and itself by it."""
        self.session = self.start = self.pending = None
        del self.step, self._answer


class Line:
    """The steps of one sequence that have not ended; only the first of them is with its session."""

    __slots__ = ("moving", "tickets")

    def __init__(self) -> None:
        self.tickets: OrderedDict[Ticket, None] = OrderedDict()
        self.moving = False


class Sequences:
    """All sequences of a server.

    Args:
        operations: what is asked of sessions.
        max_waiting: most steps that wait for earlier ones of their sequence.
        max_waiting_bytes: most bytes that they hold.
        clock: tells the time, in seconds.
    """

    def __init__(
        self, operations: Operations, max_waiting: int, max_waiting_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._operations = operations
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._clock = clock
        self._lines: dict[Key, Line] = {}
        self._waiting = 0
        self._waiting_bytes = 0

    @property
    def waiting(self) -> int:
        """How many steps wait for earlier ones of their sequences."""
        return self._waiting

    def runner(self, owner: bytes, model: str, version: int, identity: str, start: bool) -> Runner:
        """The model that a step would run on, as things stand.

        Raises:
            Loading, ModelUnknown: as their names say.
        """
        if not start:
            with suppress(NotFound):
                return runner_of(self._operations.find(*_key(owner, model, identity)))
        return self._operations.repository.find(model, version)

    def submit(self, step: Step, answer: Answer) -> Ticket:
        """Take a step. It is answered once, now or later, on this thread, unless it is abandoned.

        The steps of one sequence are applied and answered in the order of their arrival. Only what cannot be taken at
        all, for want of room or because the server drains, is answered before those that wait.

        Args:
            step: what is asked.
            answer: takes the result, or the error: InvalidRequest if it can never succeed as it stands, or if the
                sequence is not live and START is missing; ModelUnknown, NotStreamable, PositionConflict, EpochConflict,
                Full, Late, Cancelled, Draining, Loading, EngineFailed as their names say.
        """
        ticket = Ticket(step, answer, self._settle)
        line = self._lines.get(ticket.key)
        if line is None:
            line = self._lines[ticket.key] = Line()
            line.tickets[ticket] = None
            self._go_on(ticket.key, line)
            return ticket
        try:
            self._check_room(step.load)
        except ConveyorError as error:
            ticket.tell(error)
            return ticket
        line.tickets[ticket] = None
        ticket.accepted = self._clock()
        ticket.waits = True
        self._waiting += 1
        if not step.load.steps:
            self._waiting_bytes += step.load.size
        step.load.steps += 1
        self._operations.intake.count_in(1)
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Give a step up, which is not answered then. The sequence goes on once it is known what became of it."""
        ticket.wanted = False
        line = self._lines.get(ticket.key)
        if line is None or ticket not in line.tickets:
            return
        if ticket.waits:
            del line.tickets[ticket]
            self._wait_no_more(ticket.step.load)
            ticket.let_go()
        elif ticket.pending is not None and ticket.session is not None:
            self._operations.chunks.cancel(ticket.session, ticket.pending)

    def _check_room(self, load: Load) -> None:
        self._operations.intake.check()
        if self._waiting >= self._max_waiting:
            raise Full(
                f"{self._waiting} steps are waiting for earlier ones of their sequences, which is the limit; "
                "try again later"
            )
        more = 0 if load.steps else load.size
        if self._waiting_bytes + more > self._max_waiting_bytes:
            raise Full(
                f"{self._waiting_bytes} bytes are waiting for earlier steps of their sequences and {more} more "
                f"would pass the limit of {self._max_waiting_bytes}; try again later"
            )

    def _wait_no_more(self, load: Load) -> None:
        self._waiting -= 1
        load.steps -= 1
        if not load.steps:
            self._waiting_bytes -= load.size
        self._operations.intake.count_out(1)

    def _go_on(self, key: Key, line: Line) -> None:
        """Begin the next step of a sequence, and the one behind it where it has ended at once, and so on."""
        if line.moving:
            return
        line.moving = True
        while line.tickets:
            ticket = next(iter(line.tickets))
            waited, ticket.waits, load = ticket.waits, False, ticket.step.load
            self._begin(ticket)
            if waited:
                self._wait_no_more(load)
            if ticket in line.tickets:
                break
        line.moving = False
        if not line.tickets:
            del self._lines[key]

    def _begin(self, ticket: Ticket) -> None:
        try:
            self._step(ticket)
        except ConveyorError as error:
            # Where it was raised is nobody's business, and would hold the step for as long as the error is held.
            self._settle(ticket, error.with_traceback(None))
        except Exception:
            log.exception("a step of a sequence failed", model=ticket.step.model)
            self._settle(ticket, EngineFailed("internal error"))

    def _step(self, ticket: Ticket) -> None:
        """Hand a step to its session."""
        step, operations = ticket.step, self._operations
        _check(step)
        session = gone = None
        try:
            session = operations.find(*ticket.key)
        except NotFound as error:
            # An error holds this frame, which must not hold the error.
            gone = type(error)
        ended = operations.replies.ended(ticket.key)
        position = 0 if step.start else step.position
        if step.start and not _same_life(step, session or ended):
            runner = operations.repository.find(step.model, step.version)
            inputs = step.read(runner.manifest)
            accepted = ticket.accepted is not None
            ticket.start = operations.start(*ticket.key, runner, session, step.epoch, accepted)
            session = ticket.start.session
        elif session is not None:
            if step.version not in (0, session.home.version):
                raise InvalidRequest(
                    f"sequence {step.identity} is on version {session.home.version} of model {step.model!r}, and this "
                    f"request is for version {step.version}: START it anew to change"
                )
            runner = runner_of(session)
            inputs = step.read(runner.manifest)
        elif ended is not None and position is not None and self._is_answered(step, position, ended):
            operations.chunks.count_replay()
            self._finish(ticket, Stepped(ended.reply, ended.version, ended.manifest, ended.position, ended.epoch))
            return
        else:
            raise self._missing(step, gone, ended)
        ticket.session = session
        ticket.pending = operations.chunks.step(
            session,
            runner,
            step.epoch,
            session.position if position is None else position,
            inputs,
            step.deadline,
            ticket,
            step.priority,
            ticket.accepted,
            step.caller,
            None if ticket.start is None else ticket.start.former,
        )

    def _is_answered(self, step: Step, position: int, ended: Ended) -> bool:
        """Whether a step is the last one of a sequence that has ended, sent again."""
        if position != ended.reply.position or step.epoch not in (0, ended.epoch):
            return False
        return step.version in (0, ended.version) and len(step.read(ended.manifest)[0]) == ended.reply.steps

    def _missing(self, step: Step, gone: type[NotFound] | None, ended: Ended | None) -> ConveyorError:
        """Say that there is no sequence to step, and what became of the one that there was."""
        self._operations.check_streamable(self._operations.repository.find(step.model, step.version))
        if step.start and ended is not None:
            return PositionConflict(
                f"sequence {step.identity} has been ended in this epoch, at position {ended.position}", ended.position
            )
        text = (
            f"inference request for sequence {step.identity} to model '{step.model}' must specify the START flag on "
            "the first request of the sequence"
        )
        if ended is not None:
            return SequenceEnded(f"{text}; the last one was ended at position {ended.position}")
        if gone is SessionExpired:
            timeout_s = self._operations.sessions.idle_timeout_s
            return SequenceExpired(f"{text}; the last one has expired: it was idle for more than {timeout_s:g} s")
        if gone is SessionLost:
            return SequenceLost(f"{text}; the last one is lost: the server was started anew without its state")
        return SequenceMissing(text)

    def _settle(self, ticket: Ticket, result: Reply | ConveyorError) -> None:
        """Make what hangs on a step's end follow it, then answer."""
        step, session, operations = ticket.step, ticket.session, self._operations
        if isinstance(result, ConveyorError):
            if ticket.start is not None:
                operations.undo(ticket.start)
            self._finish(ticket, result)
            return
        assert session is not None
        if ticket.start is not None:
            operations.keep(ticket.start)
            operations.replies.forget(ticket.key)
        version, manifest = session.home.version, runner_of(session).manifest
        position = result.position + result.steps
        if step.end:
            operations.sessions.end(session)
            operations.replies.keep(ticket.key, Ended(result, session.epoch, version, manifest, self._clock()))
        self._finish(ticket, Stepped(result, version, manifest, position, session.epoch))

    def _finish(self, ticket: Ticket, result: Stepped | ConveyorError) -> None:
        line = self._lines[ticket.key]
        del line.tickets[ticket]
        model = ticket.step.model
        try:
            ticket.tell(result)
        except Exception:
            # A caller that cannot take its answer must not hold those behind it up.
            log.exception("an answer was not taken", model=model)
        self._go_on(ticket.key, line)


def _key(owner: bytes, model: str, identity: str) -> Key:
    return owner + b"/" + model.encode(), identity


def _check(step: Step) -> None:
    if not step.identity:
        raise InvalidRequest("the sequence has no id; expected a number other than 0, or a text")
    check_id(step.identity, "sequence")
    if step.position is not None and step.position < 0:
        raise InvalidRequest(f"the position is {step.position}; expected 0 or more")
    if step.start and step.position:
        raise InvalidRequest(f"a START begins at position 0, and this request says {step.position}")
    if not 0 <= step.epoch < 1 << 63:
        raise InvalidRequest(f"the epoch is {step.epoch}; expected 1 to {(1 << 63) - 1}, or 0 for whichever there is")


def _same_life(step: Step, life: Session | Ended | None) -> bool:
    """Whether a START is for a life that has begun already: then it was sent twice, and must not throw it away."""
    return life is not None and step.epoch == life.epoch
