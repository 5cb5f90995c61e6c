"""On which device a test runs: on CUDA where there is one; and on the CPU, always, by the code that CUDA uses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.engines.engine import digest
from service.engines.provider import why_no_cuda
from service.engines.resident_engine import ResidentEngine
from service.graphs.placement import Device
from tests.disorder import Disorder, runs_wait_in_queues
from tests.gpu.devices import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Models of every cell."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def cuda() -> str:
    """The device of a test that shows what CUDA alone can."""
    if reason := why_no_cuda():
        pytest.skip(f"CUDA does not start here: {reason}")
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CUDA; and the CPU as if it were CUDA: the file that CUDA takes, states that stay in pools, streams of ticks."""
    if request.param == "cuda":
        return str(request.getfixturevalue("cuda"))
    runs_wait_in_queues(monkeypatch)
    monkeypatch.setattr("service.versions.loading.Engine", _as_cuda_would)
    return "cpu"


@pytest.fixture
def capturing(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, where ticks of one step run with room for more rows whether that is quicker or not."""
    monkeypatch.setattr("service.graphs.capture._WORTH", float("inf"))
    if device == "cpu":
        monkeypatch.setattr("service.versions.loading.Engine", partial(_as_cuda_would, capture=True))
    return device


def _as_cuda_would(
    path: Path,
    device: Device,
    threads: int = 1,
    describe: Any = None,
    external: Sequence[Path] = (),
    file_digests: Sequence[str] = (),
    cuda: Any = None,
    capture: bool = False,
) -> ResidentEngine:
    own = path.with_name(f"{path.stem}.cuda{path.suffix}")
    # By whatever file it is run, it is one model.
    known = tuple(file_digests) or tuple(digest(part) for part in (path, *external))
    return ResidentEngine(own if own.is_file() else path, Disorder(), threads, describe, external, known, cuda, capture)
