"""A ceiling: the graph alone, in a process of its own, at the rows per tick that the server had. Prints JSON.

It runs over and over, and then as often as the server's ticks did: after a pause the same run costs more, since the
processor's caches hold others' data and its clock has gone down.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime

from service.manifest import METADATA_KEY, Manifest


def measure(path: Path, rows: int, steps: int, seconds: float, threads: int, period_s: float = 0.0) -> dict[str, float]:
    """Run the graph over and over, and then once a period.

    Args:
        path: the model file.
        rows: N of each run.
        steps: T of each run.
        seconds: how long, after a tenth of it to warm up.
        threads: inside one run.
        period_s: from one run to the next, where it is paced; 0 to leave that out.

    Returns:
        ``steps_per_s`` and ``cpu_us_per_step``; ``paced_cpu_us_per_step``, of the paced runs alone.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    manifest = Manifest.model_validate_json(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    random = np.random.default_rng(0)
    (x,) = manifest.inputs
    sizes = [{x.time_axis: steps, x.batch_axis: rows}.get(axis, size) for axis, size in enumerate(x.shape)]
    feeds = {x.name: random.standard_normal([size or 1 for size in sizes]).astype(x.dtype)}
    for state in manifest.states:
        feeds[state.input] = np.zeros([rows if size is None else size for size in state.shape], state.dtype)
    if manifest.lengths is not None:
        feeds[manifest.lengths] = np.full(rows, steps, np.int32)
    names = [*(y.name for y in manifest.outputs), *(state.output for state in manifest.states)]
    until = time.perf_counter() + seconds / 10
    while time.perf_counter() < until:
        session.run(names, feeds)
    count, began, used = 0, time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < began + seconds:
        session.run(names, feeds)
        count += rows * steps
    figures = {
        "steps_per_s": count / (now - began),
        "cpu_us_per_step": (time.process_time() - used) / count * 1e6,
    }
    if period_s:
        count, spent, due = 0, 0.0, time.perf_counter()
        until = due + seconds
        while due < until:
            used = time.process_time()
            session.run(names, feeds)
            spent += time.process_time() - used
            count += rows * steps
            due = max(due + period_s, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
        figures["paced_cpu_us_per_step"] = spent / count * 1e6
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--period-s", type=float, default=0.0)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.rows, given.steps, given.seconds, given.threads, given.period_s)))
