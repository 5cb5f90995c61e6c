"""What travels through each door: how the next message of some sessions is made, and what its answer says.

Sessions stand in groups; the chunks of a group travel in one message. The client shares the machine with the server, so
that what does not change from message to message is made once. Must not know when messages are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bench.echo import METHOD, REPLY_BYTES
from conveyor.v1 import conveyor_pb2 as pb

_EXHAUSTED, _LATE = 8, 4
"""gRPC's status codes RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED."""


class Refused(Exception):
    """The server refused what it should have done; the text says what it said."""


class Shape(NamedTuple):
    """What chunks look like.

    Attributes:
        model: its name.
        input_size: I.
        output_size: O.
        steps: T of a chunk.
        chunks: of a message.
        timeout_us: within which a chunk is to be applied; 0 for no limit. Without one, a refusal is an error.
    """

    model: str
    input_size: int
    output_size: int
    steps: int
    chunks: int
    timeout_us: int = 0


class Answer(NamedTuple):
    """What became of some chunks of a group: how many were applied, refused for want of room, and dropped as late."""

    group: int
    applied: int
    refused: int = 0
    late: int = 0


class Door(Protocol):
    """One call's worth of sessions.

    Attributes:
        method: what is called.
        metadata: that goes with the call.
        sizes: how many chunks each group has.
    """

    method: str
    metadata: tuple[tuple[str, str], ...] = ()
    sizes: Sequence[int]

    def message(self, group: int) -> bytes:
        """The next message of a group."""

    def read(self, reply: bytes) -> Iterable[Answer]:
        """What a message of the server says; each of its answers ends at least one chunk."""

    def last(self, group: int) -> bytes | None:
        """What ends the group's sessions, where a message does; it is answered once."""
        return None


class _Chunks(Door):
    """conveyor.v1's Stream, each chunk by itself."""

    method = "/conveyor.v1.ConveyorService/Stream"

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        self._shape = shape
        inputs = [_tensor("x", shape.steps, shape.input_size)]
        groups = _in_groups(names, shape.chunks)
        self.sizes = [len(group) for group in groups]
        self._requests = [
            pb.StreamRequest(
                chunks=[pb.Chunk(session_id=name, inputs=inputs, timeout_us=shape.timeout_us) for name in group]
            )
            for group in groups
        ]
        self._at = {
            name: (index, chunk)
            for index, (group, request) in enumerate(zip(groups, self._requests, strict=True))
            for name, chunk in zip(group, request.chunks, strict=True)
        }

    def message(self, group: int) -> bytes:
        return bytes(self._requests[group].SerializeToString())

    def read(self, reply: bytes) -> Iterable[Answer]:
        for result in pb.StreamResponse.FromString(reply).results:
            group, chunk = self._at[result.session_id]
            if result.HasField("error"):
                yield _refusal(self._shape, group, 1, result.error)
            else:
                chunk.position += self._shape.steps
                yield Answer(group, 1)


class _Blocks(Door):
    """conveyor.v1's Stream, the chunks of a message side by side in one block, as the client library sends them."""

    method = "/conveyor.v1.ConveyorService/Stream"

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        self._shape = shape
        groups = _in_groups(names, shape.chunks)
        self.sizes = [len(group) for group in groups]
        self._positions = [[0] * len(group) for group in groups]
        self._requests = [
            pb.StreamRequest(
                blocks=[
                    pb.Block(
                        tag=tag,
                        session_ids=group,
                        inputs=[_tensor("x", len(group), shape.steps, shape.input_size)],
                        timeout_us=shape.timeout_us,
                    )
                ]
            )
            for tag, group in enumerate(groups)
        ]

    def message(self, group: int) -> bytes:
        request = self._requests[group]
        request.blocks[0].positions[:] = self._positions[group]
        return bytes(request.SerializeToString())

    def read(self, reply: bytes) -> Iterable[Answer]:
        steps = self._shape.steps
        for result in pb.StreamResponse.FromString(reply).block_results:
            group = int(result.tag)
            size = self.sizes[group]
            if result.HasField("error"):
                yield _refusal(self._shape, group, size, result.error)
                continue
            refusals = [_refusal(self._shape, group, 1, error.error) for error in result.errors]
            missed = {error.index for error in result.errors}
            self._positions[group] = [
                position if index in missed else position + steps
                for index, position in enumerate(self._positions[group])
            ]
            refused, late = sum(each.refused for each in refusals), sum(each.late for each in refusals)
            yield Answer(group, size - len(missed), refused, late)


