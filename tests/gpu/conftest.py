"""On which device a test runs: on CUDA where there is one; and on the CPU, always, by the code that CUDA uses."""

from __future__ import annotations

import pytest

from service.provider import why_no_cuda
from tests.gpu.devices import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Models of every cell."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def cuda() -> str:
    """The device of a test that shows what CUDA alone can."""
    if reason := why_no_cuda():
        pytest.skip(f"no CUDA device: {reason}")
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """CUDA, and the CPU with its states in the same kind of pool."""
    return str(request.getfixturevalue("cuda")) if request.param == "cuda" else "cpu"
