"""Models whose states stay on a device, with this machine's memory as the device: the whole way that CUDA goes.

What the device is asked for it does later, in any order that its streams leave open.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.engines.resident_engine import ResidentEngine
from service.graphs.placement import Device
from tests.disorder import Disorder, runs_wait_in_queues


def _on_a_device(path: Path, device: Device, *more: Any) -> ResidentEngine:
    return ResidentEngine(path, Disorder(), *more)


def states_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model that is loaded from here on keep its states on a device."""
    runs_wait_in_queues(monkeypatch)
    monkeypatch.setattr("service.versions.loading.Engine", _on_a_device)


MEMORIES: Sequence[str] = ("host", "device")
