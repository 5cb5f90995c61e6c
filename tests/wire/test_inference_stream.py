"""ModelStreamInfer: order, errors in-band, bounds, and every way in which the call can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from service.server import Server
from service.wire.inference_stubs import inference_pb2 as pb
from tests.clock import Clock
from tests.conftest import running
from tests.graphs import INPUT, expected
from tests.wire.gate import gated, until
from tests.wire.inference import Stub, calling, output, parameters, request

Array = NDArray[Any]
Call = grpc.aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]

x = np.random.default_rng(0).standard_normal((3, 6, INPUT)).astype(np.float32)
y = np.array([expected(row) for row in x])

SMALL = request(x[:1, :2], id="0").ByteSize()


@asynccontextmanager
async def serving(
    repository: Path, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[tuple[Server, Stub, Call]]:
    """A server that serves ``lstm``, and a stream to it."""
    async with running(repository, clock, **settings) as server, calling(server) as stub:
        call = stub.ModelStreamInfer()
        try:
            yield server, stub, call
        finally:
            call.cancel()


async def reply(call: Call) -> pb.ModelInferResponse:
    """Wait for the next reply, which must be no error."""
    response = await call.read()
    assert isinstance(response, pb.ModelStreamInferResponse)
    assert response.error_message == ""
    return response.infer_response


async def error(call: Call) -> tuple[str, str, dict[str, Any]]:
    """Wait for the next reply, which must be an error: its id, text and parameters."""
    response = await call.read()
    assert isinstance(response, pb.ModelStreamInferResponse)
    assert response.error_message
    assert response.infer_response.model_name == "lstm"
    return response.infer_response.id, response.error_message, parameters(response.infer_response)


def close(response: pb.ModelInferResponse, reference: Array) -> None:
    """The output is the reference's."""
    np.testing.assert_allclose(output(response), reference, atol=2e-6)


async def test_many_sequences_and_batches(lstm_repository: Path) -> None:
    """Sequences step by step, interleaved, and batches between them, all sent before any is read, are the reference."""
    async with serving(lstm_repository) as (_, _, call):
        for t in range(6):
            for row in range(3):
                step = request(
                    x[row : row + 1, t : t + 1],
                    id=f"{row}.{t}",
                    sequence_id=row + 1,
                    sequence_start=t == 0,
                    sequence_end=t == 5,
                )
                await call.write(step)
            await call.write(request(x, id=f"batch.{t}"))
        await call.done_writing()
        replies = {}
        async for response in call:
            assert response.error_message == ""
            assert parameters(response.infer_response)["triton_final_response"] is True
            replies[response.infer_response.id] = response.infer_response
        for t in range(6):
            close(replies[f"batch.{t}"], y)
            for row in range(3):
                close(replies[f"{row}.{t}"], y[row : row + 1, t : t + 1])
        # A dict keeps the order of arrival: that of the requests, for each sequence.
        for row in range(3):
            assert [id for id in replies if id.startswith(f"{row}.")] == [f"{row}.{t}" for t in range(6)]
        assert await call.code() is grpc.StatusCode.OK


async def test_an_error_stands_in_band_and_in_its_place(lstm_repository: Path) -> None:
    """A bad request of a sequence is answered between the good ones, and moves nothing; the stream lives on."""
    async with serving(lstm_repository) as (server, _, call):
        with gated(server) as gate:
            await call.write(request(x[:1, :3], id="a", sequence_id=5, sequence_start=True))
            await gate.entered()
            await call.write(request(x[:1, :3, :1], id="shape", sequence_id=5))
            await call.write(request(x[:1, :3], id="timeout", sequence_id=5, timeout=-1))
            await call.write(request(x[:1, 3:], id="b", sequence_id=5))
            await call.write(request(x[:1], id="other", sequence_id=6))
            # What another sequence is told does not wait for this one.
            assert (await error(call))[0] == "other"
            gate.let(2)
            assert (await reply(call)).id == "a"
            id, text, given = await error(call)
            assert id == "shape"
            assert "input 'x' has shape [1, 3, 1]; expected [N, T, 3]" in text
            assert given == {
                "triton_final_response": True,
                "error_code": "INVALID_ARGUMENT",
                "error_reason": "invalid_request",
            }
            id, text, _ = await error(call)
            assert id == "timeout"
            assert "parameter 'timeout' is -1" in text
            close(await reply(call), y[:1, 3:])


async def test_a_conflict_tells_the_position(lstm_repository: Path) -> None:
    """In-band too, what does not follow is told where the sequence is, in a parameter."""
    async with serving(lstm_repository) as (_, _, call):
        await call.write(request(x[:1, :3], sequence_id=5, sequence_start=True, sequence_position=0))
        first = await reply(call)
        await call.write(request(x[:1, :3], sequence_id=5, sequence_position=0))
        assert await reply(call) == first
        await call.write(request(x[:1, :2], sequence_id=5, sequence_position=7))
        _, _, given = await error(call)
        assert (given["error_code"], given["sequence_position"]) == ("ABORTED", 3)


