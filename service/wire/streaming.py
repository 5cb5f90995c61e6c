"""One Stream call of conveyor.v1: chunks and blocks of chunks in, results out.

Owns what a chunk and its result are made of; the order of things and their bounds are the flow's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain

from conveyor.v1 import conveyor_pb2 as pb
from service.chunks import Chunk, runner_of
from service.cohort import SessionCohort
from service.errors import ConveyorError, EngineFailed, InvalidRequest, NotFound
from service.operations import Operations
from service.session import Pending, Reply, Session
from service.ticks.runner import Runner
from service.wire.assembly import Written
from service.wire.codec import Array, Codec, Tensor
from service.wire.conveyor_results import of_block, of_chunk, of_refused_block, of_refused_chunk, of_whole_block
from service.wire.conveyor_tensors import decode, steps_of
from service.wire.flow import Flow

_RESPONSE_BYTES = 1 << 20
"""Results go together into one message up to this size: clients take 4 MiB by default."""


class Stream(Flow[pb.StreamRequest, pb.Chunk | pb.Block, Written]):
    """One call.

    Args:
        operations: what is asked.
        codec: gives a model's reader.
        owner: digest of the caller's key.
        caller: among whom a model's time is shared out.
        limit: most chunks taken in and not answered; over it the stream is not read.
        limit_bytes: most bytes of results that wait to be written; over it the stream is not read either.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        operations: Operations,
        codec: Callable[[Runner], Codec],
        owner: bytes,
        caller: Hashable,
        limit: int,
        limit_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(limit, limit_bytes)
        self._operations = operations
        self._codec = codec
        self._owner = owner
        self._caller = caller
        self._clock = clock

    def parts(self, request: pb.StreamRequest) -> Iterable[pb.Chunk | pb.Block]:
        """The chunks of a message, and its blocks."""
        return chain(request.chunks, request.blocks)

    def message(self) -> Written:
        """As many results as one message should hold."""
        results: list[bytes] = []
        left = _RESPONSE_BYTES
        # What is larger goes alone: beside others it could be more than its client takes.
        while (taken := self.take(left if results else None)) is not None:
            results.append(taken[0].data)
            left -= taken[1]
        return Written(results[0] if len(results) == 1 else b"".join(results))

    def accept(self, part: pb.Chunk | pb.Block) -> None:
        """Queue a chunk or a block, or answer it."""
        if isinstance(part, pb.Block):
            self._accept_block(part)
        else:
            self._accept_chunk(part)

    def _accept_chunk(self, chunk: pb.Chunk) -> None:
        began, runner = self._clock(), None
        try:
            session = self._operations.find(self._owner, chunk.session_id)
            runner = runner_of(session)
            if chunk.position < 0 or chunk.timeout_us < 0:
                raise InvalidRequest(
                    f"position is {chunk.position} and timeout_us {chunk.timeout_us}; expected neither to be negative"
                )
            deadline = self._deadline(chunk, began)
            # Over capacity most are refused here, before they cost much; what was applied already is answered even so.
            if (
                deadline is not None
                and session.is_next(chunk.epoch, chunk.position)
                and not self._operations.intake.draining
            ):
                full = runner.refuses(steps_of(chunk.inputs), deadline)
                if full is not None:
                    self.count(runner, began, 0, 1)
                    self.put(of_refused_chunk(chunk.session_id, chunk.position, full))
                    return
            tensors = decode(chunk.inputs)
            inputs = self._codec(runner).chunk(tensors)
            waiting = _WaitingChunk(self, self._operations, session, runner, chunk.position, began)
            self.wait(waiting, max(_size(tensors), runner.manifest.reply_bytes(len(inputs[0]))))
            try:
                waiting.pending = self._operations.chunks.step(
                    session, runner, chunk.epoch, chunk.position, inputs, deadline, waiting, caller=self._caller
                )
            except BaseException:
                self.answered(waiting)
                raise
        except Exception as error:
            if runner is not None:
                self.count(runner, began, 0, 1)
            self.put(of_refused_chunk(chunk.session_id, chunk.position, error))

    def _accept_block(self, block: pb.Block) -> None:
        began, runner = self._clock(), None
        identities = tuple(block.session_ids)
        count = len(identities)
        try:
            if self._stepped_together(block, identities, began):
                return
            self._check(block)
            sessions, runner, errors = self._sessions(block)
            if runner is None:
                self.put(of_block(block.tag, 0, (), [errors[n] for n in range(count)]), count)
                return
            if any(None in output.tail for output in runner.manifest.outputs):
                # What they come out as need not fit side by side.
                raise InvalidRequest(
                    f"the outputs of model {runner.name!r} may differ in size from chunk to chunk; send single chunks"
                )
            tensors = decode(block.inputs)
            inputs, wrong = self._codec(runner).block(tensors, count)
            errors = {**wrong, **errors}
            steps = inputs[0].shape[1]
            known = [session for session in sessions if isinstance(session, Session)]
            if steps == 1 and not errors:
                chunks, owner = self._operations.chunks, self._owner
                cohort = chunks.gather(owner, identities, known, block.positions, block.epochs)
                if cohort is not None:
                    self._step_cohort(block, cohort, inputs, _size(tensors), began)
                    return
            waiting = _WaitingBlock(self, self._operations, runner, block.tag, count, steps, began)
            epochs = block.epochs or (0,) * count
            one_by_one: list[Chunk] = [
                (session, epoch, position, _Seat(waiting, n))
                for n, (session, epoch, position) in enumerate(zip(sessions, epochs, block.positions, strict=True))
                if n not in errors and isinstance(session, Session)
            ]
            if errors:
                inputs = [array[[n for n in range(count) if n not in errors]] for array in inputs]
            self.wait(waiting, max(_size(tensors), count * runner.manifest.reply_bytes(steps)), count)
        except Exception as error:
            if runner is not None:
                self.count(runner, began, 0, count)
            self.put(of_refused_block(block.tag, error), max(1, count))
            return
        for n, wrong_with in errors.items():
            waiting.take(n, wrong_with)
        if one_by_one:
            deadline = self._deadline(block, began)
            waiting.pending = self._operations.chunks.step_together(
                runner, one_by_one, steps, inputs, deadline, self._caller
            )

    def _stepped_together(self, block: pb.Block, identities: tuple[str, ...], began: float) -> bool:
        """Queue a block of one step of each session of a cohort, or answer it.

        Returns:
            False if there is no such cohort, or this is not just the next step of all of them: then it must be looked
            at one by one.
        """
        cohort = self._operations.together(self._owner, identities)
        if cohort is None or block.timeout_us < 0 or not cohort.follows(block.positions, block.epochs):
            return False
        try:
            tensors = decode(block.inputs)
            inputs, wrong = self._codec(runner_of(cohort.sessions[0])).block(tensors, len(identities))
        except ConveyorError:
            return False
        if wrong or inputs[0].shape[1] != 1:
            return False
        self._step_cohort(block, cohort, inputs, _size(tensors), began)
        return True

    def _step_cohort(
        self, block: pb.Block, cohort: SessionCohort, inputs: Sequence[Array], size: int, began: float
    ) -> None:
        """Queue a block that is the next step of each session of a cohort, or answer it."""
        count, runner = len(cohort.sessions), runner_of(cohort.sessions[0])
        waiting = _WaitingBlock(self, self._operations, runner, block.tag, count, 1, began)
        self.wait(waiting, max(size, count * runner.manifest.reply_bytes(1)), count)
        try:
            deadline = self._deadline(block, began)
            self._operations.chunks.step_cohort(cohort, inputs, deadline, waiting, self._caller)
        except ConveyorError as error:
            for n in range(count):
                waiting.take(n, error)
        except BaseException:
            self.answered(waiting)
            raise
        else:
            waiting.cohort = cohort

    @staticmethod
    def _deadline(part: pb.Chunk | pb.Block, began: float) -> float | None:
        return began + part.timeout_us * 1e-6 if part.timeout_us else None

    def _check(self, block: pb.Block) -> None:
        """Refuse a block that contradicts itself."""
        count = len(block.session_ids)
        if not 1 <= count <= self._limit:
            raise InvalidRequest(f"the block has {count} sessions; expected 1 to {self._limit}")
        if len(block.positions) != count or len(block.epochs) not in (0, count):
            raise InvalidRequest(
                f"the block has {len(block.positions)} positions and {len(block.epochs)} epochs for {count} sessions; "
                f"expected {count} positions, and as many epochs or none"
            )
        if len(set(block.session_ids)) != count:
            raise InvalidRequest("a session stands in the block twice; expected each once")
        if min(block.positions) < 0 or block.timeout_us < 0:
            raise InvalidRequest(
                f"a position is {min(block.positions)} and timeout_us {block.timeout_us}; "
                "expected neither to be negative"
            )

    def _sessions(self, block: pb.Block) -> tuple[Sequence[Session | NotFound], Runner | None, dict[int, Exception]]:
        """Find the sessions of a block, the model of the first, and why others are not stepped, by index."""
        found = self._operations.find_many(self._owner, block.session_ids)
        errors: dict[int, Exception] = {}
        home: Runner | None = None
        for n, session in enumerate(found):
            if isinstance(session, NotFound):
                errors[n] = session
            elif home is None:
                home = runner_of(session)
            elif session.home is not home:
                errors[n] = InvalidRequest(
                    f"session {session.identity!r} is on model {session.home.name!r}, version {session.home.version}, "
                    f"and others of the block on {home.name!r}, version {home.version}; send them apart"
                )
        return found, home, errors

    def count(self, runner: Runner, began: float, applied: int, failed: int) -> None:
        """Count chunks that have ended."""
        seconds = self._clock() - began
        if applied:
            runner.statistics.request(True, seconds, applied)
        if failed:
            runner.statistics.request(False, seconds, failed)


