"""More than can be done: chunks that are needed within a quarter of a second, at multiples of the server's peak."""

from __future__ import annotations

from collections.abc import Mapping

from bench.measure import load_of, run_counted
from bench.models import LARGE, make
from bench.processes import Worker
from bench.servers import Say, Settings, start_conveyor

_STEPS = 16


def overload(settings: Settings, say: Say) -> list[dict[str, float]]:
    """Ask a server for one, two and four times its peak.

    Chunks have 16 steps and messages 16 chunks, each by itself, so that the model and not the transport is what there
    is too little of, and so that each chunk is refused by itself. Messages fall due at the rate whoever is free, and
    there are more sessions than the queue takes in.

    A machine that others use too is now faster and now slower, and what is compared should have had the same machine.
    So the peak is measured before four times the peak and after it, and counts as the mean of both. The rate is four
    times what was measured before; ``sent`` says how many times the mean that was.

    Returns:
        Of each round: ``peak_steps_per_s``, as many as are answered without a rate, and ``peak_after_over_before``.
        For each multiple, as ``4x.NAME``: ``sent`` and ``in_time`` over the peak, likewise ``slow``, whose answers came
        too late, ``dropped`` by the server for their time, and ``refused``; ``refusal_p99_ms``. ``client_busy`` and
        ``server_busy``, of a core, and what the server counts from the load's beginning to its end, of the peak too:
        ``rows_per_tick``, ``steps_per_row`` in a tick, ``tick_ms``. ``growth``: by how much the most memory that the
        server has held rose in this round, over what it was; the first round has none, for it is the first to fill the
        queue.
    """
    rounds: list[dict[str, float]] = []
    with start_conveyor(make(LARGE, settings.folder, say), settings) as server, Worker("bench.load") as client:

        def ask(what: str, sessions: int, rate: float = 0.0, timeout_ms: float = 0.0) -> dict[str, float]:
            say(f"{what}, round {len(rounds) + 1}")
            load = load_of(
                LARGE,
                server,
                "chunks",
                sessions=sessions,
                steps=_STEPS,
                chunks=16,
                streams=2,
                seconds=settings.seconds,
                rate=rate,
                timeout_ms=timeout_ms,
            )
            return run_counted(client, load, server)

        def offer(factor: int, peak: float) -> dict[str, float]:
            return ask(f"{factor} times the peak", sessions=1024, rate=factor * peak, timeout_ms=250.0)

        held = 0
        for _ in range(settings.runs):
            before = ask("the peak", sessions=256)
            four = offer(4, before["steps_per_s"])
            after = ask("the peak again", sessions=256)
            peak = (before["steps_per_s"] + after["steps_per_s"]) / 2
            figures = {
                "peak_steps_per_s": peak,
                "peak_after_over_before": after["steps_per_s"] / before["steps_per_s"],
                **_account("peak", {name: (before[name] + after[name]) / 2 for name in before}),
            }
            for factor, done in ((1, offer(1, peak)), (2, offer(2, peak)), (4, four)):
                figures |= _became(f"{factor}x", done, peak) | _account(f"{factor}x", done)
            most = server.peak_resident_bytes()
            if held:
                figures["growth"] = most / held - 1
            held = most
            rounds.append(figures)
    return rounds


def _became(name: str, done: Mapping[str, float], peak: float) -> dict[str, float]:
    """What became of the steps that fell due, over the peak."""
    figures = {
        f"{name}.sent": done["sent_per_s"] / peak,
        f"{name}.in_time": done["steps_per_s"] / peak,
        f"{name}.slow": done["slow_per_s"] / peak,
        f"{name}.dropped": done["dropped_per_s"] / peak,
        f"{name}.refused": done["refused_per_s"] * _STEPS / peak,
    }
    if "refusal_p99_ms" in done:
        figures[f"{name}.refusal_p99_ms"] = done["refusal_p99_ms"]
    return figures


def _account(name: str, done: Mapping[str, float]) -> dict[str, float]:
    """What it took, of the server by its own account."""
    return {
        f"{name}.{figure}": done[figure]
        for figure in ("client_busy", "server_busy", "rows_per_tick", "steps_per_row", "tick_ms")
    }
