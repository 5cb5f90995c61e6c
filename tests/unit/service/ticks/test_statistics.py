"""The counters of one model version, alone."""

from __future__ import annotations

import threading

from service.ticks.statistics import Runs, Spent, Statistics


def test_a_new_model_has_done_nothing() -> None:
    """Every count is 0, and there was no last time."""
    counts = Statistics().snapshot()
    assert (counts.inference_count, counts.execution_count, counts.last_inference_ms, counts.runs) == (0, 0, 0, {})
    assert counts.success == counts.fail == counts.queue == counts.compute_infer == Spent()


def test_requests_are_counted_by_how_they_ended() -> None:
    """Each once, with the time from its acceptance to its end."""
    statistics = Statistics()
    for succeeded, seconds in ((True, 0.5), (True, 0.25), (False, 2.0)):
        statistics.request(succeeded, seconds)
    counts = statistics.snapshot()
    assert (counts.success, counts.fail) == (Spent(2, 750_000_000), Spent(1, 2_000_000_000))


def test_a_run_counts_for_each_of_its_rows_and_once() -> None:
    """Rows see the whole run; by size, runs are counted as they were; rows that were not applied ran all the same."""
    statistics = Statistics()
    statistics.run(rows=4, applied=3, waited_s=2.0, input_s=0.001, infer_s=0.002, output_s=0.003, now_s=12.5)
    statistics.run(rows=4, applied=4, waited_s=0.0, input_s=0.001, infer_s=0.002, output_s=0.003, now_s=13.5)
    counts = statistics.snapshot()
    assert (counts.inference_count, counts.execution_count, counts.last_inference_ms) == (7, 2, 13_500)
    assert counts.queue == Spent(8, 2_000_000_000)
    assert (counts.compute_input, counts.compute_infer, counts.compute_output) == (
        Spent(8, 8_000_000),
        Spent(8, 16_000_000),
        Spent(8, 24_000_000),
    )
    assert counts.runs == {4: Runs(Spent(2, 2_000_000), Spent(2, 4_000_000), Spent(2, 6_000_000))}


def test_a_snapshot_stands_still() -> None:
    """What is counted later does not change it."""
    statistics = Statistics()
    statistics.run(1, 1, 0.0, 0.0, 0.0, 0.0, 1.0)
    before = statistics.snapshot()
    statistics.run(1, 1, 0.0, 1.0, 1.0, 1.0, 2.0)
    statistics.request(True, 1.0)
    assert (before.execution_count, before.success, before.runs[1]) == (1, Spent(), Runs(Spent(1), Spent(1), Spent(1)))


def test_counting_from_two_threads_loses_nothing() -> None:
    """The event loop and the model's thread count side by side."""
    statistics = Statistics()

    def count() -> None:
        for _ in range(2000):
            statistics.request(True, 1e-9)
            statistics.run(2, 1, 0.0, 1e-9, 0.0, 0.0, 1.0)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = statistics.snapshot()
    assert counts.success == Spent(6000, 6000)
    assert (counts.inference_count, counts.compute_input, counts.runs[2].compute_input) == (
        6000,
        Spent(12_000, 12_000),
        Spent(6000, 6000),
    )
