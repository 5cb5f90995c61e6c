"""How fast a graph runs on this machine's CPU: an estimate to weigh a precision's loss against, not a benchmark."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime

MEASURED_S = 0.5
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}


def steps_per_s(content: bytes, N: int) -> float:
    """Steps of sequences per second, with N rows advancing one step in each run.

    Args:
        content: an .onnx file that was exported here.
        N: rows in a run.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    sizes = {"N": N, "T": 1}
    feed = {
        tensor.name: np.zeros([sizes.get(size, size) for size in tensor.shape], DTYPES[tensor.type])
        for tensor in session.get_inputs()
    }
    feed["lengths"] += 1
    session.run(None, feed)
    runs, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MEASURED_S:
        session.run(None, feed)
        runs += 1
    return runs * N / elapsed
