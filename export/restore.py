"""From a model file alone back to what it was exported from: the spec, and the weights as the file holds them.

Owns reading initializers. Must not know torch. Weights of another precision come back as that precision has them:
rounded to float16, or int8 times their scales.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.describe import Precision, initial_state
from export.errors import ExportError
from export.signature import state_tensors, unpack_states
from export.stored import canonical_weights
from models.spec import PREFIXES, Layer, ModelSpec
from models.weights import Array, Weights, check_shapes
from service.graphs.onnx_file import tensors_of
from service.manifest import Manifest


def restore(model: onnx.ModelProto, manifest: Manifest) -> tuple[ModelSpec, dict[str, Array]]:
    """Read a model back.

    Args:
        model: the file.
        manifest: what it says of itself.

    Returns:
        What the model is made of, and its canonical weights in float64.

    Raises:
        ExportError: the file's initializers are not those that the manifest tells of, or stand in another file.
    """
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_of(model)):
        raise ExportError(
            "the file keeps weights in another file, and was not exported here: one file holds everything"
        )
    try:
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        arrays = {name: array.astype(np.float64) for name, array in _dequantized(arrays).items()}
        spec = _spec(manifest, arrays)
        weights = canonical_weights(spec, arrays, [layer.lowering for layer in manifest.layers])
        weights |= _initial_states(spec, manifest)
        check_shapes(weights, spec.weight_shapes)
    except Exception as error:  # whatever a library raises at bytes that it cannot make sense of
        raise ExportError(f"the file does not hold the model that its manifest tells of: {error}") from error
    return spec, weights


def stored_precision(model: onnx.ModelProto) -> Precision:
    """The precision of the weights, by what stands in the file."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if onnx.TensorProto.INT8 in kinds:
        return "int8"
    return "float16" if onnx.TensorProto.FLOAT16 in kinds else "float32"


def _spec(manifest: Manifest, arrays: Weights) -> ModelSpec:
    learned = any(state.initial is not None for state in manifest.states)
    layers = tuple(
        Layer(
            **layer.model_dump(exclude={"lowering"}),
            learned_initial_state=learned,
        )
        for layer in manifest.layers
    )
    return ModelSpec(
        layers,
        vocabulary_size=len(arrays["embedding"]) if "embedding" in arrays else None,
        head_size=len(arrays["head.W"]) if "head.W" in arrays else None,
        head_on=manifest.head_on,
    )


def _initial_states(spec: ModelSpec, manifest: Manifest) -> dict[str, Array]:
    """The learned initial states under their canonical names; nothing where none are learned."""
    if not spec.layers[0].learned_initial_state:
        return {}
    states = unpack_states(state_tensors(spec), [initial_state(state, 1) for state in manifest.states])
    prefixes = [f"layers.{i}.{PREFIXES[d]}" for i, layer in enumerate(spec.layers) for d in range(layer.directions)]
    return {
        prefix + name: part[0].astype(np.float64)
        for prefix, state in zip(prefixes, states, strict=True)
        for name, part in zip(("h0", "c0"), state, strict=False)
    }


def _dequantized(arrays: Weights) -> dict[str, Array]:
    """The kernels of quantised layers as the numbers they stand for: ``W[D, G*H, I]`` from ``int8[D, I, G*H]``."""
    result = dict(arrays)
    for name in [name for name in arrays if name.endswith("_quantized")]:
        kernel = name.removesuffix("_quantized")
        parts = [f"{kernel}_{part}" for part in ("quantized", "scale", "zero_point")]
        if missing := [part for part in parts if part not in arrays]:
            raise ValueError(f"{name} has no {missing[0]}")
        quantized, scale, zero = (result.pop(part) for part in parts)
        scale, zero = np.expand_dims(scale.astype(np.float64), 1), np.expand_dims(zero, 1)  # one for each gate row
        result[kernel] = ((quantized - zero) * scale).swapaxes(1, 2)
    return result
