"""One ModelInferRequest on its way, through whichever call it came: a batch, or rows for sequences.

Owns what a request asks of the server and what its reply is made of. Must not know scheduling, nor how the reply is
sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial

from service.errors import ConveyorError, InvalidRequest, ModelUnknown, PositionConflict
from service.manifest import Manifest
from service.sequences import Load, Sequences, Step, Stepped, Ticket
from service.ticks.runner import Runner
from service.wire.assembly import Joined, Part, Written, assemble, field, size
from service.wire.codec import Array, Batch, join, stack
from service.wire.door import Door
from service.wire.inference_request import Request, SequenceRow, identities, read, split
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_tensors import written

Done = Callable[[Written | Exception], None]


def _ignore(size: int) -> None:
    pass


class Inference:
    """One request.

    Attributes:
        ids: of the sequences that it is for; empty for a batch.

    Args:
        door: through which it came.
        sequences: those of the server.
        owner: digest of the caller's key.
        caller: among whom a model's time is shared out.
        message: the request; it is not kept.
        done: takes the reply, or why there is none; called once, on this thread, unless the request is abandoned.
        within: number of the field of a message in which the reply is to stand; None if it is the message.

    Raises:
        InvalidRequest: if it cannot be told which sequences it is for.
    """

    def __init__(
        self,
        door: Door,
        sequences: Sequences,
        owner: bytes,
        caller: Hashable,
        message: pb.ModelInferRequest,
        done: Done,
        within: int | None = None,
    ) -> None:
        self.ids = identities(message, door.settings.max_batch)
        self._door = door
        self._sequences = sequences
        self._owner = owner
        self._caller = caller
        self._model = message.model_name
        self._id = message.id
        self._done: Done | None = done
        self._within = within
        self._batch: asyncio.Task[None] | None = None
        self._tickets: list[Ticket] = []
        self._decoded: list[tuple[Manifest, Batch]] = []
        self._steps = 0
        # That it is counted for.
        self._runner: Runner | None = None
        self._began = door.clock()

    def begin(
        self, message: pb.ModelInferRequest, time_left_s: float | None = None, expect: Callable[[int], None] = _ignore
    ) -> None:
        """Ask for it.

        Args:
            message: the request again.
            time_left_s: until the caller stops waiting; None for never.
            expect: told how many bytes the reply will have, as far as the request says.
        """
        try:
            request = read(message, self.ids, self._door.settings.max_batch)
            limits = [limit for limit in (time_left_s, request.timeout_s) if limit is not None]
            deadline = self._began + min(limits) if limits else None
            if request.rows:
                first = request.rows[0]
                with suppress(ConveyorError):  # that is what it is answered, in its turn
                    self._runner = self._sequences.runner(
                        self._owner, request.model, request.version, first.identity, first.start
                    )
                    expect(self._reply_bytes(request, self._runner))
                self._step(request, deadline)
            else:
                self._runner = self._door.operations.repository.find(request.model, request.version)
                expect(self._reply_bytes(request, self._runner))
                self._batch = asyncio.create_task(self._infer(request, self._runner, deadline))
        except Exception as error:
            self._end(error)

    def abandon(self) -> None:
        """Give it up: nobody waits for it any more."""
        self._count(False)
        self._done = None
        if self._batch is not None:
            self._batch.cancel()
        # The newest first, as with a stream: giving up a row must not be preceded by its turn.
        for ticket in reversed(self._tickets):
            self._sequences.abandon(ticket)
        self._let_go()

    def _end(self, result: Written | Exception) -> None:
        self._count(not isinstance(result, Exception))
        self._let_go()
        if isinstance(result, ModelUnknown):
            result = unknown(self._model, result)
        elif isinstance(result, ConveyorError):
            # Where it was raised is nobody's business, and would hold the request for as long as the error is held.
            result = result.with_traceback(None)
        if self._done is not None:
            done, self._done = self._done, None
            done(result)

    def _count(self, succeeded: bool) -> None:
        if self._runner is not None:
            self._runner.statistics.request(succeeded, self._door.clock() - self._began)

    def _let_go(self) -> None:
        # In a circle with its tickets it would hold inputs and model until the collector comes by.
        self._tickets.clear()
        self._decoded.clear()
        self._runner = None

    def _reply_bytes(self, request: Request, runner: Runner) -> int:
        """Bytes of the reply, by the shapes that the request says, which nobody has checked yet."""
        manifest, most = runner.manifest, self._door.settings.max_message_bytes
        rows, steps = 0, 1
        names = {spec.name for spec in manifest.inputs}
        for shape in (tensor.shape for tensor in request.tensors if tensor.name in names):
            rows = max(rows, 0, *shape[:1])
            steps = max(steps, 1, *shape[1:2])
        states = not {spec.name for spec in manifest.outputs}.issuperset(request.wanted)
        # More than that is refused.
        return min(rows * manifest.reply_bytes(steps if manifest.steps_per_run is None else 1, states), most)

    # --- a batch ---

    async def _infer(self, request: Request, runner: Runner, deadline: float | None) -> None:
        try:
            self._door.operations.intake.check()
            with runner.in_use(), self._door.finishing():
                reply = await self._infer_batch(request, runner, deadline)
                result = await self._door.aside(size(reply), partial(assemble, reply))
            self._end(result)
        except Exception as error:
            self._end(error)

    async def _infer_batch(self, request: Request, runner: Runner, deadline: float | None) -> list[Part]:
        manifest = runner.manifest
        states_by_name = {name: index for index, s in enumerate(manifest.states) for name in (s.output, s.name)}
        outputs_by_name = {spec.name: index for index, spec in enumerate(manifest.outputs)}
        wanted = request.wanted or tuple(outputs_by_name)
        _check_wanted(request, wanted, {**states_by_name, **outputs_by_name})
        given = split(request, manifest, self._door.settings.max_batch)
        codec = self._door.codec(manifest)
        with_states = any(name not in outputs_by_name for name in wanted)

        def read() -> tuple[Batch, list[Array] | None]:
            batch = codec.batch(given.inputs, given.lengths, with_states)
            return batch, codec.states(given.states, len(batch.rows))

        batch, states = await self._door.aside(sum(one.size for one in given.inputs + given.states), read)
        outputs, finals = await self._door.operations.infer(
            runner, batch.rows, states, deadline, request.priority, self._caller, True, with_states
        )
        joined: dict[str, Joined] = {}
        for name in wanted:
            if (index := outputs_by_name.get(name)) is not None:
                joined[name] = _output(manifest, index, outputs, batch.steps)
            else:
                index = states_by_name[name]
                joined[name] = stack([row[index] for row in finals])
        return self._written(self._response(runner.version), joined)

    # --- sequences ---

    def _step(self, request: Request, deadline: float | None) -> None:
        """Hand each row to its sequence; what it is answered may come at once."""
        results: dict[int, Stepped | ConveyorError] = {}
        load = Load(request.size)

        def step(n: int, row: SequenceRow) -> Ticket:
            def answered(result: Stepped | ConveyorError) -> None:
                results[n] = result
                if len(results) == len(request.rows):
                    self._end_together(request, [results[n] for n in range(len(results))])

            return self._sequences.submit(
                Step(
                    self._owner,
                    request.model,
                    request.version,
                    row.identity,
                    row.start,
                    row.end,
                    lambda manifest: self._read(request, manifest).rows[n],
                    load,
                    row.position,
                    row.epoch,
                    deadline,
                    request.priority,
                    self._caller,
                ),
                answered,
            )

        for n, row in enumerate(request.rows):
            self._tickets.append(step(n, row))

    def _read(self, request: Request, manifest: Manifest) -> Batch:
        """Read the inputs for the model that a row's sequence is on; once for all rows that are on the same."""
        for known, decoded in self._decoded:
            if known is manifest:
                return decoded
        if self._decoded and _form(manifest) != _form(self._decoded[0][0]):
            raise _unlike()
        _check_wanted_of_sequence(request, manifest)
        given = split(request, manifest, self._door.settings.max_batch)
        if given.states:
            raise InvalidRequest(
                f"input {given.states[0].name!r} is a state, and the server keeps those of sequences; "
                "send states with a batch"
            )
        codec = self._door.codec(manifest)
        decoded = codec.batch(given.inputs, given.lengths)
        if len(decoded.rows) != len(request.rows):
            raise InvalidRequest(
                f"the inputs have {len(decoded.rows)} rows for {len(request.rows)} sequences; expected one for each "
                "(several go into one request by sequence_ids)"
            )
        self._steps = decoded.steps or 0
        self._decoded.append((manifest, decoded))
        return decoded

    def _end_together(self, request: Request, results: Sequence[Stepped | ConveyorError]) -> None:
        try:
            self._end(self._together(request, results))
        except Exception as error:
            # Whoever answers the rows would keep it, and the request would never end.
            self._end(error)

    def _together(self, request: Request, results: Sequence[Stepped | ConveyorError]) -> Written | ConveyorError:
        """Make one reply of what the rows were answered."""
        failed = [(n, result) for n, result in enumerate(results) if isinstance(result, ConveyorError)]
        if failed:
            return failed[0][1] if len(results) == 1 else _of_rows(request, failed)
        stepped = [result for result in results if isinstance(result, Stepped)]
        try:
            return self._reply(request, stepped)
        except InvalidRequest as error:
            return type(error)(f"{error}; the rows were applied, up to positions {[one.position for one in stepped]}")

    def _reply(self, request: Request, stepped: Sequence[Stepped]) -> Written:
        manifest = stepped[0].manifest
        # Whether they stand in one tensor is known only now, also of replies that were kept.
        if any(_form(one.manifest) != _form(manifest) for one in stepped):
            raise _unlike()
        wanted = _check_wanted_of_sequence(request, manifest)
        steps = max(self._steps, *(one.reply.steps for one in stepped))
        self._door.codec(manifest).check_reply(len(stepped), steps)
        response = self._response(stepped[0].version)
        outputs = [one.reply.outputs for one in stepped]
        parameters = response.parameters
        if request.alone:
            parameters["sequence_position"].int64_param = stepped[0].position
            parameters["sequence_epoch"].int64_param = stepped[0].epoch
        else:
            parameters["sequence_positions"].string_param = json.dumps([one.position for one in stepped])
            parameters["sequence_epochs"].string_param = json.dumps([one.epoch for one in stepped])
        joined = {name: _output(manifest, index, outputs, steps) for name, index in wanted.items()}
        return assemble(self._written(response, joined))

    # --- what replies are made of ---

    def _response(self, version: int) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=self._model, model_version=str(version), id=self._id)
        response.parameters["triton_final_response"].bool_param = True
        return response

    def _written(self, response: pb.ModelInferResponse, outputs: dict[str, Joined]) -> list[Part]:
        parts = written(response, outputs)
        return parts if self._within is None else field(self._within, parts)