async def test_rows_for_several_sequences_keep_the_order_of_each(lstm_repository: Path) -> None:
    """The reply for two sequences leaves before a later one for either, though that one is done first."""
    async with serving(lstm_repository, max_tick_rows=1) as (server, _, call):
        with gated(server) as gate:
            both = {"x": x[:2, :3], "sequence_ids": np.array([7, 8])}
            await call.write(request(both, id="both", sequence_start=True))
            await call.write(request(x[:1, 3:], id="seven", sequence_id=7))
            await call.write(request(x[1:2, 3:], id="eight", sequence_id=8))
            await gate.entered()
            await gate.until_queued(server, 1)
            # The first row of both, then seven's before the second row.
            gate.let(4)
            replies = [await reply(call) for _ in range(3)]
            assert replies[0].id == "both"
            by_id = {one.id: one for one in replies}
            close(by_id["both"], y[:2, :3])
            close(by_id["seven"], y[:1, 3:])
            close(by_id["eight"], y[1:2, 3:])


@pytest.mark.parametrize("bound", [{"max_stream_chunks": 2}, {"max_message_bytes": 2 * SMALL}])
async def test_a_stream_is_not_read_while_too_much_is_unanswered(lstm_repository: Path, bound: dict[str, Any]) -> None:
    """Over the bound on requests or on bytes, requests stay with the client until some are answered."""
    async with serving(lstm_repository, max_tick_rows=1, **bound) as (server, stub, call):
        with gated(server) as gate:
            count = 20
            for n in range(count):
                await call.write(request(x[:1, :2], id=str(n)))
            await gate.entered()
            runner = server.repository.find("lstm")
            await gate.until_queued(server, 1)
            for _ in range(count):  # a server that read on would have read the rest by then
                await stub.ServerReady(pb.ServerReadyRequest())
            assert runner.queued <= 2
            gate.let(count)
            replies = [await reply(call) for _ in range(count)]
            assert sorted(int(one.id) for one in replies) == [*range(count)]


async def test_what_a_caller_left_behind_is_given_up(lstm_repository: Path) -> None:
    """A stream that is cancelled leaves its sequence as it was, and no batch rows."""
    async with serving(lstm_repository) as (server, stub, call):
        await call.write(request(x[:1, :3], sequence_id=5, sequence_start=True))
        await reply(call)
        (session,) = server.operations.sessions
        with gated(server) as gate:
            await call.write(request(x[:1, 3:], sequence_id=5))
            await gate.entered()
            await call.write(request(x[:1, 3:], sequence_id=5))
            await call.write(request(x))
            await gate.until_queued(server, 3)
            (pending,) = session.pending.values()
            call.cancel()
            await until(lambda: bool(pending.block.unwanted) and not server.sequences.waiting)
            gate.let(2)
            again = await stub.ModelInfer(request(x[:1, 3:], sequence_id=5))
            close(again, y[:1, 3:])
            assert server.repository.find("lstm").pool.taken == 1


async def test_drain(lstm_repository: Path) -> None:
    """What was accepted, waiting or not, is answered; what comes then is refused; the stream ends UNAVAILABLE."""
    async with serving(lstm_repository) as (server, _, call):
        with gated(server) as gate:
            await call.write(request(x[:1, :3], sequence_id=5, sequence_start=True))
            await gate.entered()
            await call.write(request(x[:1, 3:], sequence_id=5))
            await call.write(request(x))
            await gate.until_queued(server, 3)
            await until(lambda: server.sequences.waiting == 1)
            drain = asyncio.create_task(server.drain())
            await until(lambda: server.operations.intake.draining)
            await call.write(request(x, id="late"))
            assert (await error(call))[0] == "late"
            gate.let(3)
            replies = [await reply(call) for _ in range(3)]
            assert sorted(output(one).shape[:2] for one in replies) == [(1, 3), (1, 3), (3, 6)]
            await drain
        with pytest.raises(grpc.aio.AioRpcError, match="about to stop"):
            await call.read()
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_bytes_that_are_no_message(lstm_repository: Path) -> None:
    """They end the call as a bad argument, after what came before them has been answered."""
    async with (
        running(lstm_repository) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await call.write(request(x).SerializeToString())
        await call.write(b"\xff\xff\xff")
        first = pb.ModelStreamInferResponse.FromString(await call.read())
        close(first.infer_response, y)
        with pytest.raises(grpc.aio.AioRpcError, match="the 3 bytes that were sent are not the message"):
            await call.read()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        unary: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.aio.AioRpcError, match="the 3 bytes that were sent are not the message") as caught:
            await unary(b"\xff\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_count_as_calls(lstm_repository: Path) -> None:
    """Both doors' calls share the places; health does not need one."""
    async with serving(lstm_repository, max_calls=1) as (_, stub, call):
        await call.write(request(x))
        await reply(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(request(x))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready


async def test_the_calls_own_deadline(lstm_repository: Path) -> None:
    """A request that is not applied by the deadline of its call is told so, as with a timeout of its own."""
    clock = Clock()
    async with running(lstm_repository, clock) as server, calling(server) as stub:
        call = stub.ModelStreamInfer(timeout=600)
        with gated(server) as gate:
            await call.write(request(x, id="late"))
            await gate.entered()
            clock.now += 601
            gate.let(100)
            identity, text, told = await error(call)
        assert (identity, told["error_code"]) == ("late", "DEADLINE_EXCEEDED")
        assert "the deadline passed" in text
        call.cancel()
