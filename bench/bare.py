"""A ceiling: the least that a server of recurrent steps in Python can be.

An event loop that speaks conveyor.v1's Stream, and a thread beside it that runs the graph, with one hand-over each way
a tick. The graph reads and fills arrays in place; the states of all sessions lie in one array a state, from which they
are gathered, and into which they are scattered, by index arrays. Of a block nothing is done row by row.

It keeps no promise. Positions, epochs, owners and values are not looked at; no reply is kept; there are no limits, no
deadlines, no turns, no metrics and no errors. A chunk has one step, a session has one chunk under way, and a client
ends a stream when all is answered. So what Conveyor costs beyond it is what its promises cost.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import grpc
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bench.serving import EVENT_LOOPS, serve
from conveyor.v1 import conveyor_pb2 as pb
from service.graphs.workspace import sizes
from service.manifest import METADATA_KEY, Manifest, StateSpec, TensorSpec
from service.wire.assembly import varint

Array = NDArray[Any]
Outbox: TypeAlias = "asyncio.Queue[bytes | None]"
"""The messages that a stream is to be sent; None for its end."""

_SLOTS = 2048
_CHUNK = pb.StreamResponse.RESULTS_FIELD_NUMBER, pb.ChunkResult.OUTPUTS_FIELD_NUMBER
_BLOCK = pb.StreamResponse.BLOCK_RESULTS_FIELD_NUMBER, pb.BlockResult.OUTPUTS_FIELD_NUMBER
"""Where results stand in an answer, and their outputs in them."""
_BYTES = 2
"""The wire type of a field that holds bytes or a message. Source: Protocol Buffers, "Encoding"."""


class Rows(NamedTuple):
    """Steps that came together: a chunk, or those of a block.

    Attributes:
        outbox: where their result goes.
        slots: of their sessions, [N].
        x: the elements, N rows of them.
        shape: of their y on the wire, without the features.
        result: the field of ``StreamResponse`` that the result is.
        outputs: the field of the result that y is.
        head: the other fields of the result.
    """

    outbox: Outbox
    slots: Array
    x: bytes
    shape: tuple[int, ...]
    result: int
    outputs: int
    head: bytes


class _Bound:
    """The graph, bound to arrays for so many rows of one step."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, rows: int) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._lengths = np.ones(rows, manifest.lengths_dtype)

        def bind(kind: str, name: str, array: Array) -> Array:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            getattr(self._binding, f"bind_ortvalue_{kind}")(name, value)
            return array

        def made(spec: TensorSpec | StateSpec) -> Array:
            return np.zeros(sizes(spec, rows, 1), spec.dtype)

        (x,), (y,) = manifest.inputs, manifest.outputs
        if manifest.lengths is not None:
            bind("input", manifest.lengths, self._lengths)
        # With one step, the rows lie one behind the other in the graph's axes too.
        self.x = bind("input", x.name, made(x)).reshape(-1)
        self.y = bind("output", y.name, made(y)).reshape(rows, -1)
        self.before = [bind("input", state.input, made(state)) for state in manifest.states]
        self.after = [bind("output", state.output, made(state)) for state in manifest.states]

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


