"""The outputs that a model gave where it comes from, held against what was read of it.

Owns this one comparison. A wrong order of gates, a transposed square matrix or a forgotten activation gives a sound
model, but another one; nothing but its outputs tells. Must not know where they come from.
"""

from __future__ import annotations

import numpy as np

from export.data import check_sequences
from export.errors import ExportError, VerificationFailed
from export.verify import largest_error
from models.reference import run_model
from models.spec import ModelSpec
from models.weights import Weights

MAX_ERROR = 1e-5
"""What the largest error must stay within: both sides are right, and the other one was rounded as its program does."""


NOT_IN_ARRAYS = (
    "what the arrays do not tell are the product, the order of the gates, whether x or h stands first in one matrix "
    "of both (W_xh or W_hx), the reset and the activation; and what stands behind the head, a softmax say, is not part "
    "of it"
)
"""What may be wrong with a model that was read from arrays."""


def check_outputs(
    spec: ModelSpec, weights: Weights, data: Weights, max_error: float | None = None, hint: str = NOT_IN_ARRAYS
) -> float:
    """Run the reference over given sequences, and compare what it gives with what they should give.

    Args:
        spec: what the model is made of.
        weights: its canonical weights, in float64.
        data: ``x``, ``lengths`` if rows differ, and ``y[N, T, O]``, or ``y[N, O]`` where the output is the last step's.
        max_error: what the largest error must stay within; None for ``MAX_ERROR``.
        hint: what may be wrong where it does not.

    Returns:
        The largest error, measured as ``export.verify`` does.

    Raises:
        ExportError: these are no sequences for the model, or no outputs of it.
        VerificationFailed: the model gives something else.
    """
    x, lengths = check_sequences(data, spec)
    expected, bound = data["y"], MAX_ERROR if max_error is None else max_error
    y, _ = run_model(spec, weights, x if spec.vocabulary_size is not None else x.astype(np.float64), lengths)
    if expected.shape != y.shape or expected.dtype.kind != "f":
        raise ExportError(
            f"data: y is {expected.dtype} of shape {expected.shape}, expected numbers {y.shape}, what the model gives "
            "for x; leave y out to compare nothing"
        )
    if spec.head_on == "every":
        expected = np.where((np.arange(x.shape[1]) < lengths[:, None])[:, :, None], expected, 0)
    scale = np.abs(y).max(-1, keepdims=True) if spec.head_size is not None else np.abs(y)
    if not (error := largest_error(expected, y, scale)) <= bound:
        raise VerificationFailed(
            f"the outputs given with the data differ from those of the model by {error:.1e}, the bound is {bound:.1e}: "
            f"the model is not the one they come from; {hint}"
        )
    return error
