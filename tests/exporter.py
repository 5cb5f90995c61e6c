"""A faster exporter for tests that export many models.

Users run the exporter as it is. So do the tests of the README's example and of the demo, in processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import pytest


@contextmanager
def prepared_exporter() -> Iterator[None]:
    """Read torch's table of translations once, not for every export: it is more than half of an export's time."""
    registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(cache(registry.from_torchlib)))
        yield
