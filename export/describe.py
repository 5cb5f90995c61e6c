"""A model file's manifest: made from the model, written to the file, read from it.

Owns the way from a ``ModelSpec`` to a ``service.manifest.Manifest``, and the manifest's place in the file. Must not
know how a graph is made.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
import onnx

from export.errors import ExportError, VerificationFailed
from export.signature import pack_states, state_tensors
from export.stored import Lowering
from models.reference import initial_states
from models.spec import ModelSpec
from models.weights import Array, Weights, digest
from service.graphs.onnx_file import SEAL_KEY
from service.manifest import METADATA_KEY, DType, LayerSpec, Manifest, StateSpec, TensorSpec
from service.values import from_text, to_text

Precision = Literal["float32", "float16", "int8"]


def describe(spec: ModelSpec, weights: Weights, lowerings: Sequence[Lowering], precision: Precision) -> Manifest:
    """The manifest of a model's graph, as ``export.graph`` lays out its axes; without parity.

    Args:
        spec: what the model is made of.
        weights: its canonical weights, for the initial states that are among them.
        lowerings: the form of each layer.
        precision: of the weights; int8 weights go with float32 vectors.
    """
    dtype: DType = "float16" if precision == "float16" else "float32"
    tokens = spec.vocabulary_size is not None
    x_shape = (None, None) if tokens else (None, None, spec.layers[0].input_size)
    every = spec.head_on == "every"
    learned = any(layer.learned_initial_state for layer in spec.layers)
    initial = pack_states(state_tensors(spec), initial_states(spec, weights, 1)) if learned else None
    return Manifest(
        inputs=(
            TensorSpec(
                name="x",
                dtype="int64" if tokens else dtype,
                shape=x_shape,
                batch_axis=1,
                time_axis=0,
                below=spec.vocabulary_size,
            ),
        ),
        lengths="lengths",
        outputs=(
            TensorSpec(
                name="y",
                dtype=dtype,
                shape=(None, None, spec.output_size) if every else (None, spec.output_size),
                batch_axis=1 if every else 0,
                time_axis=0 if every else None,
            ),
        ),
        states=tuple(
            StateSpec(
                name=tensor.name,
                input=tensor.input,
                output=tensor.output,
                dtype=dtype,
                shape=tensor.shape,
                batch_axis=tensor.batch_axis,
                initial=None if initial is None else to_text(initial[place].take(0, tensor.batch_axis).astype(dtype)),
            )
            for place, tensor in enumerate(state_tensors(spec))
        ),
        streamable=spec.streamable,
        layers=tuple(
            LayerSpec(
                cell=layer.cell,
                input_size=layer.input_size,
                hidden_size=layer.hidden_size,
                bidirectional=layer.bidirectional,
                peepholes=layer.has_peepholes,
                reset=layer.reset,
                activation=layer.activation,
                lowering=lowering,
            )
            for layer, lowering in zip(spec.layers, lowerings, strict=True)
        ),
        head_on=spec.head_on,
        precision=precision,
        made_with={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")},
        },
    )


def check_manifest(manifest: Manifest, spec: ModelSpec, weights: Weights, precision: Precision) -> None:
    """See whether a manifest is the one that describes what stands in its file.

    Args:
        manifest: what the file says of itself; how it was verified, and with what it was made, is not judged.
        spec: what was found in the file, by ``export.restore``.
        weights: the weights that were found with it.
        precision: of the weights that were found.

    Raises:
        VerificationFailed: it says something else, or the weights are not those that it was written for.
    """
    found = describe(spec, weights, [layer.lowering for layer in manifest.layers], precision)
    for name in Manifest.model_fields:
        if name in ("parity", "made_with", "weights_digest"):
            continue
        if (said := getattr(manifest, name)) != (expected := getattr(found, name)):
            raise VerificationFailed(f"the manifest does not fit the graph: {name} is {said!r}, expected {expected!r}")
    if manifest.weights_digest != digest(weights):
        raise VerificationFailed(
            f"the weights are not those that the file was exported with: the sha256 of what it holds is "
            f"{digest(weights)}, the manifest has {manifest.weights_digest}"
        )


def put_manifest(model: onnx.ModelProto, manifest: Manifest) -> None:
    """Write the manifest to the file's metadata, in the place of one that is there; a seal holds no more, and goes."""
    others = {entry.key: entry.value for entry in model.metadata_props if entry.key not in (METADATA_KEY, SEAL_KEY)}
    onnx.helper.set_model_props(model, {**others, METADATA_KEY: manifest.model_dump_json()})


def read_manifest(model: onnx.ModelProto) -> Manifest:
    """The manifest of a file.

    Raises:
        ExportError: there is none, or it does not hold to the format.
    """
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in entries:
        raise ExportError(f"the file's metadata has no {METADATA_KEY!r}: it was not exported here")
    try:
        return Manifest.model_validate_json(entries[METADATA_KEY])
    except ValueError as error:
        raise ExportError(f"the file's manifest does not hold to the format: {error}") from error


def initial_state(state: StateSpec, N: int) -> Array:
    """The state that N rows start from, in the state's own shape and dtype."""
    one = np.zeros(state.tail, state.dtype)
    if state.initial is not None:
        one = from_text(state.initial, state.dtype, state.tail)
    return np.repeat(np.expand_dims(one, state.batch_axis), N, state.batch_axis)
