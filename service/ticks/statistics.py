"""What one model version has done since it was loaded: requests, runs of the graph, and where the time went.

Plain counters. Written from the event loop and from the model's thread, read from anywhere. Must not know anything else
of the server.

A request is what a caller sent for a model that was found: a chunk, a batch, or a request for sequences, of any number
of rows. The door counts it once, when it is answered, with a kept reply too, or refused, or given up by its caller. A
row is a chunk, a step, or one sequence of a batch. The times of a run are counted for each of its rows in full, since
each of them waits for the whole run: the time divided by the count is what a row has seen.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class Spent:
    """How often something was done, and how long it took together, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count something that took so long, so many times."""
        self.count += count
        self.ns += round(seconds * 1e9) * count


@dataclass(slots=True)
class Runs:
    """The runs of one size: how many there were, and what their parts took, each run counted once."""

    compute_input: Spent = field(default_factory=Spent)
    compute_infer: Spent = field(default_factory=Spent)
    compute_output: Spent = field(default_factory=Spent)


@dataclass(slots=True)
class Counts:
    """Everything that is counted.

    Attributes:
        inference_count: rows that were applied.
        execution_count: runs of the graph that succeeded.
        last_inference_ms: when the last of them ended, in milliseconds since 1970; 0 for never.
        success: requests that were answered with a result, from arrival to end.
        fail: requests that were refused, failed, or given up by their callers.
        queue: rows that ran, and how long they waited for their run.
        compute_input: rows that ran, and the gathering and packing of their runs.
        compute_infer: the same of the runs themselves.
        compute_output: the same of unpacking, sealing and scattering.
        runs: the runs by their number of rows.
    """

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Spent = field(default_factory=Spent)
    fail: Spent = field(default_factory=Spent)
    queue: Spent = field(default_factory=Spent)
    compute_input: Spent = field(default_factory=Spent)
    compute_infer: Spent = field(default_factory=Spent)
    compute_output: Spent = field(default_factory=Spent)
    runs: dict[int, Runs] = field(default_factory=dict)


class Statistics:
    """The counters of one model version."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._lock = threading.Lock()

    def request(self, succeeded: bool, seconds: float, count: int = 1) -> None:
        """Count requests that have ended, and how long after their arrival."""
        with self._lock:
            (self._counts.success if succeeded else self._counts.fail).add(seconds, count)

    def run(
        self,
        rows: int,
        applied: int,
        waited_s: float,
        input_s: float,
        infer_s: float,
        output_s: float,
        now_s: float,
    ) -> None:
        """Count a run of the graph.

        Args:
            rows: that took part.
            applied: how many of them count.
            waited_s: seconds that the rows waited before, all together.
            input_s: seconds of gathering and packing.
            infer_s: seconds of the run itself.
            output_s: seconds of unpacking, sealing and scattering.
            now_s: seconds since 1970.
        """
        with self._lock:
            counts = self._counts
            counts.inference_count += applied
            counts.execution_count += 1
            counts.last_inference_ms = round(now_s * 1e3)
            counts.queue.count += rows
            counts.queue.ns += round(waited_s * 1e9)
            runs = counts.runs.setdefault(rows, Runs())
            for seconds, each_row, each_run in (
                (input_s, counts.compute_input, runs.compute_input),
                (infer_s, counts.compute_infer, runs.compute_infer),
                (output_s, counts.compute_output, runs.compute_output),
            ):
                each_row.add(seconds, rows)
                each_run.add(seconds)

    def snapshot(self) -> Counts:
        """Copy everything as it stands at one moment."""
        with self._lock:
            counts = self._counts
            return replace(
                counts,
                success=replace(counts.success),
                fail=replace(counts.fail),
                queue=replace(counts.queue),
                compute_input=replace(counts.compute_input),
                compute_infer=replace(counts.compute_infer),
                compute_output=replace(counts.compute_output),
                runs={
                    rows: Runs(replace(runs.compute_input), replace(runs.compute_infer), replace(runs.compute_output))
                    for rows, runs in sorted(counts.runs.items())
                },
            )
