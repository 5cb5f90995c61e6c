"""What is exported here passes the audit that every model goes through before it is served, and stays batched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.describe import Precision
from export.model_file import make_model_file
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec
from service.settings import Settings
from service.versions.loading import load_model
from tests.unit.models.drawn import draw_weights

MODELS: dict[str, tuple[Layer, Precision]] = {
    "lstm": (Layer("lstm", 12, 32), "float32"),
    "gru": (Layer("gru", 12, 32), "float32"),
    "rnn": (Layer("rnn", 3, 4), "float32"),
    "both ways": (Layer("lstm", 12, 32, bidirectional=True), "float32"),
    "float16": (Layer("lstm", 12, 32), "float16"),
    "int8": (Layer("lstm", 12, 32), "int8"),
}


@pytest.mark.parametrize(("layer", "precision"), MODELS.values(), ids=MODELS.keys())
def test_exports_pass(tmp_path: Path, layer: Layer, precision: Precision) -> None:
    """No reservation, many rows a run: also in int8, whose rows share a scale, within the loss that it recorded."""
    spec = ModelSpec((layer,), head_size=3)
    module = SequenceModel.from_weights(spec, draw_weights(spec.weight_shapes, dtype=np.float32))
    path = tmp_path / "model/1/model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(make_model_file(module, precision=precision).content)
    loaded = load_model(path, Settings(threads=1))
    assert loaded.warnings == ()
    assert loaded.graph.manifest.rows_per_run is None
