"""Every cell on the device against the equations in float64: outputs and final states, streamed and in batches."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.devices import BATCHED, CELLS, INPUT, Models, draw, serving

BOUND = 1e-5
"""Largest difference in float32, without TF32."""
CUTS = (1, 1, 16, 3, 1, 16, 2)
"""Steps of the chunks of a stream: single ones, the length of long ones, others."""


@pytest.mark.parametrize("name", CELLS)
async def test_a_stream_is_the_reference(models: Models, device: str, name: str) -> None:
    """Chunks of many lengths, each session's own input: all outputs, and the states at the end, are within 1e-5."""
    model = models.get(name)
    x = draw(5, sum(CUTS), INPUT)
    async with serving(model, device) as (_, client):
        sessions = [await client.session(name) for _ in x]
        y = []
        begin = 0
        for steps in CUTS:
            given = {session: row[begin : begin + steps] for session, row in zip(sessions, x, strict=True)}
            outputs = await client.step_many(given)
            y.append(np.stack([outputs[session] for session in sessions]))
            begin += steps
        states = [(await session.export()).states for session in sessions]
    for row, got, have in zip(x, np.concatenate(y, axis=1), states, strict=True):
        expected, after = model.expected(row)
        np.testing.assert_allclose(got, expected, rtol=0, atol=BOUND)
        assert have.keys() == after.keys()
        for key, array in after.items():
            np.testing.assert_allclose(have[key], array, rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", [*CELLS, *BATCHED])
async def test_a_ragged_batch_is_the_reference(models: Models, device: str, name: str) -> None:
    """Sequences of lengths 1 to 40 in one call: outputs and final states of each are within 1e-5."""
    model = models.get(name)
    lengths = (40, 1, 17, 2, 33, 16)
    sequences = [draw(length, INPUT, seed=length) for length in lengths]
    async with serving(model, device) as (_, client):
        result = await client.infer(name, sequences, return_states=True)
    for index, sequence in enumerate(sequences):
        expected, after = model.expected(sequence)
        np.testing.assert_allclose(result.outputs[index], expected, rtol=0, atol=BOUND)
        for key, array in after.items():
            np.testing.assert_allclose(result.states[key][index], array, rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", ["lstm", "gru-after", "lstm-peephole"])
async def test_float16_is_within_its_bound(models: Models, device: str, name: str) -> None:
    """A float16 model streams, and is within the 5e-3 that its export is held to."""
    model = models.get(name, "float16")
    x = draw(20, INPUT).astype(np.float16)
    async with serving(model, device) as (_, client), client.session(name) as session:
        y = np.concatenate([await session.step(x[:1]), await session.step(x[1:17]), await session.step(x[17:])])
        state = (await session.export()).states
    expected, after = model.expected(x.astype(np.float32))
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=0, atol=5e-3)
    for key, array in after.items():
        np.testing.assert_allclose(state[key].astype(np.float64), array, rtol=0, atol=5e-3)
