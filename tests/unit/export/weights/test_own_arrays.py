"""Arrays named one by one: every form in which a layer can be taken apart is read back as the layer it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from export.weights.model import read_model
from models.spec import GATES, PEEPHOLES, Layer
from models.weights import select
from tests.unit.export.weights.elsewhere import Array, Arrays, write
from tests.unit.models.drawn import LAYERS, draw_weights

FORMS = list(product(("x @ W", "W @ x"), ("stacked", "pattern", "mapping"), ("apart", "W_xh", "W_hx")))


def take_apart(
    layer: Layer, weights: Arrays, form: tuple[str, str, str], prefix: str
) -> tuple[Arrays, dict[str, object]]:
    """One direction's arrays in a form, under names that begin with a prefix, and what a spec has to say of them."""
    how, split, matrices = form
    gates = {"W_x": GATES[layer.cell], "W_h": GATES[layer.cell], "b": GATES[layer.cell], "b_h": ("h",)}
    gates["V"] = PEEPHOLES.get(layer.cell, ())
    parts = {
        part: dict(zip(gates[part], np.split(array, len(gates[part])), strict=True)) for part, array in weights.items()
    }
    if matrices != "apart":
        W_x, W_h = parts.pop("W_x"), parts.pop("W_h")
        pairs = {gate: (W_x[gate], W_h[gate]) for gate in W_x}
        parts[matrices] = {
            gate: np.concatenate([x, h] if matrices == "W_xh" else [h, x], axis=1) for gate, (x, h) in pairs.items()
        }
    arrays: Arrays = {}
    said: dict[str, object] = {}
    for part, by_gate in parts.items():
        if split == "stacked":
            # Backwards, so that an order that is not looked at would be noticed.
            stacked = np.concatenate([by_gate[gate] for gate in reversed(by_gate)])
            arrays[prefix + part], said[part] = turned(stacked, how), part
        else:
            arrays |= {f"{prefix}{part}.{gate}": turned(array, how) for gate, array in by_gate.items()}
            by_name = {gate: f"{part}.{gate}" for gate in by_gate}
            said[part] = f"{part}.{{gate}}" if split == "pattern" and len(by_gate) > 1 else by_name
    return arrays, said


def turned(array: Array, how: str) -> Array:
    """A matrix as it stands in its product."""
    return array.T if how == "x @ W" and array.ndim == 2 else array


@pytest.mark.parametrize("form", FORMS, ids=", ".join)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_every_form_is_read_back(layer: Layer, form: tuple[str, str, str], tmp_path: Path) -> None:
    """In one direction with square matrices, whose shapes tell nothing, and in two with others."""
    for I, bidirectional in ((layer.hidden_size, False), (layer.input_size, True)):
        made = replace(layer, input_size=I, bidirectional=bidirectional)
        weights = draw_weights(made.weight_shapes)
        forward = {name: array for name, array in weights.items() if not name.startswith("reverse.")}
        arrays, said = take_apart(made, forward, form, "fw.")
        spec = {"cell": made.cell, "product": form[0], "prefix": "fw.", "arrays": said, "activation": made.activation}
        spec |= {"gates": "".join(reversed(GATES[made.cell]))} if form[1] == "stacked" else {}
        spec |= {"reset": made.reset} if made.cell == "gru" else {}
        if bidirectional:
            backward, said = take_apart(made, select(weights, "reverse."), form, "bw.")
            arrays |= backward
            spec |= {"backward": {"prefix": "bw.", "arrays": said}}
        text = yaml.safe_dump({"weights": "w.npz", "layers": [spec]})
        model, read = read_model(write(tmp_path, text, w_npz=arrays))
        assert model.layers == (made,)
        assert read.keys() == {f"layers.0.{name}" for name in weights}
        for name, array in weights.items():
            np.testing.assert_array_equal(read[f"layers.0.{name}"], array)
