"""Ticks of few steps, which a device may run as a captured graph with room for more rows than there are."""

from __future__ import annotations

import numpy as np
import pytest
from structlog.testing import capture_logs

from tests.gpu.devices import INPUT, Array, Models, draw, serving

BOUND = 1e-5


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["lstm", "gru-after", "gru-before", "lstm-coupled-peepholes"])
async def test_ticks_of_every_number_of_rows(models: Models, capturing: str, name: str, steps: int) -> None:
    """Of twenty sessions 1 step together, then 2, up to all, then fewer again, in another order each time.

    Those that rest stay as they are: all outputs and final states are the reference's, of as many steps as each had.
    """
    model = models.get(name)
    random = np.random.default_rng(8)
    counts = [*range(1, 21), 13, 7, 5, 1]
    x = draw(20, len(counts) * steps, INPUT)
    y: list[list[Array]] = [[] for _ in x]
    async with serving(model, capturing, max_tick_rows=32, cuda_graphs="on") as (_, client):
        sessions = [await client.session(name) for _ in x]
        for count in counts:
            chosen = random.permutation(20)[:count].tolist()
            given = {sessions[n]: x[n, sessions[n].position : sessions[n].position + steps] for n in chosen}
            outputs = await client.step_many(given)
            for n in chosen:
                y[n].append(outputs[sessions[n]])
        states = [(await session.export()).states for session in sessions]
    for n, outputs_of in enumerate(y):
        expected, after = model.expected(x[n, : len(outputs_of) * steps])
        np.testing.assert_allclose(np.concatenate(outputs_of), expected, rtol=0, atol=BOUND)
        for key, array in after.items():
            np.testing.assert_allclose(states[n][key], array, rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", ["gru-before", "lstm-coupled-peepholes", "rnn-relu"])
async def test_ticks_of_one_step_are_captured(models: Models, capturing: str, name: str) -> None:
    """What has no cuDNN operator is captured for every power of two of rows; the log says so once."""
    with capture_logs() as logs:
        async with (
            serving(models.get(name), capturing, max_tick_rows=32, cuda_graphs="on") as (_, client),
            client.session(name) as session,
        ):
            await session.step(draw(INPUT))
    (entry,) = [entry for entry in logs if entry["event"] == "model settled in"]
    assert entry["found"] == "ticks of one step are captured with room for [1, 2, 4, 8, 16, 32] rows"
