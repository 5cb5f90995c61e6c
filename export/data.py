"""Given sequences to verify with: whether they fit the model. Must not know where they come from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from export.errors import ExportError
from models.spec import ModelSpec
from models.weights import Array


def check_sequences(arrays: Mapping[str, Array], spec: ModelSpec) -> tuple[Array, Array]:
    """Take ``x[N, T, I]``, or token ids ``x[N, T]``, and the rows' ``lengths[N]`` (all T where there are none).

    Raises:
        ExportError: these are not sequences for this model.
    """
    if "x" not in arrays:
        raise ExportError(f"data: got {sorted(arrays)}, expected an array 'x', and 'lengths' if rows differ")
    x = arrays["x"]
    tokens = spec.vocabulary_size is not None
    expected = "integer token ids [N, T]" if tokens else f"numbers [N, T, {spec.layers[0].input_size}]"
    fits = x.ndim == 2 if tokens else x.ndim == 3 and x.shape[2] == spec.layers[0].input_size
    if not fits or x.size == 0 or (tokens and x.dtype.kind not in "iu") or x.dtype.kind not in "iuf":
        raise ExportError(f"data: x is {x.dtype} of shape {x.shape}, expected {expected}")
    lengths = arrays.get("lengths", np.full(len(x), x.shape[1]))
    if lengths.shape != (len(x),) or lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > x.shape[1]:
        raise ExportError(f"data: lengths must be integers of shape ({len(x)},), each from 1 to T = {x.shape[1]}")
    if spec.vocabulary_size is not None and not (x.min() >= 0 and x.max() < spec.vocabulary_size):
        raise ExportError(f"data: ids lie between {x.min()} and {x.max()}, expected 0 to {spec.vocabulary_size - 1}")
    return x, lengths
