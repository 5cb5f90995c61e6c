"""What requests hold, through both doors: counted while they are on their way, and gone when they have ended."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections import deque
from pathlib import Path

import grpc
import numpy as np
import pytest

from conveyor.v1 import conveyor_pb2_grpc as native
from service.errors import ConveyorError
from service.session import Reply
from service.wire.inference_call import Inference
from service.wire.inference_stream import InferenceStream, _Waiting
from tests import graphs
from tests.conftest import running
from tests.graphs import INPUT
from tests.wire.gate import gated, until
from tests.wire.inference import calling, refusal, request
from tests.wire.native import chunk, streaming

x = np.zeros((2, 5, INPUT), np.float32)


def alive() -> int:
    """How many requests of the second door there are in memory."""
    return sum(type(one) is Inference for one in gc.get_objects())


@pytest.mark.usefixtures("collector_off")
async def test_requests_go_when_they_have_ended(lstm_repository: Path) -> None:
    """Answered, refused, abandoned while waiting or running: none stays until the collector comes by."""
    one, many = x[:1], {"x": x, "sequence_ids": np.array([7, 8])}
    async with running(lstm_repository) as server, calling(server) as stub:
        await stub.ModelInfer(request(one))
        await stub.ModelInfer(request(one, sequence_id=1, sequence_start=True))
        await stub.ModelInfer(request(many, sequence_start=True))
        await refusal(stub.ModelInfer(request(one, sequence_id=2)))
        await until(lambda: alive() == 0)
        with gated(server) as gate:
            calls = [stub.ModelInfer(request(one, sequence_id=1))]
            await gate.entered()
            calls += [stub.ModelInfer(request(one, sequence_id=1)) for _ in range(2)]
            await until(lambda: server.sequences.waiting == 2)
            for call in reversed(calls):
                call.cancel()
            await until(lambda: server.sequences.waiting == 0)
        await until(lambda: all(session.at_rest for session in server.operations.sessions))
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: alive() == 0)


async def test_what_waits_counts_whole(lstm_repository: Path) -> None:
    """Whatever a request holds counts while it waits, parameters too; one of several rows counts once."""
    one = request(x[:1], sequence_id=1)
    big = request(x[:1], sequence_id=1, note="x" * 10_000)
    many = request({"x": x, "sequence_ids": np.array([1, 2])}, sequence_start=True, note="x" * 10_000)
    async with running(lstm_repository, max_queued_bytes=25_000) as server, calling(server) as stub:
        for identity in (1, 2):
            await stub.ModelInfer(request(x[:1], sequence_id=identity, sequence_start=True))
        with gated(server) as gate:
            calls = [stub.ModelInfer(one)]
            await gate.entered()
            calls.append(stub.ModelInfer(request(x[:1], sequence_id=2)))
            await gate.until_queued(server, 1)
            calls.append(stub.ModelInfer(many))
            await until(lambda: server.sequences.waiting == 2)
            calls.append(stub.ModelInfer(big))
            await until(lambda: server.sequences.waiting == 3)
            assert server.metrics.registry.get_sample_value("conveyor_waiting_steps") == 3
            status, text = await refusal(stub.ModelInfer(big))
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "bytes are waiting for earlier steps of their sequences" in text
            gate.let(100)
            await asyncio.gather(*calls)
            # All of it is given back.
            assert (server.sequences.waiting, server.sequences._waiting_bytes) == (0, 0)


STEPS, OUTPUT = 10, 50
WIDE = np.zeros((1, STEPS, INPUT), np.float32)
REPLY = STEPS * OUTPUT * 4


@pytest.fixture
def wide_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that holds ``lstm`` with many outputs, so that replies have more bytes than requests."""
    monkeypatch.setattr(graphs, "OUTPUT", OUTPUT)
    graphs.write_lstm(tmp_path)
    return tmp_path


