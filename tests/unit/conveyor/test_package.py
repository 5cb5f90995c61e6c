"""What the package says of itself."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest

import conveyor


def test_the_version_is_the_installed_ones() -> None:
    """As pip knows it."""
    assert conveyor.__version__ == importlib.metadata.version("conveyor")


def test_a_checkout_that_is_not_installed_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's image runs from one; there the version is not known."""

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", nothing)
        assert importlib.reload(conveyor).__version__ == "unknown"
    assert importlib.reload(conveyor).__version__ != "unknown"
