"""What is offered to a server in overload, and what its answers are held against."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import overload
from bench.load import Load
from bench.servers import Settings


def test_the_peak_is_the_mean_of_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times what was measured before falls due, right between two peaks; all is held against the mean of both."""
    asked: list[Load] = []
    peaks = iter([100.0, 300.0, 100.0, 100.0])

    def run_counted(client: object, load: Load, server: object) -> dict[str, float]:
        asked.append(load)
        own = dict.fromkeys(("client_busy", "server_busy", "rows_per_tick", "steps_per_row", "tick_ms"), 1.0)
        if not load.rate:
            return own | {"steps_per_s": next(peaks)}
        rest = dict.fromkeys(("slow_per_s", "dropped_per_s", "refused_per_s", "refusal_p99_ms"), 8.0)
        return own | rest | {"sent_per_s": load.rate, "steps_per_s": 50.0}

    held = iter([1000, 1100])
    server = SimpleNamespace(port=1, pid=1, peak_resident_bytes=lambda: next(held))
    monkeypatch.setattr(overload, "run_counted", run_counted)
    monkeypatch.setattr(overload, "make", lambda *_: Path())
    monkeypatch.setattr(overload, "start_conveyor", lambda *_: nullcontext(server))
    first, second = overload.overload(Settings(Path(), runs=2), lambda text: None)
    assert [load.rate for load in asked] == [0, 400, 0, 200, 400, 0, 400, 0, 100, 200]
    assert (first["peak_steps_per_s"], first["peak_after_over_before"]) == (200, 3)
    assert (first["4x.sent"], first["4x.in_time"], first["4x.refused"]) == (2, 0.25, 8 * 16 / 200)
    assert (second["4x.sent"], second["4x.in_time"]) == (4, 0.5)
    assert "growth" not in first
    assert second["growth"] == pytest.approx(0.1)