class Engine:
    """The graph, and the states of all sessions.

    Args:
        path: the model file.
        threads: inside one run.
    """

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._manifest = Manifest.model_validate_json(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        self._axes = [state.batch_axis for state in self._manifest.states]
        self._states = [np.zeros(sizes(state, _SLOTS, 1), state.dtype) for state in self._manifest.states]
        self._bound: dict[int, _Bound] = {}
        self._free = list(range(_SLOTS))

    def open(self) -> int:
        """Take a slot, with states of zeros."""
        slot = self._free.pop()
        for states, axis in zip(self._states, self._axes, strict=True):
            states[_at(axis, slot)] = 0
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def step(self, slots: Array, x: bytes) -> Array:
        """Move the states in ``slots`` [N] by one step of x; its y [N, O], which the next step overwrites."""
        if (bound := self._bound.get(len(slots))) is None:
            bound = self._bound[len(slots)] = _Bound(self._session, self._manifest, len(slots))
        bound.x[:] = np.frombuffer(x, bound.x.dtype)
        for states, axis, before in zip(self._states, self._axes, bound.before, strict=True):
            states.take(slots, axis, before, "clip")
        bound.run()
        for states, axis, after in zip(self._states, self._axes, bound.after, strict=True):
            states[_at(axis, slots)] = after
        return bound.y


class Bare(grpc.GenericRpcHandler):
    """The service, as far as a load asks for it, in the event loop that it is made in.

    Args:
        path: the model file.
        threads: inside one run of it.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._engine = Engine(path, threads)
        self._slots: dict[str, Array] = {}
        self._slots_of_block: dict[tuple[str, ...], Array] = {}
        self._came: list[Rows] = []
        self._seen = 0
        self._loop = asyncio.get_running_loop()
        self._handed: SimpleQueue[list[Rows]] = SimpleQueue()
        threading.Thread(target=self._run_ticks, daemon=True).start()

    def service(self, handler_call_details: Any) -> Any:
        """Serve three methods."""
        method = handler_call_details.method.rpartition("/")[2]
        if method == "Stream":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler({"OpenSession": self._open, "CloseSession": self._close}[method])

    async def _open(self, message: bytes, context: Any) -> bytes:
        name = pb.OpenSessionRequest.FromString(message).session_id
        self._slots[name] = np.array([self._engine.open()], np.intp)
        return b""

    async def _close(self, message: bytes, context: Any) -> bytes:
        self._engine.close(int(self._slots.pop(pb.CloseSessionRequest.FromString(message).session_id)[0]))
        self._slots_of_block.clear()
        return b""

    async def _stream(self, _: Any, context: Any) -> None:
        outbox: Outbox = asyncio.Queue()
        writer = asyncio.create_task(_write(context, outbox))
        while (message := await context.read()) is not grpc.aio.EOF:
            if not self._came:
                self._loop.call_soon(self._hand_over)
            request = pb.StreamRequest.FromString(message)
            for chunk in request.chunks:
                name = chunk.session_id
                head = pb.ChunkResult(session_id=name, position=chunk.position, steps=1).SerializeToString()
                self._came.append(Rows(outbox, self._slots[name], chunk.inputs[0].data, (1,), *_CHUNK, head))
            for block in request.blocks:
                head = pb.BlockResult(tag=block.tag, steps=1).SerializeToString()
                slots, x = self._of_block(tuple(block.session_ids)), block.inputs[0].data
                self._came.append(Rows(outbox, slots, x, (len(slots), 1), *_BLOCK, head))
        outbox.put_nowait(None)
        await writer

    def _of_block(self, names: tuple[str, ...]) -> Array:
        if (slots := self._slots_of_block.get(names)) is None:
            slots = self._slots_of_block[names] = np.concatenate([self._slots[name] for name in names])
        return slots

    def _hand_over(self) -> None:
        """Give the engine what came, once the event loop brings no more."""
        if self._seen != len(self._came):
            self._seen = len(self._came)
            self._loop.call_soon(self._hand_over)
            return
        self._handed.put(self._came)
        self._came, self._seen = [], 0

    def _run_ticks(self) -> None:
        while True:
            rows = self._handed.get()
            while not self._handed.empty():
                rows += self._handed.get()
            self._loop.call_soon_threadsafe(_post, self._tick(rows))

    def _tick(self, rows: list[Rows]) -> dict[Outbox, bytes]:
        """One run for all of them; the message for each stream."""
        slots = np.concatenate([each.slots for each in rows])
        y = self._engine.step(slots, b"".join([each.x for each in rows]))
        parts: dict[Outbox, list[Any]] = {}
        at = 0
        for each in rows:
            own = y[at : at + len(each.slots)]
            before = _before(each.outputs, *each.shape, y.shape[1])
            size = varint(len(each.head) + len(before) + own.nbytes)
            parts.setdefault(each.outbox, []).extend((_tag(each.result), size, each.head, before, own))
            at += len(each.slots)
        return {outbox: b"".join(message) for outbox, message in parts.items()}


async def _write(context: Any, outbox: Outbox) -> None:
    while (message := await outbox.get()) is not None:
        await context.write(message)


def _post(messages: dict[Outbox, bytes]) -> None:
    for outbox, message in messages.items():
        outbox.put_nowait(message)


def _at(axis: int, slots: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * axis, slots)


def _tag(field: int) -> bytes:
    return varint(field << 3 | _BYTES)


@functools.cache
def _before(field: int, *shape: int) -> bytes:
    """What stands before the elements of y in a result, as one of its fields."""
    data_bytes = 4 * int(np.prod(shape))
    head = pb.Tensor(name="y", data_type=pb.DATA_TYPE_FLOAT32, shape=shape).SerializeToString()
    head += _tag(pb.Tensor.DATA_FIELD_NUMBER) + varint(data_bytes)
    return _tag(field) + varint(len(head) + data_bytes) + head


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--event-loop", choices=EVENT_LOOPS, default="asyncio")
    given = parser.parse_args()
    # As Conveyor does.
    sys.setswitchinterval(0.001)
    serve(lambda: Bare(given.model, given.threads), given.event_loop)
