"""A caller's arrays as a model's tensors, and back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conveyor import InvalidRequest, Model, ProtocolError
from conveyor.payload import (
    are_ragged,
    decode_outputs,
    encode_inputs,
    encode_lengths,
    encode_ragged,
    encode_states,
    split,
)
from conveyor.tensors import decode_tensor, encode_tensor
from tests.unit.conveyor.models import HALVES, TOKENS, TWO, VECTORS


@pytest.mark.parametrize(("of", "x", "form"), [(VECTORS, np.zeros((2, 5, 4)), "N, T, 3"), (TOKENS, [1, 2], "N, T")])
def test_a_batch_of_another_shape_is_refused(of: Model, x: Any, form: str) -> None:
    """Fixed sizes and the number of axes count; N and T may be any."""
    with pytest.raises(InvalidRequest) as refused:
        encode_inputs(of, x)
    shape = list(np.shape(x))
    assert str(refused.value) == f"input {of.inputs[0].name!r} has shape {shape}; expected [{form}]"


@pytest.mark.parametrize(("batch", "shape", "form"), [(True, (2, 4), "[N, 3]"), (False, (1, 3), "[3]")])
def test_a_state_of_another_shape_is_refused(batch: bool, shape: tuple[int, ...], form: str) -> None:
    """A session's state has no batch axis."""
    with pytest.raises(InvalidRequest) as refused:
        encode_states(VECTORS, {"h": np.zeros(shape)}, batch=batch)
    assert str(refused.value) == f"state 'h' has shape {list(shape)}; expected {form}"


def test_lengths_are_whole_numbers() -> None:
    """One for each row, as a list or an array of any integer dtype."""
    assert encode_lengths([8, 1], 2) == [8, 1]
    assert encode_lengths(np.array([8, 1], np.uint8), 2) == [8, 1]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([8.0, 1.0], "'lengths' has dtype float64; expected int64"),
        (["8", "1"], "'lengths' has dtype <U1; expected int64"),
        ([8], r"'lengths' has shape \[1\]; expected \[2\], one for each row"),
        ([], r"'lengths' has shape \[0\]; expected \[2\]"),
        (8, r"'lengths' has shape \[\]; expected \[2\]"),
        ([[8], [1, 2]], "'lengths' is not an array"),
        (np.array([2**63, 1], np.uint64), "'lengths' holds values that do not fit into int64"),
    ],
)
def test_other_lengths_are_refused(lengths: Any, message: str) -> None:
    """Rather than rounded, or left to a library's own words."""
    with pytest.raises(InvalidRequest, match=message):
        encode_lengths(lengths, 2)


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
        (VECTORS, [[[1e300, 0, 0]]], "do not fit into float32"),
        (HALVES, [[[1e6, 0, 0]]], "do not fit into float16"),
        (HALVES, [[[1_000_000, 0, 0]]], "do not fit into float16"),
        (VECTORS, [[[1j, 0, 0]]], "has dtype complex128; expected float32"),
        (VECTORS, [[["a", "b", "c"]]], "has dtype"),
        (VECTORS, [[[None, 0, 0]]], "has dtype object"),
        (
            VECTORS,
            [[1.0], [1.0, 2.0]],
            r"is not an array: .*; expected one, or .* a list of NumPy arrays, each \[T, 3\]",
        ),
        (TOKENS, [], "is an empty list; expected at least one sequence"),
    ],
)
def test_values_that_the_model_cannot_hold_are_refused(of: Model, x: Any, message: str) -> None:
    """Precision may be lost (float64 to float32), values and kinds may not; and NumPy has nothing to warn of."""
    with warnings.catch_warnings(action="error"), pytest.raises(InvalidRequest, match=message):
        encode_inputs(of, x)


def test_infinity_and_nan_are_left_to_the_server() -> None:
    """Which may take them; a cast keeps them as they are."""
    x = [[[np.inf, -np.inf, np.nan]]]
    np.testing.assert_array_equal(decode_tensor(encode_inputs(HALVES, x)[0]), np.array(x, np.float16))


def test_states_take_the_models_dtype_and_names() -> None:
    """All states or an error."""
    (tensor,) = encode_states(VECTORS, {"h": [1.0, 2.0, 3.0]}, batch=False)
    assert decode_tensor(tensor).dtype == np.float32
    with pytest.raises(InvalidRequest, match=r"states \['c'\]; expected \['h'\]"):
        encode_states(VECTORS, {"c": [0.0]}, batch=False)


def test_one_output_is_an_array_and_several_are_a_dict() -> None:
    """By name, each with the batch axis first."""
    y, last = np.arange(6, dtype=np.float32).reshape(2, 1, 3), np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(decode_outputs(VECTORS, [encode_tensor("y", y)]), y)
    both = decode_outputs(TWO, [encode_tensor("y", y), encode_tensor("last", last)])
    np.testing.assert_array_equal(both["y"], y)
    np.testing.assert_array_equal(both["last"], last)


