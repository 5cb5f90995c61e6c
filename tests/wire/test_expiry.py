"""Idle expiry as a caller sees it, on a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest

from conveyor.v1 import conveyor_pb2 as pb
from tests.clock import Clock
from tests.conftest import calling, running
from tests.graphs import INPUT
from tests.wire.gate import until
from tests.wire.native import chunk, streaming

x = np.ones((1, INPUT), np.float32)


async def test_expired_unknown_and_closed_are_told_apart(lstm_repository: Path) -> None:
    """An idle session expires and says so for as long as it is remembered; its slot is free, and its id too."""
    clock = Clock()
    settings = {"idle_timeout_s": 10}
    async with (
        running(lstm_repository, clock, **settings) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        await caller.open(session_id="one")
        await caller.step(chunk("one", 0, x))
        clock.now += 10
        (result,) = await caller.step(chunk("one", 1, x))
        assert (result.error.reason, result.error.code) == ("session_expired", grpc.StatusCode.NOT_FOUND.value[0])
        (result,) = await caller.step(chunk("never", 0, x))
        assert result.error.reason == "session_unknown"
        assert server.repository.find("lstm").pool.taken == 0
        await caller.open(session_id="one")
        (result,) = await caller.step(chunk("one", 0, x))
        assert result.steps == 1
        await stub.CloseSession(pb.CloseSessionRequest(session_id="one"))
        (result,) = await caller.step(chunk("one", 1, x))
        assert result.error.reason == "session_unknown"


async def test_a_step_puts_expiry_off_and_a_look_does_not(lstm_repository: Path) -> None:
    """Stepping keeps a session alive; looking at it tells how long it has been idle."""
    clock = Clock()
    settings = {"idle_timeout_s": 10}
    async with (
        running(lstm_repository, clock, **settings) as server,
        calling(server) as stub,
        streaming(stub) as caller,
    ):
        session = await caller.open()
        for position in range(3):
            clock.now += 9
            (result,) = await caller.step(chunk(session, position, x))
            assert not result.HasField("error")
        clock.now += 9
        reply = await stub.GetSession(pb.GetSessionRequest(session_id=session))
        assert reply.session.idle_s == pytest.approx(9)
        clock.now += 1
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            await stub.GetSession(pb.GetSessionRequest(session_id=session))
        assert expired.value.code() is grpc.StatusCode.NOT_FOUND


async def test_expired_sessions_make_room(lstm_repository: Path) -> None:
    """A full table refuses at once and names the limit; once the idle ones have expired there is room."""
    clock = Clock()
    settings = {"idle_timeout_s": 10, "max_sessions": 2}
    async with running(lstm_repository, clock, **settings) as server, calling(server) as stub:
        for _ in range(2):
            await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))
        with pytest.raises(grpc.aio.AioRpcError) as full:
            await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))
        assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 sessions" in (full.value.details() or "")
        clock.now += 10
        await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))


async def test_expiry_goes_on_after_it_has_failed(
    lstm_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the server does every so often fails once: it is logged, and done again."""
    clock = Clock()
    async with running(lstm_repository, clock, idle_timeout_s=0.05) as server, calling(server) as stub:
        expire, calls = server.operations.expire, 0

        def fail_once() -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("out of order")
            return expire()

        monkeypatch.setattr(server.operations, "expire", fail_once)
        await stub.OpenSession(pb.OpenSessionRequest(model="lstm", session_id="one"))
        clock.now += 1
        await until(lambda: len(server.operations.sessions) == 0)
    assert calls > 1
    assert "will be tried again" in capsys.readouterr().out
