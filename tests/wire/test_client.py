"""The client against the real server, both in this event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conveyor import (
    AsyncClient,
    InvalidRequest,
    Late,
    ModelUnknown,
    PositionConflict,
    SessionExists,
    SessionLost,
    SessionState,
    SessionUnknown,
    StepsFailed,
)
from service.server import Server
from service.states.pool import Pool
from tests.clock import Clock
from tests.conftest import running
from tests.graphs import HIDDEN, INPUT, OUTPUT, expected

BOUND = 2e-6
"""Largest difference of float32 outputs from the float64 reference."""

x: NDArray[np.float32] = np.random.default_rng(5).standard_normal((12, INPUT)).astype(np.float32)


@pytest.fixture
async def server(lstm_repository: Path) -> AsyncIterator[Server]:
    """A server with the model ``lstm``."""
    async with running(lstm_repository) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    """A client of it, without a key."""
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def test_the_signature_is_the_models(client: AsyncClient) -> None:
    """Names, dtypes, shapes and axes, as one needs them to call it."""
    (model,) = await client.models()
    assert (model.name, model.version, model.streamable, model.cells) == ("lstm", 1, True, ("lstm",))
    (given_x,), (y,) = model.inputs, model.outputs
    assert (given_x.name, given_x.shape, given_x.axes) == ("x", (None, None, INPUT), ("batch", "time", "feature"))
    assert (y.name, y.shape) == ("y", (None, None, OUTPUT))
    assert given_x.dtype == y.dtype == np.float32
    assert [state.name for state in model.states] == ["h", "c"]
    assert all(state.axes[0] == "batch" and state.shape[0] is None for state in model.states)


async def test_a_batch_is_the_reference(client: AsyncClient) -> None:
    """Ragged sequences, alone and together, equal the float64 reference."""
    sequences = [x, x[:5], x[3:4]]
    for y, sequence in zip(await client.infer("lstm", sequences), sequences, strict=True):
        np.testing.assert_allclose(y, expected(sequence), rtol=0, atol=BOUND)


async def test_a_session_is_the_reference_however_it_is_cut(client: AsyncClient) -> None:
    """Single steps and chunks in turn give the bits of the whole sequence, and the states too."""
    whole = await client.infer("lstm", x[None], return_states=True)
    async with client.session("lstm") as session:
        y = [(await session.step(x[0]))[None]]
        for begin, end in [(1, 2), (2, 7), (7, 12)]:
            y.append(await session.step(x[begin:end]))
        np.testing.assert_array_equal(np.concatenate(y), whole.outputs[0])
        state = await session.export()
        for name, array in state.states.items():
            np.testing.assert_array_equal(array, whole.states[name][0])
    np.testing.assert_allclose(whole.outputs[0], expected(x), rtol=0, atol=BOUND)


async def test_states_go_from_infer_to_a_session_and_back(client: AsyncClient) -> None:
    """Begun in a batch, continued in a session, ended in a batch."""
    first = await client.infer("lstm", x[None, :4], return_states=True)
    initial = {name: array[0] for name, array in first.states.items()}
    async with client.session("lstm", initial_states=initial) as session:
        second = await session.step(x[4:8])
        states = {name: array[None] for name, array in (await session.export()).states.items()}
    third = await client.infer("lstm", x[None, 8:], states=states)
    y = np.concatenate([first.outputs[0], second, third[0]])
    np.testing.assert_allclose(y, expected(x), rtol=0, atol=BOUND)


async def test_fork_reset_export_and_import(client: AsyncClient, tmp_path: Path) -> None:
    """Each goes on from where it says, independently of the others."""
    async with client.session("lstm") as session:
        y = await session.step(x)
        await session.reset()
        await session.step(x[:6])
        (await session.export()).save(tmp_path / "state.npz")
        async with (
            await session.fork() as fork,
            client.import_session(SessionState.load(tmp_path / "state.npz")) as imported,
            client.attach(session.session_id) as attached,
        ):
            assert [each.position for each in (session, fork, imported, attached)] == [6, 6, 6, 6]
            for each in (fork, imported, attached):
                np.testing.assert_array_equal(await each.step(x[6:]), y[6:])


async def test_an_export_is_waited_for_by_nobody_else(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a device takes to give states away: the session itself goes on, and what comes is as it was."""
    reading, go = threading.Event(), threading.Event()
    read = Pool.read

    def slowly(pool: Pool, slot: int) -> list[NDArray[np.generic]]:
        reading.set()
        assert go.wait(5)
        return read(pool, slot)

    async with client.session("lstm") as session:
        y = await session.step(x[:6])
        # A handle of a session makes one call at a time.
        other = await client.attach(session.session_id)
        export = asyncio.create_task(other.export())
        # Only this export's: to copy a slot is to read it, here.
        monkeypatch.setattr(
            Pool, "allocate", lambda pool, slot, allocate=Pool.allocate: allocate(pool, read(pool, slot))
        )
        monkeypatch.setattr(Pool, "read", slowly)
        assert await asyncio.to_thread(reading.wait, 5)
        more = await session.step(x[6:])
        go.set()
        state = await export
        monkeypatch.undo()
        assert state.position == 6
        async with client.import_session(state) as imported:
            np.testing.assert_array_equal(await imported.step(x[6:]), more)
        np.testing.assert_allclose(np.concatenate([y, more]), expected(x), rtol=0, atol=BOUND)


