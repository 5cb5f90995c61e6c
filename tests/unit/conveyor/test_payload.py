"""A caller's arrays as a model's tensors, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conveyor import InvalidRequest, Model, ProtocolError, TensorSpec
from conveyor.payload import (
    decode_outputs,
    encode_chunk,
    encode_inputs,
    encode_states,
    pad,
    unpad,
)
from conveyor.tensors import decode_tensor, encode_tensor


def _spec(name: str, dtype: str, *axes: str) -> TensorSpec:
    shape = tuple(3 if axis == "feature" else None for axis in axes)
    return TensorSpec(name, np.dtype(dtype), shape, axes)


SERIES = ("batch", "time", "feature")
STATE = _spec("h", "float32", "batch", "feature")


def _model(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Model:
    return Model("m", 1, inputs, outputs, (STATE,), True, ("gru",), "float32", 100, 10, 1000)


VECTORS = _model((_spec("x", "float32", *SERIES),), (_spec("y", "float32", *SERIES),))
TOKENS = _model((_spec("ids", "int64", "batch", "time"),), (_spec("last", "float32", "batch", "feature"),))
TWO = _model(
    (_spec("a", "float32", *SERIES), _spec("b", "float32", *SERIES)),
    (_spec("y", "float32", *SERIES), _spec("last", "float32", "batch", "feature")),
)


@pytest.mark.parametrize(
    ("of", "x", "shape", "single_step"),
    [
        (VECTORS, np.zeros((5, 3)), (5, 3), False),
        (VECTORS, np.zeros(3), (1, 3), True),
        (VECTORS, [[1, 2, 3]], (1, 3), False),
        (TOKENS, [4, 5], (2,), False),
        (TOKENS, 4, (1,), True),
    ],
)
def test_the_number_of_axes_tells_a_step(of: Model, x: Any, shape: tuple[int, ...], single_step: bool) -> None:
    """[T, I] is a chunk, [I] one step; for tokens [T] and a number. Both travel with a time axis, in its dtype."""
    (tensor,), single = encode_chunk(of, x)
    assert single is single_step
    array = decode_tensor(tensor)
    assert array.shape == shape
    assert array.dtype == of.inputs[0].dtype
    np.testing.assert_array_equal(array.ravel(), np.asarray(x).ravel())


@pytest.mark.parametrize("x", [np.zeros((2, 5, 3)), 1.0])
def test_another_number_of_axes_is_refused(x: Any) -> None:
    """The error names both forms that fit."""
    with pytest.raises(InvalidRequest, match=r"expected \[time, feature\], or \[feature\] for a single step"):
        encode_chunk(VECTORS, x)


def test_inputs_must_agree_on_being_a_step() -> None:
    """One input with a time axis and one without make no chunk."""
    with pytest.raises(InvalidRequest, match="some inputs have a time axis"):
        encode_chunk(TWO, {"a": np.zeros(3), "b": np.zeros((1, 3))})


@pytest.mark.parametrize("given", [{"a": [0.0]}, {"a": [0.0], "b": [0.0], "c": [0.0]}])
def test_inputs_are_matched_by_name(given: Any) -> None:
    """Missing and unknown names are refused with both lists."""
    with pytest.raises(InvalidRequest, match=r"expected \['a', 'b'\]"):
        encode_inputs(TWO, given)


def test_several_inputs_need_a_dict() -> None:
    """A bare array does not say which input it is."""
    with pytest.raises(InvalidRequest, match="inputs a, b; expected a dict"):
        encode_inputs(TWO, np.zeros((1, 1, 3)))


@pytest.mark.parametrize(
    ("of", "x", "message"),
    [
        (TOKENS, [[0.5]], "has dtype float64; expected int64"),
        (TOKENS, [[2**63]], "do not fit into int64"),
        (VECTORS, [[[1j, 0, 0]]], "has dtype complex128; expected float32"),
        (VECTORS, [[["a", "b", "c"]]], "has dtype"),
        (VECTORS, [[[None, 0, 0]]], "has dtype object"),
        (VECTORS, [[1.0], [1.0, 2.0]], "is not an array"),
    ],
)
def test_values_that_the_model_cannot_hold_are_refused(of: Model, x: Any, message: str) -> None:
    """Precision may be lost (float64 to float32), values and kinds may not."""
    with pytest.raises(InvalidRequest, match=message):
        encode_inputs(of, x)


def test_states_take_the_models_dtype_and_names() -> None:
    """All states or an error."""
    (tensor,) = encode_states(VECTORS, {"h": [1.0, 2.0, 3.0]})
    assert decode_tensor(tensor).dtype == np.float32
    with pytest.raises(InvalidRequest, match=r"states \['c'\]; expected \['h'\]"):
        encode_states(VECTORS, {"c": [0.0]})


def test_one_output_is_an_array_and_several_are_a_dict() -> None:
    """A single step's output loses its time axis where it has one."""
    y, last = np.arange(3, dtype=np.float32).reshape(1, 3), np.ones(3, np.float32)
    np.testing.assert_array_equal(decode_outputs(VECTORS, [encode_tensor("y", y)]), y)
    np.testing.assert_array_equal(decode_outputs(VECTORS, [encode_tensor("y", y)], single_step=True), y[0])
    both = decode_outputs(TWO, [encode_tensor("y", y), encode_tensor("last", last)], single_step=True)
    np.testing.assert_array_equal(both["y"], y[0])
    np.testing.assert_array_equal(both["last"], last)


def test_a_reply_without_an_output_is_a_protocol_error() -> None:
    """Rather than a KeyError."""
    with pytest.raises(ProtocolError, match="lacks the outputs last"):
        decode_outputs(TWO, [encode_tensor("y", np.zeros((1, 3)))])


def test_ragged_sequences_become_one_batch_and_come_apart_again() -> None:
    """Zeros behind each row on the way in; each row of its own length on the way out."""
    sequences = [np.ones((2, 3)), np.full((4, 3), 2.0)]
    batch, lengths = pad(VECTORS, sequences)
    assert (batch.shape, lengths) == ((2, 4, 3), [2, 4])
    assert batch.dtype == np.float32
    assert not batch[0, 2:].any()
    for row, sequence in zip(unpad(VECTORS, batch, lengths), sequences, strict=True):
        np.testing.assert_array_equal(row, sequence)
    rows = unpad(TOKENS, np.eye(2, 3, dtype=np.float32), [1, 2])
    np.testing.assert_array_equal(rows, np.eye(2, 3))


def test_ragged_sequences_must_agree_in_everything_else() -> None:
    """And a model must have one input for them."""
    with pytest.raises(InvalidRequest, match="must agree in all axes but the first"):
        pad(VECTORS, [np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(InvalidRequest, match="several inputs"):
        pad(TWO, [np.zeros((2, 3))])
