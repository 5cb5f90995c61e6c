"""From a model's file to a graph that is ready to run.

Owns the order in which a file is read, checked and started, and what is said of it. Must not know runners or sessions.
Called in a thread of its own: all of it may take long.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.engine import Engine
from service.graph import Graph
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Loaded:
    """A graph that is ready to run.

    Attributes:
        graph: to be run.
        provider: the onnxruntime execution provider that runs it.
        warnings: what its operator should know, a sentence each.
    """

    graph: Graph
    provider: str
    warnings: tuple[str, ...] = ()


def load_model(path: Path, settings: Settings) -> Loaded:
    """Load a model file.

    Args:
        path: DIR/NAME/VERSION/model.onnx.
        settings: of the server.

    Raises:
        LoadError: if it cannot be served; the text says why.
    """
    engine = Engine(path, settings.device, settings.threads)
    return Loaded(engine, engine.provider)
