"""What is promised of sessions, on the device: cuts, company, copies of states, forks, exports, several models."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from conveyor import AsyncClient, Full, SessionState
from service.engines.engine import Engine
from service.server import Server
from tests.conftest import running
from tests.gpu.devices import INPUT, Array, Models, draw, serving

BOUND = 1e-5
"""Between two results of the same steps: a device may add in another order for other sizes."""
NAMES = ("lstm", "gru-after", "lstm-peephole", "gru-before", "lstm-then-gru")


def copied(server: Server, direction: str) -> float:
    """How many bytes of states were copied to the device (``up``) or from it (``down``), of all models."""
    samples = (one for metric in server.metrics.registry.collect() for one in metric.samples)
    return sum(
        one.value
        for one in samples
        if one.name == "conveyor_state_copy_bytes_total" and one.labels["direction"] == direction
    )


@pytest.mark.parametrize("name", NAMES)
async def test_any_cut_gives_the_same(models: Models, device: str, name: str) -> None:
    """Forty steps whole, one by one, and in three random cuts: the same outputs and the same states."""
    model = models.get(name)
    x = draw(40, INPUT)
    random = np.random.default_rng(4)
    cuts = [[0, 40], list(range(41)), *([0, *sorted(random.choice(39, 6, replace=False) + 1), 40] for _ in range(3))]
    async with serving(model, device) as (_, client):
        found = []
        for cut in cuts:
            async with client.session(name) as session:
                y = [await session.step(x[begin:end]) for begin, end in itertools.pairwise(cut)]
                found.append((np.concatenate(y), (await session.export()).states))
    np.testing.assert_allclose(found[0][0], model.expected(x)[0], rtol=0, atol=BOUND)
    for outputs, states in found[1:]:
        np.testing.assert_allclose(outputs, found[0][0], rtol=0, atol=BOUND)
        for key, array in states.items():
            np.testing.assert_allclose(array, found[0][1][key], rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", NAMES)
async def test_company_changes_nothing(models: Models, device: str, name: str) -> None:
    """A session among 40 others with large inputs and a batch beside them gives what it gives alone."""
    model = models.get(name)
    x, loud = draw(12, INPUT), 50 * draw(40, 12, INPUT, seed=1)
    async with serving(model, device) as (_, client):
        session = await client.session(name)
        others = [await client.session(name) for _ in loud]
        y = []
        for t in range(12):
            batch = asyncio.ensure_future(client.infer(name, [row[: t + 1] for row in loud[:5]]))
            given = {other: row[t] for other, row in zip(others, loud, strict=True)}
            outputs = await client.step_many(given | {session: x[t]})
            await batch
            y.append(outputs[session])
        states = (await session.export()).states
    expected, after = model.expected(x)
    np.testing.assert_allclose(np.stack(y), expected, rtol=0, atol=BOUND)
    for key, array in after.items():
        np.testing.assert_allclose(states[key], array, rtol=0, atol=BOUND)


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize("name", ["lstm", "lstm-peephole"])
async def test_no_state_is_copied_while_sessions_step(models: Models, device: str, name: str, steps: int) -> None:
    """Sessions open, step and close, and a batch runs: not one byte of state. An export copies one row's, no more."""
    model = models.get(name)
    x = draw(6, 8 * steps, INPUT)
    row_bytes = sum(array.nbytes // 2 for array in model.expected(x[0])[1].values())
    async with serving(model, device) as (server, client):
        before = copied(server, "up"), copied(server, "down")
        sessions = [await client.session(name) for _ in x]
        for t in range(0, 8 * steps, steps):
            given = {session: row[t : t + steps] for session, row in zip(sessions, x, strict=True)}
            await client.step_many(given)
        await client.infer(name, list(x))
        assert (copied(server, "up"), copied(server, "down")) == before
        state = await sessions[0].export()
        assert copied(server, "down") - before[1] == row_bytes
        async with client.import_session(state) as again:
            assert copied(server, "up") - before[0] == row_bytes
            await again.step(x[0, 0])
        for session in sessions:
            await session.close()
        assert copied(server, "up") - before[0] == copied(server, "down") - before[1] == row_bytes


async def test_states_go_everywhere_from_the_device(models: Models, device: str, tmp_path: Path) -> None:
    """A fork, a file that is imported again, a reset and a batch's states: each goes on from where it says."""
    model = models.get("lstm")
    x = draw(12, INPUT)
    expected, _ = model.expected(x)
    async with serving(model, device) as (_, client), client.session("lstm") as session:
        np.testing.assert_allclose(await session.step(x), expected, rtol=0, atol=BOUND)
        await session.reset()
        await session.step(x[:6])
        (await session.export()).save(tmp_path / "state.npz")
        batch = await client.infer("lstm", x[None, :6], return_states=True)
        initial = {name: array[0] for name, array in batch.states.items()}
        async with (
            await session.fork() as fork,
            client.import_session(SessionState.load(tmp_path / "state.npz")) as imported,
            client.session("lstm", initial_states=initial) as begun,
        ):
            # The fork's parent goes on first: what one writes the other must not read.
            for each in (session, fork, imported, begun):
                np.testing.assert_allclose(await each.step(x[6:]), expected[6:], rtol=0, atol=BOUND)


async def test_a_state_goes_from_one_device_to_another(models: Models, device: str) -> None:
    """What was exported from a server whose states are in the host's memory goes on here, and back again."""
    model = models.get("lstm-peephole")
    x = draw(12, INPUT)
    expected, _ = model.expected(x)
    async with AsyncExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("service.versions.loading.Engine", Engine)
            _, elsewhere = await stack.enter_async_context(serving(model, "cpu"))
        _, here = await stack.enter_async_context(serving(model, device))
        async with elsewhere.session("lstm-peephole") as session:
            y = [await session.step(x[:4])]
            state = await session.export()
        async with here.import_session(state) as session:
            y.append(await session.step(x[4:8]))
            state = await session.export()
        async with elsewhere.import_session(state) as session:
            y.append(await session.step(x[8:]))
    np.testing.assert_allclose(np.concatenate(y), expected, rtol=0, atol=BOUND)


async def test_sessions_outlive_a_restart(models: Models, device: str, tmp_path: Path) -> None:
    """A server that drains writes the states it has on the device, and the next one goes on with them."""
    model = models.get("gru-after")
    x = draw(10, INPUT)
    expected, _ = model.expected(x)
    kept = tmp_path / "sessions.npz"
    async with serving(model, device, sessions_file=kept) as (server, client):
        session = await client.session("gru-after", session_id="one")
        first = await session.step(x[:5])
        await server.drain()
    assert kept.is_file()
    async with serving(model, device, sessions_file=kept) as (_, client), client.attach("one") as session:
        second = await session.step(x[5:])
    np.testing.assert_allclose(np.concatenate([first, second]), expected, rtol=0, atol=BOUND)


async def test_several_models_share_the_device(models: Models, device: str, tmp_path: Path) -> None:
    """Three models at once, each with sessions that step while the others do: each gives its own reference."""
    names = ("lstm", "gru-before", "rnn")
    for name in names:
        shutil.copytree(models.get(name).repository / name, tmp_path / name)
    x = draw(10, INPUT)
    async with running(tmp_path, device=device) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:

        async def stream(name: str) -> Array:
            async with client.session(name) as session:
                return np.stack([await session.step(row) for row in x])

        outputs = await asyncio.gather(*(stream(name) for name in names for _ in range(3)))
    for index, name in enumerate(name for name in names for _ in range(3)):
        expected, _ = models.get(name).expected(x)
        np.testing.assert_allclose(outputs[index], expected, rtol=0, atol=BOUND)


async def test_a_full_pool_refuses_and_goes_on(models: Models, device: str) -> None:
    """Three sessions fit, a fourth is refused; when one has been closed there is room, and it begins anew."""
    model = models.get("lstm")
    x = draw(4, INPUT)
    expected, _ = model.expected(x)
    async with serving(model, device, max_sessions=3) as (_, client):
        sessions = [await client.session("lstm") for _ in range(3)]
        for session in sessions:
            await session.step(x)
        with pytest.raises(Full):
            await client.session("lstm")
        await sessions[1].close()
        async with client.session("lstm") as session:
            np.testing.assert_allclose(await session.step(x), expected, rtol=0, atol=BOUND)
