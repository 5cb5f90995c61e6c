"""What is measured: which load on which model, and what stands beside it. Lists to read, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.models import LARGE, LARGE_GRU, LARGE_INT8, SMALL, SMALL_GRU, Model

Subject = Literal["conveyor", "inference", "loop", "triton", "bare", "echo", "compute"]
"""``conveyor`` by its native door and by the Open Inference Protocol's (``inference``); the peers ``loop`` and
``triton``; the ceilings ``bare``, a server without promises, ``echo``, transport alone, and ``compute``, the graph
alone at the rows per tick that Conveyor had."""
_CEILINGS: tuple[Subject, ...] = ("echo", "compute")
_WITH_BARE: tuple[Subject, ...] = ("bare", *_CEILINGS)
"""The ceilings of a case that a target rests on."""
_PEER: tuple[Subject, ...] = ("conveyor", "loop", *_CEILINGS)
_PEERS: tuple[Subject, ...] = ("conveyor", "loop", "triton", *_CEILINGS)
_ALL: tuple[Subject, ...] = ("conveyor", "inference", "loop", "triton", *_CEILINGS)


@dataclass(frozen=True, slots=True)
class Case:
    """A closed-loop load: each session has one chunk in flight.

    Attributes:
        model: which.
        sessions: how many live at a time.
        streams: connections that share them.
        steps: of a chunk.
        chunks: of a message.
        subjects: who is measured, one after the other, in turn.
        target: whether a target rests on it: then it is measured in every run, otherwise in the first alone.
    """

    model: Model
    sessions: int
    streams: int = 1
    steps: int = 1
    chunks: int = 1
    subjects: tuple[Subject, ...] = _PEER
    target: bool = False

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


@dataclass(frozen=True, slots=True)
class Curve:
    """An open-loop load: messages fall due at a rate, which rises until a subject no longer keeps up.

    Attributes:
        model: which.
        sessions: how many live at a time.
        streams: connections that share them.
        chunks: of one step, of a message.
        subjects: who is measured, one after the other, at each rate.
        rates: steps per second of all sessions together.
    """

    model: Model
    sessions: int
    streams: int
    chunks: int
    subjects: tuple[Subject, ...]
    rates: tuple[int, ...]

    @property
    def title(self) -> str:
        """For people."""
        chunks = f"{self.chunks} chunk{'s' if self.chunks > 1 else ''} a message"
        return f"{self.model.title}, {self.sessions} sessions, {self.streams} streams, {chunks}, at a rate"


GROUPS: tuple[tuple[Case, ...], ...] = (
    (
        Case(SMALL, 64, streams=4, subjects=("conveyor", "inference", "loop", "triton", *_WITH_BARE), target=True),
        Case(SMALL, 64, chunks=64, subjects=("conveyor", "loop", *_WITH_BARE), target=True),
        Case(SMALL, 1, subjects=_ALL),
        Case(SMALL, 16, streams=4, subjects=_PEERS),
        Case(SMALL, 256, streams=4),
        Case(SMALL, 1024, streams=4),
        Case(SMALL, 256, chunks=64),
        Case(SMALL, 1024, chunks=64),
        Case(SMALL, 64, streams=4, steps=16),
        Case(SMALL, 64, steps=16, chunks=64),
    ),
    (
        Case(LARGE, 64, chunks=64, subjects=("conveyor", "loop", *_WITH_BARE), target=True),
        Case(LARGE_INT8, 64, chunks=64, subjects=("conveyor", "bare", "compute"), target=True),
        Case(LARGE, 256, chunks=64, subjects=("conveyor", "loop", *_WITH_BARE), target=True),
        Case(LARGE_INT8, 256, chunks=64, subjects=("conveyor", "compute"), target=True),
        Case(LARGE, 1),
        Case(LARGE, 64, streams=4, subjects=_PEERS),
        Case(LARGE, 1024, chunks=64),
        # The loop would take half a second for one message of these.
        Case(LARGE, 64, steps=16, chunks=64, subjects=("conveyor", *_CEILINGS)),
    ),
    (
        Case(SMALL_GRU, 1),
        Case(SMALL_GRU, 64, streams=4),
        Case(SMALL_GRU, 64, chunks=64),
    ),
    (
        Case(LARGE_GRU, 64, streams=4),
        Case(LARGE_GRU, 64, chunks=64),
        Case(LARGE_GRU, 256, chunks=64),
    ),
)
"""Cases whose servers stand side by side: within a group every case has its first run before any has its second."""

_SINGLE_RATES = (500, 1000, 2000, 3000, 4000, 6000, 8000, 12_000)
CURVES = (
    Curve(SMALL, 64, 4, 1, ("conveyor", "loop", "triton"), _SINGLE_RATES),
    # Triton dies with so many sequences.
    Curve(SMALL, 256, 4, 1, ("conveyor", "loop"), _SINGLE_RATES),
    Curve(SMALL, 256, 4, 64, ("conveyor", "loop"), (5000, 10_000, 20_000, 40_000, 60_000, 80_000, 120_000)),
)
