"""Other precisions of the small models, made as export makes them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from export.quantize import quantize
from service.manifest import METADATA_KEY, Manifest, Parity, ParityRow

LOSS = 0.0047
"""The largest error that the manifest of an int8 file records here."""


def write_int8(path: Path) -> Path:
    """Write the int8 form of a model file beside it; return that file."""
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    row = ParityRow(case="random", batch=3, steps=5, outputs=LOSS, states=1e-3, bound=5e-2)
    parity = Parity(reference="NumPy float64", provider="CPUExecutionProvider", rows=(row,))
    manifest = Manifest.model_validate_json(entry.value).model_copy(update={"precision": "int8", "parity": parity})
    small = quantize(model)
    helper.set_model_props(small, {METADATA_KEY: manifest.model_dump_json()})
    written = path.with_name("model.int8.onnx")
    onnx.save(small, written)
    return written
