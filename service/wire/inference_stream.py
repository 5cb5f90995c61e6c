"""One ModelStreamInfer call: requests in, one reply each out.

Owns that the replies of one sequence leave in the order of their requests, and how an error stands in-band. What a
request means is the call's to know, how much may be unanswered the flow's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import TypeAlias

from service.errors import ConveyorError, PositionConflict
from service.sequences import Sequences
from service.wire.assembly import Written
from service.wire.door import Door
from service.wire.flow import Flow
from service.wire.inference_call import Inference
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.status import code, detail

Key: TypeAlias = tuple[str, str]
Reply: TypeAlias = Written | pb.ModelStreamInferResponse


class InferenceStream(Flow[pb.ModelInferRequest, pb.ModelInferRequest, Reply]):
    """One call.

    Args:
        door: through which it came.
        sequences: those of the server.
        owner: digest of the caller's key.
        caller: among whom a model's time is shared out.
        time_left_s: tells the time until the caller stops waiting; None for never.
    """

    def __init__(
        self,
        door: Door,
        sequences: Sequences,
        owner: bytes,
        caller: Hashable,
        time_left_s: Callable[[], float | None],
    ) -> None:
        super().__init__(door.settings.max_stream_chunks, door.settings.max_message_bytes)
        self._door = door
        self._sequences = sequences
        self._owner = owner
        self._caller = caller
        self._time_left_s = time_left_s
        # The unanswered requests of each sequence, oldest first; one of several rows stands in several lines.
        self._lines: dict[Key, deque[_Waiting]] = {}

    def parts(self, request: pb.ModelInferRequest) -> Iterable[pb.ModelInferRequest]:
        """A message is one request."""
        return (request,)

    def message(self) -> Reply:
        """A message is one reply: clients look for no more in it."""
        taken = self.take()
        assert taken is not None
        return taken[0]

    def accept(self, request: pb.ModelInferRequest) -> None:
        """Begin a request."""
        waiting = _Waiting(self, request)
        try:
            inference = Inference(
                self._door,
                self._sequences,
                self._owner,
                self._caller,
                request,
                waiting.done,
                within=pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER,
            )
        except ConveyorError as error:
            self.put(failure(waiting.head, error))
            return
        waiting.inference = inference
        waiting.keys = [(request.model_name, identity) for identity in inference.ids]
        for key in waiting.keys:
            self._lines.setdefault(key, deque()).append(waiting)
        self.wait(waiting, request.ByteSize())
        inference.begin(request, self._time_left_s(), lambda size: self.grow(waiting, size))

    def release(self, first: _Waiting) -> None:
        """Send a reply that is there, unless an earlier one of its sequences is not; then those behind it."""
        ready = [first]
        while ready:
            waiting = ready.pop()
            if waiting.reply is None or any(self._lines[key][0] is not waiting for key in waiting.keys):
                continue
            for key in waiting.keys:
                line = self._lines[key]
                line.popleft()
                if line:
                    ready.append(line[0])
                else:
                    del self._lines[key]
            self.answered(waiting)
            self.put(waiting.reply)
            # It may stand in `ready` a second time, through another of its sequences.
            waiting.reply = None


class _Waiting:
    """A request of this stream whose reply has not been sent."""

    __slots__ = ("_stream", "head", "inference", "keys", "reply")

    def __init__(self, stream: InferenceStream, request: pb.ModelInferRequest) -> None:
        self.inference: Inference | None = None
        self.keys: list[Key] = []
        self.reply: Reply | None = None
        # What a failure repeats of the request; the rest of it goes with the inference.
        self.head = pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        )
        self._stream = stream

    def done(self, result: Written | Exception) -> None:
        self.reply = failure(self.head, result) if isinstance(result, Exception) else result
        self._stream.grow(self, self.reply.ByteSize())
        self._stream.release(self)

    def abandon(self) -> None:
        if self.inference is not None:
            self.inference.abandon()


def failure(head: pb.ModelInferResponse, error: Exception) -> pb.ModelStreamInferResponse:
    """Return an error as it stands in-band, with its code and reason for programs.

    Args:
        head: the request's model, version and id.
        error: what it came to.
    """
    told = detail(error)
    response = pb.ModelStreamInferResponse(error_message=told.message, infer_response=head)
    parameters = response.infer_response.parameters
    parameters["triton_final_response"].bool_param = True
    parameters["error_code"].string_param = code(error).name if isinstance(error, ConveyorError) else "INTERNAL"
    parameters["error_reason"].string_param = told.reason
    if isinstance(error, PositionConflict):
        parameters["sequence_position"].int64_param = error.position
    return response