class _Sequences(Door):
    """The Open Inference Protocol's ModelStreamInfer: one step of one sequence a message, its id the client's."""

    method = "/inference.GRPCInferenceService/ModelStreamInfer"

    def __init__(self, shape: Shape, numbers: Sequence[int]) -> None:
        # tritonclient brings stubs of the same package; a process can hold one of the two.
        from service.wire.inference_stubs import inference_pb2 as inference

        self._response = inference.ModelStreamInferResponse
        self.sizes = [1] * len(numbers)
        self._group = {str(number): group for group, number in enumerate(numbers)}
        self._next, self._middle, self._last = [], [], []
        x = np.random.default_rng(0).standard_normal((1, 1, shape.input_size)).astype("<f4")
        for number in numbers:
            request = inference.ModelInferRequest(model_name=shape.model, id=str(number))
            request.parameters["sequence_id"].int64_param = number
            request.inputs.add(name="x", datatype="FP32", shape=x.shape)
            request.raw_input_contents.append(x.tobytes())
            self._middle.append(request.SerializeToString())
            request.parameters["sequence_start"].bool_param = True
            self._next.append(request.SerializeToString())
            del request.parameters["sequence_start"]
            request.parameters["sequence_end"].bool_param = True
            self._last.append(request.SerializeToString())

    def message(self, group: int) -> bytes:
        message, self._next[group] = self._next[group], self._middle[group]
        return bytes(message)

    def read(self, reply: bytes) -> Iterable[Answer]:
        answer = self._response.FromString(reply)
        if answer.error_message:
            raise Refused(answer.error_message)
        yield Answer(self._group[answer.infer_response.id], 1)

    def last(self, group: int) -> bytes | None:
        return bytes(self._last[group])


class _Echoes(Door):
    """The echo's one method: the messages that a server would get, answered with as many bytes as it would reply."""

    method = METHOD

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        real = (_Blocks if shape.chunks > 1 else _Chunks)(shape, names)
        self.sizes = real.sizes
        self._messages = [real.message(group) for group in range(len(real.sizes))]
        self.metadata = ((REPLY_BYTES, str(len(reply(shape, self.sizes[0], names[0])))),)
        # Answers come in order, so the oldest message out is the one that is answered.
        self._out: deque[int] = deque()

    def message(self, group: int) -> bytes:
        self._out.append(group)
        return self._messages[group]

    def read(self, reply: bytes) -> Iterable[Answer]:
        group = self._out.popleft()
        yield Answer(group, self.sizes[group])


DOORS = {"chunks": _Chunks, "blocks": _Blocks, "sequences": _Sequences, "echo": _Echoes}
"""By name: each is made of a ``Shape`` and the names of the sessions, which are numbers for ``sequences``."""


def reply(shape: Shape, size: int, name: str) -> bytes:
    """What the server answers to a message with some chunks: a block's result, or a chunk's where there is one."""
    if shape.chunks > 1:
        result = pb.BlockResult(tag=1, steps=shape.steps, outputs=[_tensor("y", size, shape.steps, shape.output_size)])
        return bytes(pb.StreamResponse(block_results=[result]).SerializeToString())
    chunk = pb.ChunkResult(session_id=name, position=1000, steps=shape.steps)
    chunk.outputs.append(_tensor("y", shape.steps, shape.output_size))
    return bytes(pb.StreamResponse(results=[chunk]).SerializeToString())


def _tensor(name: str, *shape: int) -> pb.Tensor:
    data = np.random.default_rng(0).standard_normal(shape).astype("<f4").tobytes()
    return pb.Tensor(name=name, data_type=pb.DATA_TYPE_FLOAT32, shape=shape, data=data)


def _in_groups(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[at : at + size] for at in range(0, len(names), size)]


def _refusal(shape: Shape, group: int, chunks: int, error: pb.ErrorDetail) -> Answer:
    if shape.timeout_us and error.code == _EXHAUSTED:
        return Answer(group, 0, refused=chunks)
    if shape.timeout_us and error.code == _LATE:
        return Answer(group, 0, late=chunks)
    raise Refused(error.message)