class _WaitingChunk:
    """A chunk of this stream that is not answered yet."""

    __slots__ = ("_began", "_operations", "_position", "_runner", "_session", "_stream", "pending")

    def __init__(
        self,
        stream: Stream,
        operations: Operations,
        session: Session,
        runner: Runner,
        position: int,
        began: float,
    ) -> None:
        self.pending: Pending | None = None
        self._stream = stream
        self._operations = operations
        self._session = session
        self._runner = runner
        self._position = position
        self._began = began

    def answer(self, result: Reply | ConveyorError) -> None:
        if isinstance(result, Reply):
            message = of_chunk(self._session.identity, self._runner.manifest.outputs, result)
            self._stream.count(self._runner, self._began, 1, 0)
        else:
            message = of_refused_chunk(self._session.identity, self._position, result)
            self._stream.count(self._runner, self._began, 0, 1)
        self._stream.answered(self)
        self._stream.put(message)

    def abandon(self) -> None:
        self._stream.count(self._runner, self._began, 0, 1)
        if self.pending is not None:
            self._operations.chunks.abandon(self._runner, [(self.pending, self)])


class _WaitingBlock:
    """A block of this stream of which not all is answered yet."""

    __slots__ = (
        "_began",
        "_left",
        "_operations",
        "_results",
        "_runner",
        "_steps",
        "_stream",
        "_tag",
        "cohort",
        "pending",
    )

    def __init__(
        self, stream: Stream, operations: Operations, runner: Runner, tag: int, count: int, steps: int, began: float
    ) -> None:
        self.pending: Sequence[Pending] = ()
        self.cohort: SessionCohort | None = None
        self._stream = stream
        self._operations = operations
        self._runner = runner
        self._tag = tag
        self._steps = steps
        self._began = began
        self._left = count
        self._results: list[Reply | Exception] = [_NOT_YET] * count

    def take(self, index: int, result: Reply | Exception) -> None:
        """Take what became of a chunk; with the last one the block is answered."""
        self._results[index] = result
        self._left -= 1
        if self._left:
            return
        results = self._results
        applied = sum(isinstance(result, Reply) for result in results)
        self._end(of_block(self._tag, self._steps, self._runner.manifest.outputs, results), applied)

    def waiter(self, index: int) -> _Seat:
        return _Seat(self, index)

    def answer_all(self, outputs: Sequence[Array]) -> None:
        """Answer the block, of which all was applied."""
        message = of_whole_block(self._tag, self._steps, self._runner.manifest.outputs, outputs)
        self._end(message, len(self._results))

    def _end(self, message: Written, applied: int) -> None:
        results, self._results = self._results, []
        self.pending, self.cohort = (), None
        self._stream.count(self._runner, self._began, applied, len(results) - applied)
        self._stream.answered(self)
        self._stream.put(message, len(results))

    def abandon(self) -> None:
        if self.cohort is not None:
            self.cohort.dissolve()
            self.pending = self.cohort.pendings
        applied = sum(isinstance(result, Reply) for result in self._results)
        self._stream.count(self._runner, self._began, applied, len(self._results) - applied)
        seats = {pending: waiter for pending in self.pending for waiter in pending.waiters if self._has(waiter)}
        self._operations.chunks.abandon(self._runner, list(seats.items()))

    def _has(self, waiter: object) -> bool:
        return isinstance(waiter, _Seat) and waiter.block is self


class _Seat:
    """Where the answer of one chunk of a block goes."""

    __slots__ = ("_index", "block")

    def __init__(self, block: _WaitingBlock, index: int) -> None:
        self.block = block
        self._index = index

    def answer(self, result: Reply | ConveyorError) -> None:
        self.block.take(self._index, result)


def _size(tensors: Sequence[Tensor]) -> int:
    """Bytes that tensors hold; what else a message has is little beside what it costs to keep."""
    return sum([tensor.size for tensor in tensors])


_NOT_YET = EngineFailed("not answered yet")
