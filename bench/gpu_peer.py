"""torch, on the same device: its LSTM and GRU, which are cuDNN's there, and what the device does at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_cases import Case, Device
from bench.gpu_floor import Rates
from bench.gpu_timing import Ticks


def prepare(threads: int) -> None:
    """Float32 as it is: no TF32 anywhere. On a CPU, so many threads."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def describe(device: Device) -> dict[str, str]:
    """The device and the libraries, by name."""
    found = {"torch": str(torch.__version__)}
    if device == "cuda":
        one = torch.cuda.get_device_properties(0)
        found |= {
            "device": f"{one.name}, {one.total_memory / 2**30:.0f} GiB",
            "CUDA of torch": str(torch.version.cuda),
            "cuDNN of torch": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    return found


def synchronize(device: Device) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def rates(device: Device, quick: bool) -> Rates:
    """Measure what the device does at most: large copies, and a large product.

    Args:
        device: ``cuda`` or ``cpu``; of the CPU, the copies to and from the device are copies in memory.
        quick: smaller ones.
    """
    size, side = (1 << 24, 1024) if quick else (1 << 30, 8192)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    host = torch.ones(size // 4, pin_memory=device == "cuda")
    a, b = torch.rand((side, side), device=device), torch.rand((side, side), device=device)
    product = torch.empty_like(a)
    return Rates(
        memory_bytes_per_s=2 * size / _best_s(lambda: target.copy_(source), device),
        operations_per_s=2 * side**3 / _best_s(lambda: torch.mm(a, b, out=product), device),
        up_bytes_per_s=size / _best_s(lambda: target.copy_(host, non_blocking=True), device),
        down_bytes_per_s=size / _best_s(lambda: host.copy_(source, non_blocking=True), device),
    )


def _best_s(run: Callable[[], object], device: Device) -> float:
    """The quickest of some runs: a floor has to rest on the best that was seen."""
    took = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took)


def peer_ticks(case: Case, device: Device, copies: bool) -> Ticks:
    """torch.nn.LSTM or GRU over and over, its states staying where they are.

    Args:
        case: the shape.
        device: ``cuda`` or ``cpu``.
        copies: whether x comes from pinned host memory in each tick, and y goes there.
    """
    kind: Any = torch.nn.LSTM if case.stack.cell == "lstm" else torch.nn.GRU
    module = kind(case.stack.input_size, case.stack.hidden_size, case.stack.layers).to(device).eval()
    pinned = device == "cuda"
    x_host = torch.randn((case.steps, case.rows, case.stack.input_size), pin_memory=pinned)
    y_host = torch.empty((case.steps, case.rows, case.stack.hidden_size), pin_memory=pinned)
    x = x_host.to(device)
    shape = (case.stack.layers, case.rows, case.stack.hidden_size)
    h = torch.zeros(shape, device=device)
    state: Any = (h, h.clone()) if case.stack.states > 1 else h

    def launch() -> None:
        nonlocal state
        if copies:
            x.copy_(x_host, non_blocking=True)
        y, state = module(x, state)
        if copies:
            y_host.copy_(y, non_blocking=True)

    return Ticks(launch, lambda: synchronize(device))
