"""Models whose states stay on a device, with this machine's memory as the device: the whole way that CUDA goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.device import HostDevice
from service.placement import Device
from service.resident_engine import ResidentEngine


def _on_a_device(path: Path, device: Device, *more: Any) -> ResidentEngine:
    return ResidentEngine(path, HostDevice(), *more)


def states_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model that is loaded from here on keep its states on a device."""
    monkeypatch.setattr("service.loading.Engine", _on_a_device)


MEMORIES: Sequence[str] = ("host", "device")
