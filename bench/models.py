"""The models that are measured: made once, through the export that users run, and kept in the benchmark's folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime

from service.manifest import METADATA_KEY, Manifest


@dataclass(frozen=True, slots=True)
class Model:
    """A recurrent stack with random weights.

    Attributes:
        name: in the repository.
        cell: ``lstm`` or ``gru``.
        input_size: I.
        hidden_size: H, of each layer.
        layers: L.
        precision: of the weights in the file.
    """

    name: str
    cell: Literal["lstm", "gru"]
    input_size: int
    hidden_size: int
    layers: int = 1
    precision: Literal["float32", "int8"] = "float32"

    @property
    def title(self) -> str:
        """For people."""
        depth = f" x {self.layers}" if self.layers > 1 else ""
        precision = "" if self.precision == "float32" else f" {self.precision}"
        return f"{self.cell.upper()} {self.input_size}->{self.hidden_size}{depth}{precision}"


SMALL = Model("lstm-64-256", "lstm", 64, 256)
LARGE = Model("lstm-128-512-2", "lstm", 128, 512, 2)
LARGE_INT8 = Model("lstm-128-512-2-int8", "lstm", 128, 512, 2, "int8")
SMALL_GRU = Model("gru-64-256", "gru", 64, 256)
LARGE_GRU = Model("gru-128-512-2", "gru", 128, 512, 2)
MODELS = (SMALL, LARGE, LARGE_INT8, SMALL_GRU, LARGE_GRU)


def model_file(model: Model, folder: Path) -> Path:
    """Where the model's file is, or will be."""
    return folder / "repositories" / model.name / model.name / "1" / "model.onnx"


def read_manifest(path: Path) -> Manifest:
    """What a model's file says of itself."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Manifest.model_validate_json(session.get_modelmeta().custom_metadata_map[METADATA_KEY])


def parity_loss(path: Path) -> dict[str, float]:
    """The largest errors of ``outputs`` and of final ``states`` that export measured on the graph, against float64."""
    parity = read_manifest(path).parity
    assert parity is not None
    # The others compare the module in torch, before there was a graph, and the graph with itself.
    against = [row for row in parity.rows if row.case not in ("the module itself", "whole against chunked")]
    return {"outputs": max(row.outputs for row in against), "states": max(row.states for row in against)}


def expected_s(model: Model, folder: Path) -> float:
    """About how long ``make`` takes, to tell how much is left."""
    return 0.0 if model_file(model, folder).is_file() else 15.0


def make(model: Model, folder: Path, say: Callable[[str], None]) -> Path:
    """Export a model, unless it is there.

    Args:
        model: which.
        folder: of the benchmark.
        say: told what is done.

    Returns:
        A repository that holds this model alone.
    """
    repository = folder / "repositories" / model.name
    if model_file(model, folder).is_file():
        return repository
    say(f"exporting {model.title}")
    import torch  # seconds, and only where a model is missing

    from export import export_model
    from models.fused import SequenceModel
    from models.spec import Layer, ModelSpec

    torch.manual_seed(0)
    sizes = [model.input_size, *[model.hidden_size] * model.layers]
    layers = tuple(
        Layer(model.cell, input_size, hidden_size, reset="after" if model.cell == "gru" else "before")
        for input_size, hidden_size in itertools.pairwise(sizes)
    )
    export_model(SequenceModel(ModelSpec(layers)), repository, model.name, version=1, precision=model.precision)
    return repository
