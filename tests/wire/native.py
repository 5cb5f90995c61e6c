"""A caller of the native door that keeps one stream open and waits for one result at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs

Array = NDArray[Any]


def tensor(array: Array, name: str = "") -> pb.Tensor:
    """Return float32 values as a message."""
    return pb.Tensor(name=name, data_type=pb.DATA_TYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes())


def array(message: pb.Tensor) -> NDArray[np.float32]:
    """Return a float32 message's values."""
    return np.frombuffer(message.data, "<f4").reshape(tuple(message.shape))


def chunk(session_id: str, position: int, x: Array, timeout_us: int = 0) -> pb.Chunk:
    """Return a chunk of a model with one input."""
    return pb.Chunk(session_id=session_id, position=position, inputs=[tensor(x)], timeout_us=timeout_us)


class Caller:
    """One stream."""

    def __init__(self, stub: stubs.ConveyorServiceStub, call: grpc.aio.StreamStreamCall[object, object]) -> None:
        self.stub = stub
        self.call = call
        self._results: list[pb.ChunkResult] = []

    async def send(self, *chunks: pb.Chunk) -> None:
        """Write one message."""
        await self.call.write(pb.StreamRequest(chunks=chunks))

    async def result(self) -> pb.ChunkResult:
        """Wait for the next result."""
        while not self._results:
            response = await self.call.read()
            assert isinstance(response, pb.StreamResponse), "the stream ended"
            self._results.extend(response.results)
        return self._results.pop(0)

    async def step(self, *chunks: pb.Chunk) -> Sequence[pb.ChunkResult]:
        """Send chunks in one message and wait for as many results."""
        await self.send(*chunks)
        return [await self.result() for _ in chunks]

    async def open(self, model: str = "lstm", session_id: str = "") -> str:
        """Open a session."""
        reply = await self.stub.OpenSession(pb.OpenSessionRequest(model=model, session_id=session_id))
        return str(reply.session.session_id)

    async def position(self, session_id: str) -> int:
        """Ask where a session is."""
        return int((await self.stub.GetSession(pb.GetSessionRequest(session_id=session_id))).session.position)


@asynccontextmanager
async def streaming(stub: stubs.ConveyorServiceStub) -> AsyncIterator[Caller]:
    """Open a stream; cancel it at the end."""
    call = stub.Stream()
    try:
        yield Caller(stub, call)
    finally:
        call.cancel()