async def test_a_state_of_another_model(client: AsyncClient) -> None:
    """Under the same name and number it is refused, with what was expected; without a digest it is taken on trust."""
    async with client.session("lstm") as session:
        await session.step(x[:6])
        state = await session.export()
    assert len(state.digest) == 64
    with pytest.raises(InvalidRequest, match=f"of another file than the one .* expected '{state.digest[:12]}'"):
        await client.import_session(replace(state, digest="0" * 64))
    async with client.import_session(replace(state, digest="")) as imported:
        assert imported.position == 6


async def test_many_sessions_at_once(client: AsyncClient) -> None:
    """Sixty-four sessions, each with its own input, stepped together: none sees another."""
    inputs = np.random.default_rng(6).standard_normal((64, 9, INPUT)).astype(np.float32)
    sessions = [await client.session("lstm") for _ in inputs]
    y = []
    for t in range(9):
        outputs = await client.step_many({session: row[t] for session, row in zip(sessions, inputs, strict=True)})
        y.append(np.stack([outputs[session] for session in sessions]))
    for row, sequence in zip(np.stack(y, 1), inputs, strict=True):
        np.testing.assert_allclose(row, expected(sequence), rtol=0, atol=BOUND)


async def test_a_key_keeps_others_out(server: Server, client: AsyncClient) -> None:
    """With another key, or none, the session is not there; with the same one it is."""
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, key="mine") as mine, AsyncClient(target, key="other") as other:
        session = await mine.session("lstm", session_id="s")
        await session.step(x[:3])
        for stranger in (other, client):
            with pytest.raises(SessionUnknown):
                await stranger.attach("s")
        await other.session("lstm", session_id="s")
        async with AsyncClient(target, key="mine") as again:
            assert (await again.attach("s")).position == 3


async def test_errors_are_the_servers(client: AsyncClient) -> None:
    """Each with its type and text; the session goes on after them."""
    with pytest.raises(ModelUnknown):
        await client.session("nothing")
    with pytest.raises(ModelUnknown):
        await client.session("lstm", version=7)
    session = await client.session("lstm", session_id="s")
    with pytest.raises(SessionExists):
        await client.session("lstm", session_id="s")
    with pytest.raises(InvalidRequest, match="NaN"):
        await session.step(np.full(INPUT, np.nan))
    with pytest.raises(InvalidRequest, match="shape"):
        await session.step(np.zeros((2, INPUT + 1)))
    with pytest.raises(InvalidRequest, match="T = 0"):
        await session.step(np.zeros((0, INPUT)))
    with pytest.raises(InvalidRequest, match="N = 0"):
        await client.infer("lstm", np.zeros((0, 3, INPUT)))
    assert (session.position, session.in_doubt) == (0, False)
    np.testing.assert_allclose(await session.step(x), expected(x), rtol=0, atol=BOUND)
    other = await client.attach("s", position=3)
    with pytest.raises(PositionConflict) as conflict:
        await other.step(x[:2])
    assert conflict.value.position == 12


