"""A model of foreign arrays with a learned initial state, served: every way to begin begins from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conveyor import AsyncClient
from export.__main__ import main
from tests.conftest import running
from tests.unit.export.weights import textbook
from tests.unit.export.weights.elsewhere import LSTM, Array, H, I, drawn, write
from tests.wire.inference import calling, output, request

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


@pytest.fixture(scope="module")
def expected() -> tuple[Array, Array, Array]:
    """What the textbook's loop gives from the learned state, which is not what it gives from zeros."""
    outputs, h, c = textbook.run(textbook.lstm, LSTM, x, START["h_start"], START["c_start"])
    from_zeros, *_ = textbook.run(textbook.lstm, LSTM, x, np.zeros(H), np.zeros(H))
    assert np.abs(outputs - from_zeros).max() > 0.1
    return outputs, h, c


async def test_every_beginning_is_from_the_learned_state(
    repository: Path, expected: tuple[Array, Array, Array]
) -> None:
    """A batch, a session, and a session after a reset beside which another one opens; then the states go on."""
    outputs, h, c = expected
    async with running(repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        batch = await client.infer("lstm", np.stack([x, -x]), return_states=True)
        np.testing.assert_allclose(batch.outputs[0], outputs, rtol=0, atol=BOUND)
        np.testing.assert_allclose(batch.states["h"][0, 0], h, rtol=0, atol=BOUND)
        np.testing.assert_allclose(batch.states["c"][0, 0], c, rtol=0, atol=BOUND)
        async with client.session("lstm") as session:
            await session.step(-x)
            async with client.session("lstm") as other:
                await session.reset()
                for start in (0, 4):
                    for each in (session, other):
                        y = await each.step(x[start : start + 4])
                        np.testing.assert_allclose(y, outputs[start : start + 4], rtol=0, atol=BOUND)


async def test_start_begins_from_the_learned_state(repository: Path, expected: tuple[Array, Array, Array]) -> None:
    """Through the Open Inference Protocol: a sequence's first START, and one that restarts it."""
    async with running(repository) as server, calling(server) as stub:
        await stub.ModelInfer(request(-x[None], sequence_id=5, sequence_start=True))
        first = await stub.ModelInfer(request(x[None, :4], sequence_id=5, sequence_start=True))
        second = await stub.ModelInfer(request(x[None, 4:], sequence_id=5))
        other = await stub.ModelInfer(request(x[None], sequence_id=6, sequence_start=True))
    for reply, part in ((first, slice(4)), (second, slice(4, None)), (other, slice(None))):
        np.testing.assert_allclose(output(reply)[0], expected[0][part], rtol=0, atol=BOUND)
