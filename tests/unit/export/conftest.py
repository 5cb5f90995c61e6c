"""One exporter for all of the export tests, and models that are exported once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.exporter import prepared_exporter


@pytest.fixture(autouse=True, scope="session")
def _prepared_exporter() -> Iterator[None]:
    with prepared_exporter():
        yield
