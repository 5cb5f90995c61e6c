"""What stands in a client's settings, and how long it waits before it tries again."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor import Client, InvalidRequest
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
    [
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"reconnect_timeout_s": -1},
        {"max_message_bytes": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    """When the client is made, not when it is used."""
    with pytest.raises(InvalidRequest, match=r"must be positive|expected more than 0 and up to"):
        Settings("127.0.0.1:1", **wrong)


@pytest.mark.parametrize(
    "target",
    [
        "localhost:8500", "127.0.0.1:8500", "[::1]:8500", "unix:/run/conveyor", "unix:///run/conveyor",
        "dns:///host:8500", "dns:host:8500", "ipv4:10.0.0.1:8500,10.0.0.2:8500", "ipv6:[::1]:8500",
    ],
)  # fmt: skip
def test_a_target_is_a_host_and_port_or_a_name_of_grpcs(target: str) -> None:
    """Each of these gRPC can resolve."""
    assert Settings(target).target == target


@pytest.mark.parametrize(
    "target",
    ["", "127.0.0.1", "localhost", "::1", "[::1]", "http://127.0.0.1:8500", "grpc://host:8500", "host:", "host:http"],
)
def test_a_target_without_a_port_or_with_a_scheme_is_refused(target: str) -> None:
    """At once, with the form that is expected; gRPC itself would try port 443, or fail later."""
    with pytest.raises(InvalidRequest, match="expected 'host:port'") as refused:
        Client(target)
    assert repr(target) in str(refused.value)
