"""What is measured: which load on which model, and what stands beside it. A list to read, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.models import LARGE, LARGE_GRU, LARGE_INT8, SMALL, SMALL_GRU, Model

Subject = Literal["conveyor", "inference", "loop", "triton", "echo", "compute"]
"""``conveyor`` by its native door and by the Open Inference Protocol's (``inference``); the peers ``loop`` and
``triton``; the ceilings ``echo``, transport alone, and ``compute``, the graph alone at the rows per tick that Conveyor
had."""


@dataclass(frozen=True, slots=True)
class Case:
    """A closed-loop load: each session has one chunk in flight.

    Attributes:
        model: which.
        sessions: how many live at a time.
        streams: connections that share them.
        steps: of a chunk.
        chunks: of a message; the others of it follow at once.
        subjects: who is measured, one after the other, in turn.
    """

    model: Model
    sessions: int
    streams: int = 1
    steps: int = 1
    chunks: int = 1
    subjects: tuple[Subject, ...] = ("conveyor", "compute")

    @property
    def title(self) -> str:
        """For people."""
        parts = [self.model.title, f"{self.sessions} session{'s' if self.sessions > 1 else ''}"]
        if self.streams > 1:
            parts.append(f"{self.streams} streams")
        if self.steps > 1:
            parts.append(f"{self.steps} steps a chunk")
        parts.append(f"{self.chunks} chunk{'s' if self.chunks > 1 else ''} a message")
        return ", ".join(parts)


CASES = (
    # Small messages: what the transport costs.
    Case(SMALL, 1, subjects=("conveyor", "inference", "loop", "triton", "echo", "compute")),
    Case(SMALL, 16, streams=4),
    Case(SMALL, 64, streams=4, subjects=("conveyor", "inference", "loop", "triton", "echo", "compute")),
    Case(SMALL, 256, streams=4),
    Case(SMALL, 1024, streams=4),
    # Many chunks a message: what a step costs.
    Case(SMALL, 64, chunks=64, subjects=("conveyor", "loop", "echo", "compute")),
    Case(SMALL, 256, chunks=64),
    Case(SMALL, 1024, chunks=64),
    Case(SMALL, 64, steps=16, chunks=64, subjects=("conveyor", "loop", "echo", "compute")),
    Case(LARGE, 1, subjects=("conveyor", "loop", "compute")),
    Case(LARGE, 64, chunks=64, subjects=("conveyor", "loop", "compute")),
    Case(LARGE, 256, chunks=64, subjects=("conveyor", "loop", "compute")),
    Case(LARGE, 64, steps=16, chunks=64),
    Case(LARGE_INT8, 64, chunks=64),
    Case(LARGE_INT8, 256, chunks=64),
    Case(SMALL_GRU, 64, chunks=64),
    Case(LARGE_GRU, 64, chunks=64),
)
