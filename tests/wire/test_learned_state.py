"""A model of foreign arrays with a learned initial state, served: every way to begin begins from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conveyor import AsyncClient
from export.__main__ import main
from tests.conftest import running
from tests.unit.export import textbook
from tests.unit.export.elsewhere import LSTM, H, I, drawn, write

SPEC = """
weights: w.npz
layers:
  - cell: lstm
    product: x @ W
    arrays:
      W_x: {i: Wi, f: Wf, c: Wg, o: Wo}
      W_h: {i: Ui, f: Uf, c: Ug, o: Uo}
      b: {i: bi, f: bf, c: bg, o: bo}
    initial: {h: h_start, c: c_start}
"""
START = drawn({"h_start": (H,), "c_start": (H,)}, seed=5)
BOUND = 2e-6

x = np.random.default_rng(7).standard_normal((9, I)).astype(np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the model ``lstm``."""
    folder = tmp_path_factory.mktemp("learned")
    spec = write(folder, SPEC, w_npz=LSTM | START)
    assert main(["from-weights", str(spec), "--repository", str(folder / "models"), "--name", "lstm"]) == 0
    return folder / "models"


async def test_every_beginning_is_from_the_learned_state(repository: Path) -> None:
    """A batch, a session, and a session after a reset beside which another one opens; then the states go on."""
    expected, h, c = textbook.run(textbook.lstm, LSTM, x, START["h_start"], START["c_start"])
    from_zeros, *_ = textbook.run(textbook.lstm, LSTM, x, np.zeros(H), np.zeros(H))
    assert np.abs(expected - from_zeros).max() > 0.1

    async with running(repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        batch = await client.infer("lstm", np.stack([x, -x]), return_states=True)
        np.testing.assert_allclose(batch.outputs[0], expected, rtol=0, atol=BOUND)
        np.testing.assert_allclose(batch.states["h"][0, 0], h, rtol=0, atol=BOUND)
        np.testing.assert_allclose(batch.states["c"][0, 0], c, rtol=0, atol=BOUND)
        async with client.session("lstm") as session:
            await session.step(-x)
            async with client.session("lstm") as other:
                await session.reset()
                for start in (0, 4):
                    for each in (session, other):
                        y = await each.step(x[start : start + 4])
                        np.testing.assert_allclose(y, expected[start : start + 4], rtol=0, atol=BOUND)
