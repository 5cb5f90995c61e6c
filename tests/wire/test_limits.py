"""Limits: over each the answer is immediate and says which, what was accepted goes on, and room comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.manifest import METADATA_KEY, Manifest, TensorSpec
from service.server import Server
from tests.conftest import calling, running
from tests.graphs import INPUT, expected
from tests.wire.gate import Gate
from tests.wire.native import Caller, array, chunk, streaming, tensor

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = grpc.StatusCode.INVALID_ARGUMENT

x = np.random.default_rng(0).standard_normal((8, INPUT)).astype(np.float32)


class House:
    """A server with limits, and a stream to it."""

    def __init__(self, server: Server, stub: stubs.ConveyorServiceStub, caller: Caller) -> None:
        self.server = server
        self.stub = stub
        self.caller = caller
        self.gates: list[Gate] = []

    def gate(self) -> Gate:
        """Hold every run from here on."""
        runner = self.server.repository.find("lstm")
        gate = Gate(runner.execution.engine)
        runner.execution.engine = gate
        self.gates.append(gate)
        return gate

    async def infer(self, x: NDArray[Any], **more: Any) -> pb.InferResponse:
        """Run a batch."""
        reply = await self.stub.Infer(pb.InferRequest(model="lstm", inputs=[tensor(x)], **more))
        assert isinstance(reply, pb.InferResponse)
        return reply

    async def works(self) -> None:
        """A new session steps, and equals the reference."""
        session = await self.caller.open()
        (result,) = await self.caller.step(chunk(session, 0, x))
        equal(array(result.outputs[0]), expected(x))
        await self.stub.CloseSession(pb.CloseSessionRequest(session_id=session))


@asynccontextmanager
async def built(repository: Path, **limits: int) -> AsyncIterator[House]:
    """Build it."""
    async with running(repository, None, **limits) as server, calling(server) as stub, streaming(stub) as caller:
        house = House(server, stub, caller)
        try:
            yield house
        finally:
            # Also when a test fails: a run that is held would hold the server's end.
            for gate in house.gates:
                gate.let(1000)


def equal(given: NDArray[Any], reference: NDArray[Any]) -> None:
    """Hold outputs against the reference."""
    np.testing.assert_allclose(given, reference, rtol=0, atol=2e-6)


async def test_sessions(lstm_repository: Path) -> None:
    """Opened, forked or imported: over the limit refused, and the sessions that are open go on."""
    async with built(lstm_repository, max_sessions=2) as house:
        first, second = await house.caller.open(), await house.caller.open()
        state = (await house.stub.ExportSession(pb.ExportSessionRequest(session_id=first))).state
        for call in (
            house.stub.OpenSession(pb.OpenSessionRequest(model="lstm")),
            house.stub.ForkSession(pb.ForkSessionRequest(session_id=first)),
            house.stub.ImportSession(pb.ImportSessionRequest(state=state)),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="2 sessions are open, which is the limit") as full:
                await call
            assert full.value.code() is EXHAUSTED
        (result,) = await house.caller.step(chunk(first, 0, x))
        equal(array(result.outputs[0]), expected(x))
        assert len((await house.infer(x[None])).outputs) == 1
        await house.stub.CloseSession(pb.CloseSessionRequest(session_id=second))
        await house.works()


async def test_queued_rows(lstm_repository: Path) -> None:
    """Chunks and batch rows count alike; what was refused has moved nothing and can be sent again."""
    async with built(lstm_repository, max_queued_rows=3) as house:
        gate = house.gate()
        sessions = [await house.caller.open() for _ in range(5)]
        await house.caller.send(chunk(sessions[0], 0, x))
        await gate.entered()
        await house.caller.send(*(chunk(session, 0, x) for session in sessions[1:]))
        refused = await house.caller.result()
        assert (refused.session_id, refused.error.code) == (sessions[4], EXHAUSTED.value[0])
        assert "3 rows are waiting" in refused.error.message
        assert "limit of 3" in refused.error.message
        with pytest.raises(grpc.aio.AioRpcError, match="limit of 3") as full:
            await house.infer(x[None])
        assert full.value.code() is EXHAUSTED
        gate.let(100)
        for _ in range(4):
            equal(array((await house.caller.result()).outputs[0]), expected(x))
        (again,) = await house.caller.step(chunk(sessions[4], 0, x))
        equal(array(again.outputs[0]), expected(x))
        assert len((await house.infer(np.stack([x] * 3))).outputs) == 1
        assert house.server.repository.find("lstm").pool.taken == 5


async def test_what_would_be_late_is_refused_before_it_is_looked_at(lstm_repository: Path) -> None:
    """Over capacity only what is new is: repeats, and what is out of place, are answered as ever. Nothing has moved."""
    async with built(lstm_repository) as house:
        caller = house.caller
        held, applied, fresh = [await caller.open() for _ in range(3)]
        (first,) = await caller.step(chunk(applied, 0, x[:2]))
        runner = house.server.repository.find("lstm")
        gate = house.gate()
        await caller.send(chunk(held, 0, x))
        await gate.entered()
        # What is known of ticks that took no time, by the test's clock, is forgotten: each step takes a second.
        pace = runner._scheduler.pace
        pace._seen.clear()
        pace.learn(1, 1, 1.0)
        failed = runner.statistics.snapshot().fail.count
        nothing = np.full_like(x, np.nan)
        for values in (x, nothing, nothing):
            (refused,) = await caller.step(chunk(fresh, 0, values, timeout_us=1_000_000))
            assert refused.error.code == EXHAUSTED.value[0]
            assert "their deadline comes sooner" in refused.error.message
            assert (refused.session_id, refused.position) == (fresh, 0)
        assert runner.statistics.snapshot().fail.count == failed + 3
        away = {"model": "lstm", "version": "1", "outcome": "turned_away"}
        assert house.server.metrics.registry.get_sample_value("conveyor_rows_total", away) == 3
        (again,) = await caller.step(chunk(applied, 0, x[:2], timeout_us=1_000_000))
        assert again == first
        (wrong,) = await caller.step(chunk(applied, 7, x, timeout_us=1_000_000))
        assert wrong.error.code == grpc.StatusCode.ABORTED.value[0]
        house.server.operations.intake.draining = True
        (elsewhere,) = await caller.step(chunk(fresh, 0, x, timeout_us=1_000_000))
        assert elsewhere.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        house.server.operations.intake.draining = False
        (bad,) = await caller.step(chunk(fresh, 0, nothing))
        assert bad.error.code == INVALID.value[0]
        await caller.send(chunk(fresh, 0, x))
        await gate.until_queued(house.server, 1)
        gate.let(100)
        for session in (held, fresh):
            result = await caller.result()
            assert result.session_id == session
            equal(array(result.outputs[0]), expected(x))


async def test_queued_bytes(lstm_repository: Path) -> None:
    """What waits is bounded in bytes too."""
    async with built(lstm_repository, max_queued_bytes=2 * x.nbytes) as house:
        gate = house.gate()
        sessions = [await house.caller.open() for _ in range(4)]
        await house.caller.send(chunk(sessions[0], 0, x))
        await gate.entered()
        await house.caller.send(*(chunk(session, 0, x) for session in sessions[1:]))
        refused = await house.caller.result()
        assert (refused.session_id, refused.error.code) == (sessions[3], EXHAUSTED.value[0])
        assert f"{2 * x.nbytes} bytes of input are waiting" in refused.error.message
        gate.let(100)
        for _ in range(3):
            equal(array((await house.caller.result()).outputs[0]), expected(x))
        await house.works()


async def test_a_stream_is_not_read_while_too_much_of_it_is_unanswered(lstm_repository: Path) -> None:
    """No error: the rest waits where it is, until answers have left; other streams are read meanwhile."""
    async with built(lstm_repository, max_stream_chunks=2) as house:
        gate = house.gate()
        sessions = [await house.caller.open() for _ in range(5)]
        other = await house.caller.open()
        await house.caller.send(*(chunk(session, 0, x) for session in sessions))
        await gate.entered()

        def taken_in() -> list[bool]:
            return [bool(house.server.operations.sessions.find(b"", session).pending) for session in sessions]

        # The message is here in full: had the stream gone on reading, all five would have been taken in at once.
        assert taken_in() == [True, True, False, False, False]
        async with streaming(house.stub) as second:
            await second.send(chunk(other, 0, x))
            gate.let(100)
            equal(array((await second.result()).outputs[0]), expected(x))
        results = [await house.caller.result() for _ in sessions]
        assert {result.session_id for result in results} == set(sessions)
        for result in results:
            equal(array(result.outputs[0]), expected(x))
        assert max(gate.rows) <= 3


async def test_bad_chunks_count_as_unanswered_too(lstm_repository: Path) -> None:
    """A stream of nothing but errors is answered in full, however small the limit."""
    async with built(lstm_repository, max_stream_chunks=1) as house:
        results = await house.caller.step(*(chunk(f"nobody {n}", 0, x) for n in range(20)))
        assert [result.session_id for result in results] == [f"nobody {n}" for n in range(20)]
        await house.works()


async def test_calls(lstm_repository: Path) -> None:
    """Over the limit a call is refused, and the one that is under way goes on; when it has ended there is room."""
    async with built(lstm_repository, max_calls=2) as house:
        session = await house.caller.open()
        await house.caller.step(chunk(session, 0, x[:4]))
        async with streaming(house.stub) as second:
            await second.step(chunk("nobody", 0, x))
            call = house.stub.ListModels(pb.ListModelsRequest())
            assert await call.code() is EXHAUSTED
            # Whoever watches the server's health would take a busy one for a dead one.
            async with grpc.aio.insecure_channel(f"127.0.0.1:{house.server.port}") as channel:
                reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            (result,) = await house.caller.step(chunk(session, 4, x[4:]))
            equal(array(result.outputs[0]), expected(x)[4:])
        async with asyncio.timeout(30):
            while await house.stub.ListModels(pb.ListModelsRequest()).code() is EXHAUSTED:
                pass


async def test_messages_that_are_too_large(lstm_repository: Path) -> None:
    """Refused before they are read, on unary calls and streams; the sessions of a stream that ends so stay."""
    async with built(lstm_repository, max_message_bytes=2000) as house:
        session = await house.caller.open()
        (result,) = await house.caller.step(chunk(session, 0, x[:4]))
        large = np.zeros((200, INPUT), np.float32)
        with pytest.raises(grpc.aio.AioRpcError, match=r"larger than max \(.* vs\. 2000\)") as full:
            await house.infer(large[None])
        assert full.value.code() is EXHAUSTED
        async with streaming(house.stub) as second:
            await second.send(chunk(session, 4, large))
            with pytest.raises(grpc.aio.AioRpcError, match=r"larger than max \(.* vs\. 2000\)") as full:
                await second.result()
            assert full.value.code() is EXHAUSTED
        (result,) = await house.caller.step(chunk(session, 4, x[4:]))
        equal(array(result.outputs[0]), expected(x)[4:])


async def test_replies_with_states_that_are_too_large(lstm_repository: Path) -> None:
    """Final states count: a batch that could be answered without them is refused with them, before it runs."""
    async with built(lstm_repository, max_message_bytes=2000) as house:
        gate = house.gate()
        gate.let(1)
        many = np.zeros((50, 1, INPUT), np.float32)
        assert array((await house.infer(many)).outputs[0]).shape == (50, 1, 2)
        with pytest.raises(grpc.aio.AioRpcError, match=r"reply would hold 2400 bytes; .* up to 2000") as refused:
            await house.infer(many, return_states=True)
        assert refused.value.code() is INVALID
        assert gate.rows == [50]
        gate.let(100)
        assert len((await house.infer(many[:40], return_states=True)).final_states) == 2


WIDTH = 100


def write_wide(repository: Path) -> None:
    """A model whose output is wider than its input: y = x @ W, x [T, N, 1]; no states, no lengths."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "N", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", "N", WIDTH])],
        [numpy_helper.from_array(np.arange(WIDTH, dtype=np.float32)[None], "W")],
    )

    def spec(name: str, features: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=(None, None, features), batch_axis=1, time_axis=0)

    manifest = Manifest(inputs=(spec("x", 1),), outputs=(spec("y", WIDTH),), states=(), streamable=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: manifest.model_dump_json()})
    path = repository / "wide/1/model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


