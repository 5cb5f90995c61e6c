"""Chunks laid side by side, and their outputs taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conveyor import InvalidRequest, Model, ProtocolError
from conveyor.chunks import Chunks, Results, copy_chunks, lay_chunks, stack
from conveyor.payload import read_chunk
from conveyor.tensors import decode_tensor, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb
from tests.unit.conveyor.models import SERIES, TOKENS, TWO, VECTORS, model, spec


def lay(of: Model, *chunks: Any) -> Chunks:
    """Chunks of one shape, as a caller gives them."""
    return lay_chunks(of, [read_chunk(of, x) for x in chunks])


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
    many = np.stack([np.asarray(x)] * 2)
    for chunks in (lay(of, x, x), copy_chunks(of, read_chunk(of, many), 2)):
        assert (chunks.single_step, chunks.steps) == (single_step, shape[0])
        for rows, expected in [([1], shape), ([0, 1], (2, *shape))]:
            (tensor,) = chunks.tensors(rows)
            array = decode_tensor(tensor)
            assert (array.shape, array.dtype) == (expected, of.inputs[0].dtype)
            np.testing.assert_array_equal(array, np.broadcast_to(np.reshape(x, shape), expected))


@pytest.mark.parametrize("x", [np.zeros((2, 5, 3)), 1.0, np.zeros((5, 2)), np.zeros(4)])
def test_a_chunk_of_another_shape_is_refused(x: Any) -> None:
    """The error says the shape given, and both forms that fit."""
    told = rf"input 'x' has shape {list(np.shape(x))}; expected [T, 3], or [3] for a single step"
    with pytest.raises(InvalidRequest) as refused:
        lay(VECTORS, x)
    assert str(refused.value) == told
    with pytest.raises(InvalidRequest) as refused:
        copy_chunks(VECTORS, [np.stack([x, x])], 2)
    assert str(refused.value) == f"each row of {told}"


@pytest.mark.parametrize("x", [1.0, np.zeros((3, 3)), np.zeros((0, 3))])
def test_another_number_of_rows_is_refused(x: Any) -> None:
    """One is needed for each session."""
    with pytest.raises(InvalidRequest, match="expected 2 rows, one for each session"):
        copy_chunks(VECTORS, read_chunk(VECTORS, x), 2)


def test_inputs_must_agree_on_being_a_step() -> None:
    """One input with a time axis and one without make no chunk."""
    with pytest.raises(InvalidRequest, match="some inputs have a time axis"):
        lay(TWO, {"a": np.zeros(3), "b": np.zeros((1, 3))})


def test_what_the_caller_writes_later_is_not_sent() -> None:
    """A chunk may have to be sent again, when its caller has long gone on."""
    x = np.ones((2, 1, 3), np.float32)
    for chunks in (lay(VECTORS, *x), copy_chunks(VECTORS, [x], 2)):
        x[:] = 5
        assert (decode_tensor(chunks.tensors([0, 1])[0]) == 1).all()
        x[:] = 1


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 2], [0, 3], [3, 0, 1]])
def test_any_of_them_can_be_written(rows: list[int]) -> None:
    """In the order asked for, whether they lie one behind the other or not."""
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    (tensor,) = copy_chunks(VECTORS, [x], 4).tensors(rows)
    np.testing.assert_array_equal(decode_tensor(tensor), x[rows])


def test_a_chunk_takes_no_more_room_than_is_said() -> None:
    """So that messages stay within their limit, also at the largest position."""
    for of, x in [(VECTORS, np.zeros((5, 3))), (TOKENS, 4), (TWO, {"a": np.zeros((9, 3)), "b": np.zeros((9, 3))})]:
        chunks = lay(of, x)
        chunk = pb.Chunk(session_id="s" * 128, position=2**62, epoch=2**62, timeout_us=2**50)
        chunk.inputs.extend(chunks.tensors([0]))
        request = pb.StreamRequest(chunks=[chunk])
        assert request.ByteSize() <= chunks.chunk_bytes + 128


@pytest.mark.parametrize(
    ("of", "x", "size"),
    [
        (VECTORS, np.zeros((1, 3)), 1024),
        (VECTORS, np.zeros((1000, 3)), 86),
        (VECTORS, np.zeros((100_000, 3)), 1),
        (model((spec("x", "int64", "batch", "time"),), (spec("y", "float32", *SERIES),)), [1] * 20_000, 4),
        (model((spec("x", "int64", "batch", "time"),), (spec("y", "float32", "batch", "time", "any"),)), [1], 1),
    ],
)
def test_a_block_is_bounded(of: Model, x: Any, size: int) -> None:
    """By a mebibyte of inputs and of outputs, and in its chunks; of outputs of any size nothing is known."""
    assert lay(of, x, x).block_size(2**20) == size


def test_a_block_is_bounded_by_what_a_message_may_have() -> None:
    """Its outputs too, which come in one; a single chunk may go in any case."""
    chunks = lay(VECTORS, np.zeros((100, 3)))
    assert [chunks.block_size(limit) for limit in (100_000, 10_000, 100)] == [75, 7, 1]


def test_outputs_are_taken_apart() -> None:
    """One output is an array, several are a dict; a single step's has no time axis, where it would have one."""
    y, last = np.arange(6, dtype=np.float32).reshape(2, 1, 3), np.ones((2, 3), np.float32)
    tensors = [encode_tensor("y", y), encode_tensor("last", last)]
    for row in range(2):
        np.testing.assert_array_equal(Results(lay(VECTORS, y[0]), 1, tensors[:1], 2).row(row), y[row])
        np.testing.assert_array_equal(Results(lay(VECTORS, y[0, 0]), 1, tensors[:1], 2).row(row), y[row, 0])
        both = Results(lay(TWO, {"a": y[0, 0], "b": y[0, 0]}), 1, tensors, 2).row(row)
        np.testing.assert_array_equal(both["y"], y[row, 0])
        np.testing.assert_array_equal(both["last"], last[row])
    alone = Results(lay(VECTORS, y[0]), 1, [encode_tensor("y", y[1])]).row(0)
    np.testing.assert_array_equal(alone, y[1])
    assert not alone.flags.writeable


def test_outputs_are_laid_side_by_side() -> None:
    """Each of several by its name."""
    rows = [np.full((2, 3), n) for n in range(4)]
    np.testing.assert_array_equal(stack(rows), np.stack(rows))
    np.testing.assert_array_equal(stack([{"y": row, "z": -row} for row in rows])["z"], -np.stack(rows))


@pytest.mark.parametrize(
    ("y", "size"), [(np.zeros((3, 1, 3)), 2), (np.zeros((2, 2, 3)), 2), (np.zeros(()), 2), (np.zeros((2, 3)), None)]
)
def test_outputs_of_another_shape_are_a_protocol_error(y: Any, size: int | None) -> None:
    """Rather than somebody else's, or an IndexError."""
    results = Results(lay(VECTORS, np.zeros(3)), 1, [encode_tensor("y", y)], size)
    with pytest.raises(ProtocolError, match=r"output 'y' of \d chunks of 1 steps came with shape"):
        results.row(1)
    with pytest.raises(ProtocolError, match="lacks the outputs y"):
        Results(lay(VECTORS, np.zeros(3)), 1, [], size).row(0)