async def test_a_second_writer_gets_the_first_ones_outputs(client: AsyncClient) -> None:
    """As ``attach`` says: the server knows a chunk by its position and length, not by its data."""
    async with client.session("lstm") as session, client.attach(session.session_id) as other:
        y = await session.step(x[:3])
        np.testing.assert_array_equal(await other.step(x[3:6]), y)
        assert (session.position, other.position) == (3, 3)


async def test_a_shape_is_refused_in_the_servers_words(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is noticed here or there."""
    async with client.session("lstm") as session:

        async def said() -> list[str]:
            errors = []
            for call in (client.infer("lstm", np.zeros((2, 5, INPUT + 1))), session.step(np.zeros((5, INPUT + 1)))):
                with pytest.raises(InvalidRequest) as refused:
                    await call
                errors.append(str(refused.value))
            return errors

        here = await said()
        monkeypatch.setattr("conveyor.payload._fits", lambda array, sizes: array.ndim == len(sizes))
        there = await said()
        assert here == [there[0], f"{there[1]}, or [{INPUT}] for a single step"]


async def test_a_session_closed_by_someone_else_is_lost(client: AsyncClient) -> None:
    """For its holder; and a message that others share is not disturbed."""
    session, other = await client.session("lstm"), await client.session("lstm")
    await (await client.attach(session.session_id)).close()
    with pytest.raises(StepsFailed) as failed:
        await client.step_many({session: x, other: x})
    assert isinstance(failed.value.errors[session], SessionLost)
    np.testing.assert_allclose(failed.value.outputs[other], expected(x), rtol=0, atol=BOUND)


async def test_a_late_step_did_not_count(lstm_repository: Path) -> None:
    """The server says so, and the session stands where it stood."""

    class Hurrying(Clock):
        """An hour passes at each look."""

        def __call__(self) -> float:
            self.now += 3600
            return self.now

    async with (
        running(lstm_repository, Hurrying(), idle_timeout_s=1e9) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        session = await client.session("lstm")
        with pytest.raises(Late):
            await session.step(x, timeout_s=10)
        assert (session.position, session.in_doubt) == (0, False)
        np.testing.assert_allclose(await session.step(x, timeout_s=1e6), expected(x), rtol=0, atol=BOUND)


class Actions:
    """What a careless user may do with a session: cut, cancel, fork, step twice at once."""

    chunk = st.tuples(st.just("step"), st.integers(1, 5))
    cancelled = st.tuples(st.just("cancelled"), st.integers(1, 5))
    fork = st.tuples(st.just("fork"), st.just(0))
    together = st.tuples(st.just("together"), st.integers(1, 3))
    settle = st.tuples(st.just("settle"), st.just(0))
    any = st.lists(st.one_of(chunk, cancelled, fork, together, settle), min_size=1, max_size=10)


@settings(max_examples=25, deadline=None)
@given(actions=Actions.any, turns=st.lists(st.integers(0, 200), min_size=10, max_size=10))
def test_the_position_is_always_true(actions: list[tuple[str, int]], turns: list[int], lstm_repository: Path) -> None:
    """However steps are cut, cancelled, forked and made at once: after ``settle``, outputs go on where it says.

    The input at each position is fixed, so the outputs at a position are too, whichever steps counted.
    """
    series = np.random.default_rng(7).standard_normal((120, INPUT)).astype(np.float32)
    reference = expected(series)

    def check(begin: int, y: Any) -> None:
        np.testing.assert_allclose(y, reference[begin : begin + len(y)], rtol=0, atol=BOUND)

    async def run() -> None:
        async with running(lstm_repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            session = await client.session("lstm")
            for (action, steps), wait in zip(actions, turns, strict=False):
                await session.settle()
                begin = session.position
                part = series[begin : begin + steps]
                if action == "step":
                    check(begin, await session.step(part))
                elif action == "fork":
                    session = await session.fork()
                elif action == "together":
                    rest = series[begin + steps : begin + 2 * steps]
                    check(begin, np.concatenate(await asyncio.gather(session.step(part), session.step(rest))))
                elif action == "cancelled":
                    task = asyncio.create_task(session.step(part))
                    for _ in range(wait):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
                    y = await session.settle()
                    if not task.cancelled():
                        y = task.result()
                    if y is not None:
                        check(begin, y)
                    assert session.position == begin + (0 if y is None else steps)
            state = await session.export()
            assert state.position == session.position
            assert state.states["h"].shape == (1, HIDDEN)

    asyncio.run(run())
