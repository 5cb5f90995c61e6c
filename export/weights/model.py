"""A model whose weights come from elsewhere: from SPEC.yaml and the files it names to a spec and canonical weights.

Owns the whole model: how layers follow each other, the embedding, the head, initial states, and that no array is left
over. Must not know how one layer's arrays are laid out, nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.weights.library_arrays import keras_part, read_library_arrays
from export.weights.named_arrays import NamedArrays
from export.weights.own_arrays import read_own_arrays
from export.weights.spec import HeadSource, LayerSource, WeightsSpec, read_weights_spec
from models.spec import GATES, Layer, ModelSpec
from models.weights import Array, Weights, select


def read_model(path: Path) -> tuple[ModelSpec, dict[str, Array]]:
    """Read a model from a spec and the files beside it.

    Returns:
        What the model is made of, and its canonical weights, in float64.

    Raises:
        ExportError: the spec is none, a file cannot be read, or an array is missing, left over or does not fit; the
            text names the place in the spec.
    """
    source = read_weights_spec(path)
    with _at(str(path)):
        arrays = NamedArrays(path.parent / name for name in source.weights)
        layers: list[Layer] = []
        weights: dict[str, Array] = {}
        for number, each in enumerate(source.layers):
            with _at(f"layers[{number}]"):
                read, their = read_layers(each, arrays)
                if layers and (below := layers[-1].output_size) != read[0].input_size:
                    raise ExportError(f"takes {read[0].input_size} values, the layer below gives {below}")
                for index, layer in enumerate(read):
                    here = select(their, f"layers.{index}.")
                    weights |= {f"layers.{len(layers)}.{name}": array for name, array in here.items()}
                    layers.append(layer)
        if source.embedding is not None:
            with _at("embedding"):
                weights["embedding"] = read_embedding(source.embedding, layers[0].input_size, arrays)
        if source.head is not None:
            with _at("head"):
                weights |= read_head(source.head, layers[-1].output_size, arrays)
        arrays.check_all_used(source.ignore)
        _check_last_of_keras(source, layers[-1])
        spec = ModelSpec(
            tuple(layers),
            vocabulary_size=None if source.embedding is None else len(weights["embedding"]),
            head_size=None if source.head is None else len(weights["head.W"]),
            head_on=source.output,
        )
    return spec, weights


def read_layers(source: LayerSource, arrays: NamedArrays) -> tuple[list[Layer], dict[str, Array]]:
    """Read one layer, or all layers of a torch module, with their initial states.

    Returns:
        The layers, and their canonical weights under ``layers.0.W_x``.

    Raises:
        ExportError: an array is missing or does not fit, or is not what the spec says beside it.
        ValueError: there is no such layer.
    """
    if source.layout is None:
        layer, own = read_own_arrays(source, arrays)
        layers, weights = [layer], {f"layers.0.{name}": array for name, array in own.items()}
    else:
        layers, weights = read_library_arrays(source, arrays)
    _check_said(source, "input_size", layers[0].input_size)
    for index, layer in enumerate(layers):
        for name in ("hidden_size", "bidirectional", "bias", "reset"):
            _check_said(source, name, getattr(layer, name))
        _check_said(source, "peepholes", layer.has_peepholes)
        if source.inverted_update:
            here = f"layers.{index}."
            weights |= {here + name: array for name, array in invert_update(layer, select(weights, here)).items()}
    initial = read_initial(source, layers, arrays)
    return [replace(layer, learned_initial_state=bool(initial)) for layer in layers], weights | initial


def invert_update(layer: Layer, weights: Weights) -> dict[str, Array]:
    """A GRU's weights for z, which keeps the past, from those for u = 1 - z, which lets in the new.

    As 1 - sigmoid(a) = sigmoid(-a), everything that goes into the gate is negated, to the bit.
    """
    H, place = layer.hidden_size, GATES["gru"].index("z")
    inverted = {}
    for name, array in weights.items():
        if name.rpartition(".")[2] in ("W_x", "W_h", "b"):
            array = array.copy()
            array[place * H : (place + 1) * H] *= -1
        inverted[name] = array
    return inverted


def read_initial(source: LayerSource, layers: Sequence[Layer], arrays: NamedArrays) -> dict[str, Array]:
    """The learned initial states under their canonical names; nothing where none are learned.

    Arrays hold ``[H]`` for each direction of each layer, in this order: one array ``[H]``, ``[L * D, H]`` or, as torch
    has it, ``[L * D, 1, H]``; or one array for each. What is not named is zero.

    Raises:
        ExportError: an array does not fit.
    """
    H, L, D = layers[0].hidden_size, len(layers), layers[0].directions
    named = {part: names for part, names in (("h", source.initial.h), ("c", source.initial.c)) if names is not None}
    if not named:
        return {}
    if "c" in named and not layers[0].has_cell_state:
        raise ExportError(f"initial.c: a cell {source.cell} has no cell state")
    initial = {}
    for part in ("h", "c") if layers[0].has_cell_state else ("h",):
        rows = np.zeros((L * D, H))
        if part in named:
            names = named[part]
            taken = [arrays.take(name) for name in ([names] if isinstance(names, str) else names)]
            if not all(array.shape in ((H,), (1, H), (1, 1, H), (L * D, H), (L * D, 1, H)) for array in taken):
                shapes = ", ".join(str(list(array.shape)) for array in taken)
                raise ExportError(f"initial.{part}: the shape is {shapes}, expected [{L * D}, 1, {H}]")
            rows = np.concatenate([array.reshape(-1, H) for array in taken])
            if len(rows) != L * D:
                raise ExportError(f"initial.{part}: there are {len(rows)} rows [{H}], expected {L * D}")
        for index in range(L):
            for direction, prefix in enumerate(("", "reverse.")[:D]):
                initial[f"layers.{index}.{prefix}{part}0"] = rows[index * D + direction]
    return initial


def read_embedding(name: str, width: int, arrays: NamedArrays) -> Array:
    """The embedding ``[V, E]``.

    Raises:
        ExportError: it does not fit the first layer.
    """
    array = arrays.take(name)
    if array.ndim != 2 or array.shape[1] != width:
        raise ExportError(
            f"{name!r} has shape {list(array.shape)}, expected [V, {width}]: the first layer takes {width}"
        )
    return array


def read_head(source: HeadSource, width: int, arrays: NamedArrays) -> dict[str, Array]:
    """The head's canonical weights; a bias that it does not have is zero.

    Raises:
        ExportError: an array is missing or does not fit.
    """
    W_name, b_name = {"torch": ("weight", "bias"), "keras": ("kernel", "bias"), None: ("W", "b")}[source.layout]
    places = _head_places(source, arrays, (W_name, b_name))
    W = arrays.take(places[W_name])
    by_row = source.layout == "keras" or source.product == "x @ W"
    axis, says = (0, f"[{width}, O]") if by_row else (1, f"[O, {width}]")
    if W.ndim != 2 or W.shape[axis] != width:
        raise ExportError(
            f"{places[W_name]!r} has shape {list(W.shape)}, expected {says}: the top layer gives {width} values"
        )
    W = W.T if by_row else W
    b = arrays.take(places[b_name]) if b_name in places else np.zeros(len(W))
    if b.size != len(W) or max(b.shape, default=1) != b.size:
        raise ExportError(f"{places[b_name]!r} has shape {list(b.shape)}, expected [{len(W)}]")
    return {"head.W": W, "head.b": b.reshape(-1)}


def _head_places(source: HeadSource, arrays: NamedArrays, parts: tuple[str, str]) -> dict[str, str]:
    """The names of the head's arrays in the file."""
    prefix = source.prefix or ""
    found: dict[str, str] = {}
    if source.arrays:
        if unknown := sorted(source.arrays.keys() - set(parts)):
            raise ExportError(f"arrays: unknown part {unknown[0]!r}, expected {' and '.join(parts)}")
        found = {part: prefix + name for part, name in source.arrays.items() if isinstance(name, str)}
    elif source.layout == "torch":
        found = {name.removeprefix(prefix).lstrip("."): name for name in arrays.names if name.startswith(prefix)}
    else:
        for rest, name in arrays.below(prefix).items():
            if part := keras_part(rest, parts):
                if part in found:
                    raise ExportError(f"prefix: both {found[part]!r} and {name!r} could be {part!r}")
                found[part] = name
    if parts[0] not in found:
        raise ExportError(f"no {parts[0]!r} stands under {prefix!r}; there are {arrays}")
    return found


def _check_said(source: LayerSource, name: str, found: object) -> None:
    said = getattr(source, name)
    if said is not None and said != found:
        raise ExportError(f"{name}: {json.dumps(said)} in the spec, {json.dumps(found)} by the arrays")


def _check_last_of_keras(source: WeightsSpec, top: Layer) -> None:
    if source.output == "last" and top.bidirectional and source.layers[-1].layout == "keras":
        raise ExportError(
            "output: a Bidirectional layer of Keras without return_sequences gives the backward direction's output of "
            "the first step, beside the forward direction's of the last; here output is that of one step"
        )


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Say where in the spec something is wrong."""
    try:
        yield
    except (ExportError, ValueError) as error:
        raise ExportError(f"{place}: {error}") from error
