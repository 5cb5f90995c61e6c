"""The device's memory runs out: what came last is refused, what came before is answered, and the service lives."""

from __future__ import annotations

import numpy as np
import pytest

from conveyor import Full, StepsFailed
from service.engines.resident_workspace import ResidentWorkspace
from service.errors import LoadError
from service.states.device import HostDevice
from tests.gpu.devices import INPUT, Model, Models, draw, serving

BOUND = 1e-5
LIMIT_BYTES = 20 << 20
"""Room for the weights, 4 MiB, twice, and for runs of few rows; not for 512 rows of 16 steps: h alone takes 16."""
ROWS, STEPS = 512, 16
SETTINGS = {
    "gpu_memory_limit_bytes": LIMIT_BYTES,
    "arena_extend": "same",
    # As large a tick as is asked for.
    "max_tick_rows": ROWS,
    "max_tick_steps": ROWS * STEPS,
    "short_tick_ms": 1e4,
    "long_tick_ms": 1e4,
}


@pytest.fixture
def model(models: Models, device: str, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that a tick of 512 rows is too large for: on CUDA by the limit of its memory; on the CPU it says so."""
    if device == "cuda":
        return models.get("lstm-wide")
    compute = ResidentWorkspace.compute

    def compute_few(workspace: ResidentWorkspace) -> None:
        if workspace.rows > ROWS // 4:
            # As onnxruntime's arena says it of a limit.
            raise RuntimeError("Available memory of 33554432 is smaller than requested bytes of 67108864")
        compute(workspace)

    monkeypatch.setattr(ResidentWorkspace, "compute", compute_few)
    return models.get("lstm")


async def test_a_tick_that_does_not_fit_refuses_the_newest(model: Model, device: str) -> None:
    """Of 512 sessions that step together the newest are refused with RESOURCE_EXHAUSTED and stay where they were.

    The others are answered as the reference has it, and those that were refused go on by themselves afterwards.
    """
    x = draw(STEPS, INPUT)
    expected, _ = model.expected(x)
    async with serving(model, device, **SETTINGS) as (_, client):
        sessions = [await client.session(model.name) for _ in range(ROWS)]
        with pytest.raises(StepsFailed) as failed:
            await client.step_many(dict.fromkeys(sessions, x))
        done, refused = failed.value.outputs, failed.value.errors
        assert all(isinstance(error, Full) for error in refused.values())
        assert done
        assert max(map(sessions.index, done)) < min(map(sessions.index, refused))
        for y in done.values():
            np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND)
        for session in list(refused)[:3]:
            assert session.position == 0
            np.testing.assert_allclose(await session.step(x), expected, rtol=0, atol=BOUND)


async def test_a_batch_that_does_not_fit_is_refused_alone(model: Model, device: str) -> None:
    """It gets RESOURCE_EXHAUSTED; a session that steps before and after it does not notice."""
    x = draw(2 * STEPS, INPUT)
    expected, _ = model.expected(x)
    async with serving(model, device, **SETTINGS) as (_, client), client.session(model.name) as session:
        y = [await session.step(x[:STEPS])]
        with pytest.raises(Full):
            await client.infer(model.name, draw(ROWS, STEPS, INPUT))
        y.append(await session.step(x[STEPS:]))
    np.testing.assert_allclose(np.concatenate(y), expected, rtol=0, atol=BOUND)


async def test_sessions_that_do_not_fit_are_refused_at_the_start(
    models: Models, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the device has memory for: the model is not loaded; bytes and setting are named."""
    # This machine gives as much address space as one likes.
    monkeypatch.setattr(HostDevice, "memory", lambda self: (1 << 30, 1 << 31))
    with pytest.raises(LoadError, match=r"bytes on the device.*--max-sessions"):
        async with serving(models.get("lstm"), device, max_sessions=1_000_000_000):
            pass
