"""What is measured on a device: which stacks, with how many rows and steps a tick. Lists to read, and their files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cuda", "cpu"]
INPUT = 128
"""I of every stack."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A recurrent stack with random weights.

    Attributes:
        cell: ``gru`` resets after the recurrent product, as cuDNN does; ``gru_before`` before it, as the paper does.
        hidden_size: H, of each layer.
        layers: L.
    """

    cell: Literal["lstm", "gru", "lstm_peephole", "gru_before"]
    hidden_size: int
    layers: int = 1

    @property
    def name(self) -> str:
        """In the repository."""
        return f"{self.cell}-{INPUT}-{self.hidden_size}-{self.layers}".replace("_", "-")

    @property
    def title(self) -> str:
        """For people."""
        cell = {"lstm_peephole": "LSTM with peepholes", "gru_before": "GRU, reset before"}.get(
            self.cell, self.cell.upper()
        )
        return f"{cell} {INPUT}->{self.hidden_size}" + (f" x {self.layers}" if self.layers > 1 else "")

    @property
    def input_size(self) -> int:
        """I, of the first layer."""
        return INPUT

    @property
    def gates(self) -> int:
        """Products with a matrix of [H, I] and one of [H, H], in a step of a layer."""
        return 3 if self.cell.startswith("gru") else 4

    @property
    def states(self) -> int:
        """Arrays of [N, H], of a layer."""
        return 1 if self.cell.startswith("gru") else 2


@dataclass(frozen=True, slots=True)
class Case:
    """A tick of one shape.

    Attributes:
        stack: which.
        rows: N.
        steps: T.
    """

    stack: Stack
    rows: int
    steps: int

    @property
    def title(self) -> str:
        """For people."""
        rows = f"{self.rows:,} row{'s' if self.rows > 1 else ''}"
        return f"{self.stack.title}, {rows}, {self.steps} step{'s' if self.steps > 1 else ''} a tick"


ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
STEPS = (1, 16)
HIDDEN = (256, 512, 1024)
LOWERED_ROWS = 256
"""Rows at which the cells that cuDNN lacks are compared: CUDA's lowering with the CPU's."""

TICKS = tuple(
    Case(Stack(cell, hidden_size, layers), rows, steps)
    for cell in ("lstm", "gru")
    for hidden_size in HIDDEN
    for layers in (1, 2)
    for steps in STEPS
    for rows in ROWS
)
"""Cells that cuDNN has, beside torch's."""
LOWERED = tuple(
    Case(Stack(cell, hidden_size), LOWERED_ROWS, steps)
    for cell in ("lstm_peephole", "gru_before")
    for hidden_size in HIDDEN
    for steps in STEPS
)
"""Cells that cuDNN lacks."""
SERVED = tuple(Case(Stack("lstm", hidden_size, 2), 1024, steps) for hidden_size in (512, 1024) for steps in STEPS)
"""Through the whole service: the rows are sessions, the steps those of a chunk."""

QUICK_TICKS = tuple(
    Case(Stack(cell, 256), rows, steps) for cell in ("lstm", "gru") for steps in STEPS for rows in (1, 64)
)
QUICK_LOWERED = tuple(case for case in LOWERED if case.stack.hidden_size == 256)
QUICK_SERVED = (Case(Stack("lstm", 256), 128, 1),)


def repository_of(stack: Stack, folder: Path) -> Path:
    """The repository that holds this stack alone, or will."""
    return folder / "repositories" / stack.name


def model_file(stack: Stack, folder: Path) -> Path:
    """Where the stack's file is, or will be."""
    return repository_of(stack, folder) / stack.name / "1" / "model.onnx"


def make(stack: Stack, folder: Path, say: Callable[[str], None]) -> Path:
    """Export a stack for both devices, unless it is there; return its file."""
    path = model_file(stack, folder)
    if path.is_file():
        return path
    say(f"exporting {stack.title}")
    import torch  # seconds, and only where a model is missing

    from export import export_model
    from models.fused import SequenceModel
    from models.spec import Cell, Layer, ModelSpec

    torch.manual_seed(0)
    sizes = [INPUT, *[stack.hidden_size] * stack.layers]
    cell: Cell = "gru" if stack.cell == "gru_before" else stack.cell
    layers = [
        Layer(cell, below, above, reset="after" if stack.cell == "gru" else "before")
        for below, above in itertools.pairwise(sizes)
    ]
    return export_model(SequenceModel(ModelSpec(tuple(layers))), repository_of(stack, folder), stack.name, version=1)