def unknown(model: str, error: ModelUnknown) -> ModelUnknown:
    """Say that a model is unknown as clients of the protocol expect it, and then why."""
    return ModelUnknown(f"Request for unknown model: '{model[:128]}' is not found: {error}")


def _output(manifest: Manifest, index: int, rows: Sequence[Sequence[Array]], steps: int | None) -> Joined:
    """Put one output of all rows together, as this door shows it."""
    spec = manifest.outputs[index]
    whole = join([row[index] for row in rows], spec, steps)
    if manifest.steps_per_run == 1 and spec.time_axis is not None:
        rows_alone, _, *tail = whole.shape
        return whole._replace(shape=(rows_alone, *tail))
    return whole


def _check_wanted(request: Request, wanted: Sequence[str], there: dict[str, int]) -> None:
    for name in wanted:
        if name not in there:
            raise InvalidRequest(
                f"output {name[:64]!r} is none of model {request.model!r}; there are: {', '.join(there)}"
            )


def _check_wanted_of_sequence(request: Request, manifest: Manifest) -> dict[str, int]:
    """Return the outputs that are wanted, with their places among the model's."""
    outputs = {spec.name: index for index, spec in enumerate(manifest.outputs)}
    states = {name for spec in manifest.states for name in (spec.output, spec.name)} - outputs.keys()
    if kept := [name for name in request.wanted if name in states]:
        raise InvalidRequest(
            f"output {kept[0]!r} is a state, and the server keeps those of sequences; ask for states with a batch"
        )
    _check_wanted(request, request.wanted, outputs)
    return {name: outputs[name] for name in request.wanted} or outputs


def _form(manifest: Manifest) -> object:
    """What two versions of a model must have in common for their outputs to stand in one tensor."""
    return manifest.steps_per_run, [(y.name, y.dtype, y.tail, y.time_axis is None) for y in manifest.outputs]


def _unlike() -> InvalidRequest:
    return InvalidRequest(
        "the sequences of this request are on versions of the model whose outputs differ; send their rows apart"
    )


def _of_rows(request: Request, failed: Sequence[tuple[int, ConveyorError]]) -> ConveyorError:
    """Say which of several rows failed first, and what became of the others."""
    n, error = failed[0]
    rest = "and the others were applied" if len(failed) < len(request.rows) else "and so none was applied"
    text = (
        f"{len(failed)} of {len(request.rows)} rows failed, {rest}; "
        f"row {n} (sequence {request.rows[n].identity}): {error}"
    )
    if isinstance(error, PositionConflict):
        return PositionConflict(text, error.position)
    return type(error)(text)
