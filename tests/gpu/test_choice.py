"""Which device runs a model, and why: nothing falls to the CPU unsaid, and TF32 is used where it was asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from service.engines.provider import why_no_cuda
from service.errors import LoadError
from service.settings import Settings
from service.versions.loading import in_brief, load_model
from service.versions.tuner import tuned
from tests.gpu.devices import CELLS, INPUT, Models, draw, serving


def without_a_form_for_cuda(models: Models, folder: Path) -> Path:
    """The peepholed LSTM as an operator alone, as it stands for the CPU; its file."""
    path = models.path("lstm-peephole")
    target = folder / "model" / "1" / path.name
    target.parent.mkdir(parents=True)
    shutil.copy(path, target)
    return target


@pytest.mark.gpu
@pytest.mark.parametrize("name", CELLS)
def test_every_cell_runs_on_cuda(models: Models, cuda: str, name: str) -> None:
    """CUDA takes whole what export wrote: by its own record no node of the recurrent path is elsewhere."""
    loaded = load_model(models.path(name), Settings(device="cuda"))
    assert (loaded.choice.device, loaded.provider) == ("cuda", "CUDAExecutionProvider")
    assert not loaded.choice.fallback


@pytest.mark.gpu
def test_a_peepholed_operator_is_refused(models: Models, cuda: str, tmp_path: Path) -> None:
    """There are no peepholes in cuDNN: the file is not loaded, and the node and its input are named."""
    with pytest.raises(LoadError, match=r"LSTM.*peepholes \(input P\)"):
        load_model(without_a_form_for_cuda(models, tmp_path), Settings(device="cuda"))


@pytest.mark.gpu
def test_a_fallback_has_to_be_allowed_and_is_said(models: Models, cuda: str, tmp_path: Path) -> None:
    """Allowed, the same file is run by the CPU, as a warning says and the choice keeps."""
    with capture_logs() as logs:
        path = without_a_form_for_cuda(models, tmp_path)
        loaded, _ = tuned(path, Settings(device="cuda", fallback="allow", tune_s=0))
    assert (loaded.choice.device, loaded.choice.fallback) == ("cpu", True)
    assert "peepholes" in loaded.choice.reason
    assert [entry for entry in logs if entry["log_level"] == "warning" and "peepholes" in str(entry.get("reason"))]


def test_auto_says_why(models: Models, device: str) -> None:
    """Left to choose, the server takes CUDA where there is one, and else says what is missing."""
    with capture_logs() as logs:
        loaded, _ = tuned(models.path("lstm"), Settings(device="auto", tune_s=0))
    (entry,) = [entry for entry in logs if entry["event"] == "device chosen"]
    assert (entry["asked"], entry["device"]) == ("auto", loaded.choice.device)
    assert entry["reason"] == in_brief(loaded.choice.reason, Settings(), "info")
    if device == "cpu" and (missing := why_no_cuda()):
        assert (loaded.choice.device, loaded.choice.reason) == ("cpu", missing)
    assert loaded.choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lstm", "gru-after", "gru-before"])
async def test_tf32_is_measured(
    models: Models, cuda: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    """With TF32 results are further off, and by how much is kept; off by default, they are as near as without it."""
    model = models.get(name)
    x = draw(64, INPUT)
    expected, _ = model.expected(x)
    error = {}
    for tf32 in ("off", "on"):
        async with serving(model, cuda, tf32=tf32) as (_, client), client.session(name) as session:
            error[tf32] = float(np.abs(await session.step(x) - expected).max())
    # Into the report, which --junit-xml writes.
    record_property("errors", error)
    assert error["off"] < 1e-5
    assert error["on"] < 1e-2
    assert load_model(models.path(name), Settings(device="cuda", tf32="on")).choice.tf32_difference is not None
