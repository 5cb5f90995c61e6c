"""Models that were not exported here, through the server and the client, against a plain loop over onnxruntime."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor import AsyncClient, EngineFailed, InvalidRequest
from service.errors import LoadError
from service.settings import Settings
from service.versions.loading import load_model
from tests.any_graphs import CASES, CELL, Case, close, model, place
from tests.conftest import running
from tests.wire.doors import DOORS, MODEL, Chunk, through

Array = NDArray[Any]
LENGTHS = [5, 2, 7, 1]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each graph in turn."""
    assert isinstance(request.param, Case)
    return request.param


def named(outputs: Any) -> dict[str, Array]:
    """Outputs by name, also where there is one."""
    return outputs if isinstance(outputs, dict) else {"y": outputs}


@pytest.mark.parametrize("form", ["padded", "ragged"])
async def test_a_batch_is_the_plain_loop(tmp_path: Path, case: Case, form: str) -> None:
    """Rows of different lengths in one call: outputs, and the final states, batch first on the wire."""
    path = case.write(tmp_path)
    random = np.random.default_rng(1)
    rows = [case.inputs(random, length) for length in LENGTHS]
    padded = {
        name: np.stack([np.concatenate([row[name], np.zeros_like(rows[2][name][len(row[name]) :])]) for row in rows])
        for name in rows[0]
    }
    async with running(tmp_path) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        if form == "padded":
            result = await client.infer("any", padded, lengths=LENGTHS, return_states=True)
        else:
            ragged = {name: [row[name] for row in rows] for name in rows[0]}
            result = await client.infer("any", ragged, return_states=True)
        specs = server.repository.find("any").manifest.states
    for index, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        expected, states = case.loop(path, row)
        for name, given in named(result.outputs).items():
            close(given[index][:length], expected[name])
            assert form == "padded" or len(given[index]) == length
        for spec in specs:
            given = result.states[spec.name][index]
            close(given, states[spec.input].reshape(given.shape))


async def test_sessions_are_the_plain_loop(tmp_path: Path, case: Case) -> None:
    """Live sequences side by side, one cut into steps and one into chunks, each as if it were alone."""
    path = case.write(tmp_path)
    random = np.random.default_rng(2)
    rows = [case.inputs(random, 7) for _ in range(2)]

    async def stream(client: AsyncClient, row: dict[str, Array], cuts: list[int]) -> list[dict[str, Array]]:
        parts, begin = [], 0
        async with client.session("any") as session:
            for steps in cuts:
                chunk = {name: array[begin : begin + steps] for name, array in row.items()}
                parts.append(named(await session.step(chunk)))
                begin += steps
        return parts

    async with running(tmp_path) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        streamed = await asyncio.gather(stream(client, rows[0], [1] * 7), stream(client, rows[1], [3, 1, 3]))
        assert server.repository.find("any").pool.taken == 0
    for row, parts in zip(rows, streamed, strict=True):
        expected, _ = case.loop(path, row)
        for name in parts[0]:
            close(np.concatenate([part[name] for part in parts]), expected[name])


ONE_X = [case for case in CASES if "float[T, N, 3] x)" in case.graph or "float[T, N, 3] x," in case.graph]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("one", [case for case in ONE_X if "lengths" not in case.description], ids=lambda one: one.name)
async def test_a_chunk_counts_once(tmp_path: Path, one: Case, door: str) -> None:
    """Through either door: sent again it gets its reply, out of place it is refused, and the states stay."""
    path = one.write(tmp_path)
    path.parents[1].rename(tmp_path / MODEL)
    path = tmp_path / MODEL / "1/model.onnx"
    row = one.inputs(np.random.default_rng(3), 7)
    async with running(tmp_path) as server, through(door, server) as calls:
        session = await calls.open()
        parts = []
        for begin, end in ((0, 3), (3, 4), (4, 7)):
            chunk = Chunk(session, begin, row["x"][begin:end])
            (answer,) = await calls.step(chunk)
            assert await calls.step(chunk) == [answer]
            (early,) = await calls.step(Chunk(session, end + 1, row["x"][:1]))
            assert (early.error, early.position) == ("ABORTED", end)
            assert not answer.error
            parts.append(np.frombuffer(answer.data, "<f4").reshape(end - begin, -1))
    expected, _ = one.loop(path, row)
    close(np.concatenate(parts), expected["y"])


async def test_which_run_row_by_row_is_told(tmp_path: Path, case: Case) -> None:
    """By a metric, for those that take one row, and for those that say they take any and do not."""
    case.write(tmp_path)
    async with running(tmp_path) as server:
        labels = {"model": "any", "version": "1"}
        told = server.metrics.registry.get_sample_value("conveyor_row_by_row", labels)
    assert told == case.row_by_row


async def test_the_signature_is_the_presented_one(tmp_path: Path) -> None:
    """A client is told batch and time of a model that has neither, and sends and gets them."""
    (case,) = (case for case in CASES if case.name == "no axes at all")
    case.write(tmp_path)
    async with running(tmp_path) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        signature = await client.model("any")
    assert [(spec.name, spec.shape, spec.axes) for spec in (*signature.inputs, *signature.outputs)] == [
        ("x", (None, None, 3), ("batch", "time", "feature")),
        ("y", (None, None), ("batch", "time")),
    ]
    assert [(spec.name, spec.shape[:1], len(spec.axes)) for spec in signature.states] == [("h", (None,), 2)]


async def test_a_row_that_fails_alone_disturbs_nobody(tmp_path: Path) -> None:
    """An index that the graph cannot take, where nobody gave a bound: its caller's error, the others' results."""
    graph = """g (int64[N] x, float[N, 4] h) => (float[N, 4] y, float[N, 4] h_next) {
        e = Gather(table, x)  s = Add(e, h)  h_next = Tanh(s)  y = Identity(h_next)
    }"""
    description = """\
        inputs: {x: {batch_axis: 0}}
        states: [{input: h, output: h_next, batch_axis: 0}]
        outputs: {y: {batch_axis: 0}}
        """
    table = CELL["R"]
    place(tmp_path, "any", model(graph, {"table": table}), description)
    async with running(tmp_path) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        good, bad = await client.session("any"), await client.session("any")
        outcomes = await asyncio.gather(good.step([1, 2]), bad.step([1, 99]), return_exceptions=True)
        assert isinstance(outcomes[1], EngineFailed)
        close(np.asarray(outcomes[0]), np.stack([np.tanh(table[1]), np.tanh(np.tanh(table[1]) + table[2])]))
        # The first step of the chunk that failed was run inside the server, and counts for nothing.
        close(await bad.step([3]), np.tanh(table[3])[None])
        with pytest.raises(InvalidRequest, match="expected"):
            await bad.step([[1.5]])


async def test_a_model_that_is_refused_disturbs_nobody(tmp_path: Path) -> None:
    """Its reason is kept; the others are served."""
    CASES[1].write(tmp_path)
    place(tmp_path, "bare", model(CASES[1].graph, CASES[1].weights))
    async with running(tmp_path) as server:
        assert server.repository.names() == ["any"]
    with pytest.raises(LoadError, match=r"no manifest .*python -m export inspect FILE"):
        load_model(tmp_path / "bare/1/model.onnx", Settings())