def test_a_reply_without_an_output_is_a_protocol_error() -> None:
    """Rather than a KeyError."""
    with pytest.raises(ProtocolError, match="lacks the outputs last"):
        decode_outputs(TWO, [encode_tensor("y", np.zeros((1, 3)))])


def test_ragged_sequences_stand_one_behind_the_other_and_come_apart_again() -> None:
    """Nothing between them on the way in; each row of its own length on the way out."""
    sequences = [np.ones((2, 3)), np.full((4, 3), 2.0), np.zeros((1, 3))]
    (tensor,), lengths = encode_ragged(VECTORS, sequences)
    assert lengths == [2, 4, 1]
    x = decode_tensor(tensor)
    np.testing.assert_array_equal(x, np.concatenate(sequences))
    assert x.dtype == np.float32
    for row, sequence in zip(split(VECTORS, x, lengths), sequences, strict=True):
        np.testing.assert_array_equal(row, sequence)


def test_ragged_sequences_of_several_inputs_are_lists_by_name() -> None:
    """And so are several outputs, of which those without time have one value a sequence."""
    a, b = [np.ones((2, 3)), np.zeros((1, 3))], [np.zeros((2, 3)), np.ones((1, 3))]
    tensors, lengths = encode_ragged(TWO, {"b": b, "a": a})
    assert [tensor.name for tensor in tensors] == ["a", "b"]
    for tensor, given in zip(tensors, (a, b), strict=True):
        np.testing.assert_array_equal(decode_tensor(tensor), np.concatenate(given))
    y, last = np.arange(3, dtype=np.float32)[:, None], np.eye(2, dtype=np.float32)
    rows = split(TWO, {"y": y, "last": last}, lengths)
    np.testing.assert_array_equal(np.concatenate(rows["y"]), y)
    assert [len(row) for row in rows["y"]] == [2, 1]
    np.testing.assert_array_equal(rows["last"], last)


@pytest.mark.parametrize(
    ("x", "ragged"),
    [
        ([np.zeros((2, 3))], True),
        ((np.zeros((2, 3)), np.zeros((1, 3))), True),
        ({"a": [np.zeros(2)], "b": [np.zeros(2)]}, True),
        (np.zeros((1, 2, 3)), False),
        ([[[0.0, 0.0, 0.0]]], False),
        ({"a": [np.zeros(2)], "b": np.zeros((1, 2))}, False),
        ([], False),
        ({}, False),
    ],
)
def test_what_is_ragged(x: Any, ragged: bool) -> None:
    """Lists of arrays are; arrays, and lists of numbers that make one, are batches."""
    assert are_ragged(x) == ragged


@pytest.mark.parametrize(
    ("of", "x", "message"),
    [
        (
            VECTORS,
            [np.zeros((2, 3)), np.zeros((2, 4))],
            r"sequence 1 of input 'x' has shape \[2, 4\]; expected \[T, 3\]",
        ),
        (VECTORS, [np.zeros(3)], r"sequence 0 of input 'x' has shape \[3\]; expected \[T, 3\]"),
        (TOKENS, [np.zeros(3)], "has dtype float64; expected int64"),
        (TWO, [np.zeros((2, 3))], "inputs a, b; expected a dict"),
        (TWO, {"a": [np.zeros((2, 3))]}, r"expected \['a', 'b'\]"),
        (TWO, {"a": [np.zeros((2, 3))], "b": [np.zeros((1, 3))]}, r"'b' are as long as \[1\]; expected \[2\], as"),
    ],
)
def test_ragged_sequences_that_do_not_fit_are_refused(of: Model, x: Any, message: str) -> None:
    """Each is held against the model, and the inputs against each other."""
    with pytest.raises(InvalidRequest, match=message):
        encode_ragged(of, x)


def test_ragged_sequences_agree_where_the_model_leaves_a_size_open() -> None:
    """They stand in one tensor."""
    spec = replace(VECTORS.inputs[0], shape=(None, None, None))
    with pytest.raises(InvalidRequest, match=r"agree in all axes but the first; got \[\[2, 3\], \[2, 4\]\]"):
        encode_ragged(replace(VECTORS, inputs=(spec,)), [np.zeros((2, 3)), np.zeros((2, 4))])


def test_a_ragged_reply_of_another_length_is_a_protocol_error() -> None:
    """A server that knows no ragged batches, say."""
    with pytest.raises(ProtocolError, match=r"output 'y' came with shape \[2, 3\]; expected \[3, ...\]"):
        split(VECTORS, np.zeros((2, 3)), [1, 2])
