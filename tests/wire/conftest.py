"""What tests of a whole server share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.resident import MEMORIES, states_on_a_device


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the states of every model live: in arrays that go into each run, or on a device."""
    if request.param == "device":
        states_on_a_device(monkeypatch)
    return str(request.param)


@pytest.fixture
def collector_off() -> Iterator[None]:
    """The collector does not come by."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
