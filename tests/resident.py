"""Models whose states stay on a device, with this machine's memory as the device: the whole way that CUDA goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.engines.resident_engine import ResidentEngine
from service.graphs.placement import Device
from service.states.device import HostDevice


def _on_a_device(path: Path, device: Device, *more: Any) -> ResidentEngine:
    return ResidentEngine(path, HostDevice(), *more)


def states_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model that is loaded from here on keep its states on a device."""
    monkeypatch.setattr("service.versions.loading.Engine", _on_a_device)


MEMORIES: Sequence[str] = ("host", "device")
