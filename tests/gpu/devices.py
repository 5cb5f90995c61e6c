"""Models of every cell, exported for both devices, and servers that run them on one device or the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conveyor import AsyncClient
from export import export_model
from models.fused import SequenceModel
from models.reference import run_model
from models.spec import Layer, ModelSpec
from service.server import Server
from tests.conftest import running
from tests.exporter import prepared_exporter
from tests.unit.models.drawn import draw_weights

Array = NDArray[Any]

INPUT, HIDDEN, OUTPUT = 12, 16, 3
CELLS: dict[str, tuple[Layer, ...]] = {
    "rnn": (Layer("rnn", INPUT, HIDDEN),),
    "rnn-relu": (Layer("rnn", INPUT, HIDDEN, activation="relu"),),
    "lstm": (Layer("lstm", INPUT, HIDDEN), Layer("lstm", HIDDEN, HIDDEN)),
    "lstm-peephole": (Layer("lstm_peephole", INPUT, HIDDEN),),
    "lstm-coupled": (Layer("lstm_coupled", INPUT, HIDDEN),),
    "lstm-coupled-peepholes": (Layer("lstm_coupled", INPUT, HIDDEN, peepholes=True),),
    "gru-before": (Layer("gru", INPUT, HIDDEN),),
    "gru-after": (Layer("gru", INPUT, HIDDEN, reset="after"), Layer("gru", HIDDEN, HIDDEN, reset="after")),
    "lstm-then-gru": (Layer("lstm", INPUT, HIDDEN), Layer("gru", HIDDEN, HIDDEN)),
}
"""Every cell; some in stacks, one of which mixes what cuDNN has with what it lacks."""
BATCHED = {"lstm-both-ways": (Layer("lstm", INPUT, HIDDEN, bidirectional=True),)}
"""What reads backward too, and so whole sequences alone."""
WIDE = {"lstm-wide": (Layer("lstm", INPUT, 512),)}
"""One that takes memory, so that a limit is soon reached."""


@dataclass(frozen=True)
class Model:
    """An exported model, and what it should give.

    Attributes:
        name: in its repository.
        repository: which holds it alone.
        spec: its shape.
        weights: in float64.
    """

    name: str
    repository: Path
    spec: ModelSpec
    weights: dict[str, Array]

    def expected(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """The outputs [T, O] for one sequence [T, I], and the final states by name, in float64."""
        y, states = run_model(self.spec, self.weights, x[None].astype(np.float64))
        if len({layer.cell for layer in self.spec.layers}) == 1:
            kinds = zip("hc", zip(*states, strict=True), strict=False)
            return np.asarray(y[0]), {kind: np.stack([array[0] for array in arrays]) for kind, arrays in kinds}
        # Of mixed layers each state stands by itself.
        return np.asarray(y[0]), {
            f"{kind}_{number}": array[0]
            for number, state in enumerate(states, 1)
            for kind, array in zip("hc", state, strict=False)
        }


class Models:
    """The models, each exported when it is first asked for.

    Args:
        folder: for their repositories.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.get = cache(self._export)

    def path(self, name: str) -> Path:
        """The file of a model."""
        return self.get(name).repository / name / "1" / "model.onnx"

    def _export(self, name: str, precision: str = "float32", lowering: str = "auto") -> Model:
        spec = ModelSpec((CELLS | BATCHED | WIDE)[name], head_size=OUTPUT)
        # Small enough that no state enlarges its own rounding errors.
        scale = 2 / np.sqrt(spec.layers[0].hidden_size)
        drawn = draw_weights(spec.weight_shapes)
        weights = {key: (scale * array).astype(np.float32) for key, array in drawn.items()}
        repository = self._folder / f"{name}-{precision}-{lowering}"
        with prepared_exporter():
            module = SequenceModel.from_weights(spec, weights)
            export_model(module, repository, name, lowering=lowering, precision=precision)  # type: ignore[arg-type]
        return Model(name, repository, spec, {key: array.astype(np.float64) for key, array in weights.items()})


@asynccontextmanager
async def serving(model: Model, device: str, **settings: Any) -> AsyncIterator[tuple[Server, AsyncClient]]:
    """Run a server with a model on a device, and a client of it."""
    async with (
        running(model.repository, device=device, **settings) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        yield server, client


def draw(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
