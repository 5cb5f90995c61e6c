"""Large messages are read and written beside the event loop: they are right, and what else goes on does not wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from service.wire import assembly
from service.wire.assembly import Part, Written
from tests.conftest import calling, running
from tests.graphs import INPUT, expected
from tests.wire.doors import DOORS, through
from tests.wire.gate import until
from tests.wire.native import array, chunk, streaming

x = np.random.default_rng(0).standard_normal((2, 5, INPUT)).astype(np.float32)


class Held:
    """Writing of replies that waits to be let through."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.released = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, parts: Sequence[Part]) -> Written:
        """Wait, then write."""
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.released.wait(60)
        return assembly.assemble(parts)


@pytest.fixture
async def held(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    """Every message counts as large, and the replies to batches are held."""
    held = Held()
    monkeypatch.setattr("service.wire.door._LARGE_BYTES", 0)
    monkeypatch.setattr("service.wire.conveyor.assemble", held)
    monkeypatch.setattr("service.wire.inference_call.assemble", held)
    yield held
    held.released.set()


@pytest.mark.parametrize("door", DOORS)
async def test_a_large_batch_is_the_reference(lstm_repository: Path, door: str) -> None:
    """Through either door, padded rows and states too."""
    rows, lengths = 32, [1024 - 30 * n for n in range(32)]
    large = np.random.default_rng(1).standard_normal((rows, 1024, INPUT)).astype(np.float32)
    async with running(lstm_repository) as server, through(door, server) as calls:
        y, _ = await calls.infer(large, lengths)
        assert y.nbytes >= 256 * 1024
        for n in (0, 17, 31):
            np.testing.assert_allclose(y[n, : lengths[n]], expected(large[n, : lengths[n]]), rtol=0, atol=4e-6)
            assert not y[n, lengths[n] :].any()
        large[3, lengths[3] - 1, 0] = np.nan
        with pytest.raises(Exception, match="holds NaN or infinity"):
            await calls.infer(large, lengths)
        large[3, lengths[3] - 1, 0], large[3, lengths[3], 0] = 0, np.nan
        await calls.infer(large, lengths)


@pytest.mark.parametrize("door", DOORS)
async def test_others_go_on_meanwhile(lstm_repository: Path, held: Held, door: str) -> None:
    """While a reply is being written a session steps."""
    async with (
        running(lstm_repository) as server,
        calling(server) as stub,
        streaming(stub) as caller,
        through(door, server) as calls,
    ):
        batch = asyncio.create_task(calls.infer(x))
        await held.entered.wait()
        session = await caller.open()
        (result,) = await caller.step(chunk(session, 0, x[0]))
        np.testing.assert_allclose(array(result.outputs[0]), expected(x[0]), rtol=0, atol=2e-6)
        assert not batch.done()
        held.released.set()
        y, _ = await batch
        np.testing.assert_allclose(y, [expected(row) for row in x], rtol=0, atol=2e-6)


@pytest.mark.parametrize("door", DOORS)
async def test_a_caller_that_goes_away_costs_no_more(lstm_repository: Path, held: Held, door: str) -> None:
    """Its call ends at once, though its reply is still being written, and calls after it are answered."""
    async with running(lstm_repository) as server, through(door, server) as calls:
        cancel = await calls.begin_infer(x)
        await held.entered.wait()
        cancel()
        await server.operations.intake.rest()
        held.released.set()
        y, _ = await calls.infer(x)
        np.testing.assert_allclose(y, [expected(row) for row in x], rtol=0, atol=2e-6)
        assert server.repository.find("lstm").pool.taken == 0


@pytest.mark.parametrize("door", DOORS)
async def test_a_drain_waits_for_what_is_being_written(lstm_repository: Path, held: Held, door: str) -> None:
    """What was accepted is answered."""
    async with running(lstm_repository) as server, through(door, server) as calls:
        batch = asyncio.create_task(calls.infer(x))
        await held.entered.wait()
        drain = asyncio.create_task(server.drain())
        await until(lambda: server.operations.intake.draining)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not drain.done()
        held.released.set()
        y, _ = await batch
        np.testing.assert_allclose(y, [expected(row) for row in x], rtol=0, atol=2e-6)
        await drain
