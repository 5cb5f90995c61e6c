"""Ragged batches: what is taken, and in what words the rest is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import InvalidRequest
from service.manifest import Manifest, StateSpec, TensorSpec
from service.wire.codec import Codec, Tensor

Array = NDArray[Any]

MANIFEST = Manifest(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=(None, None, 2), batch_axis=1, time_axis=0),
        TensorSpec(name="ids", dtype="int64", shape=(None, None), batch_axis=0, time_axis=1, below=10),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", shape=(None, None, 4), batch_axis=1, time_axis=0),
        TensorSpec(name="last", dtype="float32", shape=(None, 3), batch_axis=0, time_axis=None),
    ),
    states=(StateSpec(name="h", input="h0", output="hT", dtype="float32", shape=(None, 5), batch_axis=0),),
    streamable=True,
)


def codec(max_bytes: int = 10_000) -> Codec:
    """A reader of small batches."""
    return Codec(MANIFEST, max_steps=8, max_batch=4, max_bytes=max_bytes, finite=True)


def sent(array: Array, name: str) -> Tensor:
    """An array as it comes."""
    return Tensor(name, array.dtype.name, array.shape, array.tobytes())


def given(steps: int, **changed: Array) -> list[Tensor]:
    """Inputs of so many steps in all."""
    arrays: dict[str, Array] = {
        "x": np.arange(2 * steps, dtype=np.float32).reshape(steps, 2),
        "ids": np.arange(steps) % 10,
    }
    return [sent(array, name) for name, array in (arrays | changed).items()]


def test_rows_come_apart_where_their_lengths_say() -> None:
    """Every input alike, and nothing is padded."""
    batch = codec().ragged(given(6), [3, 1, 2])
    assert batch.steps is None
    assert [[array.tolist() for array in row] for row in batch.rows] == [
        [[[0, 1], [2, 3], [4, 5]], [0, 1, 2]],
        [[[6, 7]], [3]],
        [[[8, 9], [10, 11]], [4, 5]],
    ]


@pytest.mark.parametrize(
    ("lengths", "changed", "says"),
    [
        ([], {}, r"no rows \(N = 0\)"),
        ([2, 1, 1, 1, 1], {}, "5 rows; this server takes up to 4"),
        ([6, 0], {}, r"row 1: there are no steps \(T = 0\); expected at least 1"),
        ([7, -1], {}, r"row 1: there are no steps \(T = -1\)"),
        ([1, 9], {}, "row 1: there are 9 steps; this server takes up to 8"),
        ([3, 2], {}, r"input 'x' is \[6, 2\]; expected \[5, ...\], the sum of the lengths"),
        ([3, 4], {}, r"input 'x' is \[6, 2\]; expected \[7, ...\], the sum of the lengths"),
        ([3, 3], {"ids": np.arange(5)}, r"input 'ids' is \[5\]; expected \[6, ...\] as the first"),
        ([3, 3], {"ids": np.arange(6).reshape(2, 3)}, r"'ids' has shape \[2, 3\]; expected \[sum of lengths\]"),
        ([3, 3], {"x": np.zeros((2, 3, 2), np.float32)}, r"\[2, 3, 2\]; expected \[sum of lengths, 2\]"),
        ([3, 3], {"ids": np.arange(5, 11)}, "'ids' holds 10; expected 0 to 9"),
        ([3, 3], {"x": np.full((6, 2), np.nan, np.float32)}, "'x' holds NaN"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(lengths: list[int], changed: dict[str, Array], says: str) -> None:
    """The error says which row or input it was, and what was expected."""
    with pytest.raises(InvalidRequest, match=says):
        codec().ragged(given(6, **changed), lengths)


@pytest.mark.parametrize("states", [False, True])
def test_what_is_really_sent_is_counted(states: bool) -> None:
    """A reply may be as large as the limit, and padding that nobody sends does not count."""
    lengths = [8, 1, 1]
    reply = 10 * 4 * 4 + 3 * 3 * 4 + states * 3 * 5 * 4
    codec(reply).ragged(given(10), lengths, states)
    with pytest.raises(
        InvalidRequest, match=f"the reply would hold {reply} bytes; this server sends up to {reply - 1}"
    ):
        codec(reply - 1).ragged(given(10), lengths, states)
    whole = given(0, x=np.zeros((3, 8, 2), np.float32), ids=np.zeros((3, 8), np.int64))
    with pytest.raises(InvalidRequest, match=f"the reply would hold {reply + 14 * 4 * 4} bytes"):
        codec(reply).batch(whole, lengths, states)
