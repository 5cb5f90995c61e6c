"""Outputs whose file says the sizes of an example, as torch's exporter writes them, though a run gives others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conveyor import AsyncClient
from service.errors import LoadError
from service.settings import Settings
from service.versions.loading import load_model
from tests.any_graphs import GRU, model, place
from tests.conftest import running

GRAPH = """g (float[T, N, 3] x, float[1, N, 4] h0) => (float[7, 2, 4] y, float[1, 2, 4] hT) {
    Y, hT = GRU<hidden_size = 4>(x, W, R, , , h0)
    y = Squeeze(Y, axis)
}"""
DESCRIPTION = """\
    inputs: {x: {time_axis: 0, batch_axis: 1}}
    states: [{input: h0, output: hT, batch_axis: 1}]
    outputs: {y: {time_axis: 0, batch_axis: 1}}
    """


async def test_what_goes_in_has_the_word(tmp_path: Path) -> None:
    """Batches of any size and sequences of any length are served, many rows in one run, and streamed."""
    place(tmp_path, "any", model(GRAPH, GRU), DESCRIPTION)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 5, 3)).astype(np.float32)
    async with running(tmp_path) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        assert server.repository.find("any").manifest.rows_per_run is None
        whole = await client.infer("any", x)
        async with client.session("any") as session:
            streamed = np.concatenate([await session.step(chunk) for chunk in np.split(x[1], [2, 3])])
    assert whole.shape == (3, 5, 4)
    np.testing.assert_array_equal(streamed, whole[1])


def test_what_goes_in_that_is_fixed_is_refused(tmp_path: Path) -> None:
    """An input of exactly 2 rows has a batch baked in, whatever the outputs say."""
    path = place(tmp_path, "any", model(GRAPH.replace("T, N, 3] x", "T, 2, 3] x"), GRU), DESCRIPTION)
    with pytest.raises(LoadError, match="a batch of 2 baked into 'x'"):
        load_model(path, Settings(repository=tmp_path))
