"""What stands in a client's settings, and how long it waits before it tries again."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor import InvalidRequest
from conveyor.connection import Backoff, Settings


def test_pauses_grow_up_to_a_limit_and_differ() -> None:
    """Each lies in the upper half of a bound that doubles; after any number of attempts it stays finite."""
    backoff = Backoff(initial_s=0.1, factor=2, limit_s=1)
    for attempt, bound in [(0, 0.1), (1, 0.2), (2, 0.4), (3, 0.8), (4, 1.0), (10_000, 1.0)]:
        pauses = [backoff.delay_s(attempt) for _ in range(50)]
        assert all(bound / 2 <= pause <= bound for pause in pauses)
        assert len(set(pauses)) > 1


@pytest.mark.parametrize(
    "wrong",
    [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"reconnect_timeout_s": -1}, {"max_message_bytes": 0}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    """When the client is made, not when it is used."""
    with pytest.raises(InvalidRequest, match="must be positive"):
        Settings("127.0.0.1:1", **wrong)