async def test_replies_that_are_too_large(tmp_path: Path) -> None:
    """Found before the run: the caller is told what to send instead, and a session has not moved."""
    write_wide(tmp_path)
    async with built(tmp_path, max_message_bytes=4000) as house:
        fits = np.arange(10, dtype=np.float32)[:, None]
        wanted = fits * np.arange(WIDTH, dtype=np.float32)
        request = pb.InferRequest(model="wide", inputs=[tensor(fits[None])])
        equal(array((await house.stub.Infer(request)).outputs[0])[0], wanted)
        over = np.zeros((11, 1), np.float32)
        with pytest.raises(
            grpc.aio.AioRpcError, match=r"reply would hold 4400 bytes; .* up to 4000.* fewer"
        ) as refused:
            await house.stub.Infer(pb.InferRequest(model="wide", inputs=[tensor(over[None])]))
        assert refused.value.code() is INVALID
        session = await house.caller.open("wide")
        (result,) = await house.caller.step(chunk(session, 0, over))
        assert result.error.code == INVALID.value[0]
        assert "reply would hold 4400 bytes" in result.error.message
        (result,) = await house.caller.step(chunk(session, 0, fits))
        equal(array(result.outputs[0]), wanted)


async def test_kept_replies(lstm_repository: Path) -> None:
    """The replies that sessions keep are bounded together; smaller ones and closed sessions make room."""
    async with built(lstm_repository, max_reply_bytes=2 * expected(x).astype(np.float32).nbytes) as house:
        first, second, third = [await house.caller.open() for _ in range(3)]
        for session in (first, second):
            (result,) = await house.caller.step(chunk(session, 0, x))
            equal(array(result.outputs[0]), expected(x))
        (refused,) = await house.caller.step(chunk(third, 0, x))
        assert refused.error.code == EXHAUSTED.value[0]
        assert "the replies that sessions keep hold" in refused.error.message
        away = {"model": "lstm", "version": "1", "outcome": "turned_away"}
        assert house.server.metrics.registry.get_sample_value("conveyor_rows_total", away) == 1
        (again,) = await house.caller.step(chunk(first, 0, x))
        assert not again.HasField("error")
        (shorter,) = await house.caller.step(chunk(first, len(x), x[:1]))
        assert not shorter.HasField("error")
        await house.stub.CloseSession(pb.CloseSessionRequest(session_id=second))
        (result,) = await house.caller.step(chunk(third, 0, x))
        equal(array(result.outputs[0]), expected(x))