async def test_replies_to_come_count_on_a_stream(wide_repository: Path) -> None:
    """A stream is read as far as the replies of what was read have room, before there are any."""
    async with running(wide_repository, max_message_bytes=4 * REPLY) as server, calling(server) as stub:
        assert request(WIDE).ByteSize() < REPLY / 10
        call = stub.ModelStreamInfer()
        with gated(server) as gate:
            await call.write(request(WIDE))
            await gate.entered()
            for _ in range(7):
                await call.write(request(WIDE))
            await gate.until_queued(server, 3)
            await asyncio.sleep(0.05)  # for what must not happen there is nothing to wait for
            assert server.repository.find("lstm").queued == 3
            gate.let(100)
            for _ in range(8):
                assert (await call.read()).error_message == ""
        call.cancel()


async def test_replies_held_back_for_order_count(wide_repository: Path) -> None:
    """A reply that waits for an earlier one of its sequence counts by what it is."""
    async with running(wide_repository, max_message_bytes=4 * REPLY) as server, calling(server) as stub:
        servicer = server._servicers[1]
        stream = InferenceStream(servicer, server.sequences, b"", None, lambda: None)
        waiting = _Waiting(stream, request(WIDE))
        waiting.keys = [("lstm", "1")]
        stream._lines[waiting.keys[0]] = deque([_Waiting(stream, request(WIDE)), waiting])
        stream.wait(waiting, 10)
        reply = await stub.ModelInfer(request(WIDE))
        waiting.done(reply)
        assert stream._bytes >= REPLY


async def test_results_to_come_count_on_a_native_stream(wide_repository: Path) -> None:
    """The same through the native door."""
    async with (
        running(wide_repository, max_message_bytes=4 * REPLY) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        streaming(native.ConveyorServiceStub(channel)) as caller,
    ):
        sessions = [await caller.open() for _ in range(8)]
        with gated(server) as gate:
            await caller.send(chunk(sessions[0], 0, WIDE[0]))
            await gate.entered()
            for session in sessions[1:]:
                await caller.send(chunk(session, 0, WIDE[0]))
            await gate.until_queued(server, 3)
            await asyncio.sleep(0.05)
            assert server.repository.find("lstm").queued == 3
            gate.let(100)
            for _ in sessions:
                assert not (await caller.result()).HasField("error")


@pytest.mark.usefixtures("collector_off")
async def test_a_session_costs_its_state_its_reply_and_little_more(lstm_repository: Path) -> None:
    """At most 1 KiB of memory beyond them, of what Python and NumPy allocate; states lie in memory of their own."""
    count, together = 2000, 250
    async with running(lstm_repository) as server:
        operations, runner = server.operations, server.repository.find("lstm")
        inputs = [np.zeros((together, 1, INPUT), np.float32)]
        answers = _Answers()

        async def grow(first: int) -> tuple[int, int]:
            """Open and step sessions; bytes that they take, and those of their replies."""
            before, replies = tracemalloc.get_traced_memory()[0], operations.replies.held
            sessions = [operations.open(b"", f"session-{first + n}", runner) for n in range(count)]
            for at in range(0, count, together):
                chunks = [(session, 0, 0, answers) for session in sessions[at : at + together]]
                operations.chunks.step_together(runner, chunks, 1, inputs, None)
                expected = answers.count + together
                await answers.reach(expected)
            del sessions, chunks
            return tracemalloc.get_traced_memory()[0] - before, operations.replies.held - replies

        tracemalloc.start()
        try:
            # The first ones bring what is there once: buffers, tables.
            await grow(0)
            held, replies = await grow(count)
        finally:
            tracemalloc.stop()
        assert replies > 0
        assert (held - replies) / count <= 1024


class _Answers:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.count = 0

    def answer(self, result: Reply | ConveyorError) -> None:
        """Take the answer."""
        assert isinstance(result, Reply)
        self.count += 1

    async def reach(self, count: int) -> None:
        """Wait for so many."""
        await until(lambda: self.count == count)
