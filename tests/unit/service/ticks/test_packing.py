"""Rows into the graph's axes and back, for every place of batch and time that a graph can have."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.manifest import TensorSpec
from service.ticks.packing import pack, unpack

Array = NDArray[np.generic]

LENGTHS = [3, 1, 4]


def spec(batch: int, time: int | None, tail: tuple[int, ...], dtype: str = "float32") -> TensorSpec:
    """A tensor with its free axes in those places."""
    sizes: list[int | None] = list(tail)
    for axis in sorted(axis for axis in (batch, time) if axis is not None):
        sizes.insert(axis, None)
    return TensorSpec.model_validate(
        {"name": "x", "dtype": dtype, "shape": sizes, "batch_axis": batch, "time_axis": time}
    )


SPECS = [
    spec(1, 0, (5,)),
    spec(0, 1, (5,)),
    spec(0, 2, (5,)),
    spec(2, 0, (5,)),
    spec(2, 1, (5,)),
    spec(1, 0, ()),
    spec(3, 1, (2, 5)),
    spec(1, 0, (), "int64"),
    # So wide that rows are copied whole.
    spec(1, 0, (300,)),
    spec(0, 1, (300,)),
    spec(1, 0, (2, 150)),
    spec(0, 2, (300,)),
]


WIDTHS = [2, 1, 3]
"""Of blocks; rows of one each are packed and unpacked another way."""


def blocks(spec: TensorSpec, lengths: list[int], widths: list[int]) -> list[Array]:
    """Blocks of those lengths and widths, no value of them zero."""
    draw = np.random.default_rng(0)
    tail = [size or 0 for size in spec.tail]
    return [
        draw.uniform(1, 100, (width, steps, *tail)).astype(spec.dtype)
        for width, steps in zip(widths, lengths, strict=True)
    ]


@pytest.mark.parametrize("given", [True, False], ids=["out", "new"])
@pytest.mark.parametrize("widths", [WIDTHS, [1, 1, 1]], ids=str)
@pytest.mark.parametrize("lengths", [[3, 1, 4], [4, 4, 4], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.shape} batch {spec.batch_axis} time {spec.time_axis}")
def test_rows_of_blocks_stand_where_the_graph_has_them(
    spec: TensorSpec, lengths: list[int], widths: list[int], given: bool
) -> None:
    """Each step of each row at its batch and time index, zeros behind its end; and back, bit for bit."""
    assert spec.time_axis is not None
    # What is given may be longer than any row of it.
    longest = max(lengths) + given
    sizes = {spec.batch_axis: sum(widths), spec.time_axis: longest}
    shape = [size or sizes[axis] for axis, size in enumerate(spec.shape)]
    # What is given holds the tick before.
    out = np.full(shape, 7, spec.dtype) if given else None
    put = blocks(spec, lengths, widths)
    packed = pack(put, lengths, spec, out)
    assert out is None or packed is out
    assert packed.shape == tuple(shape)
    assert packed.dtype == spec.dtype
    rows = [row for block in put for row in block]
    for n, row in enumerate(rows):
        for t in range(longest):
            index = tuple({spec.batch_axis: n, spec.time_axis: t}.get(axis, slice(None)) for axis in range(packed.ndim))
            np.testing.assert_array_equal(packed[index], row[t] if t < len(row) else np.zeros_like(row[0]))
    for block, back in zip(put, unpack(packed, spec, widths, lengths), strict=True):
        np.testing.assert_array_equal(back, block)
        assert back.flags.c_contiguous
        assert not np.shares_memory(back, packed)


@pytest.mark.parametrize("given", [True, False], ids=["out", "new"])
@pytest.mark.parametrize("widths", [WIDTHS, [1, 1, 1]], ids=str)
@pytest.mark.parametrize("batch", [0, 1])
def test_blocks_without_time(batch: int, widths: list[int], given: bool) -> None:
    """An input has one step a row, and an output none, whatever the lengths of the others."""
    free = spec(batch, None, (5,))
    put = blocks(free, [1, 1, 1], widths)
    out = np.full((sum(widths), 5) if batch == 0 else (5, sum(widths)), 7, np.float32) if given else None
    packed = pack(put, LENGTHS, free, out)
    assert out is None or packed is out
    np.testing.assert_array_equal(np.moveaxis(packed, batch, 0), np.concatenate(put)[:, 0])
    for block, back in zip(put, unpack(packed, free, widths, LENGTHS), strict=True):
        np.testing.assert_array_equal(back, block[:, 0])
        assert back.flags.c_contiguous
        assert not np.shares_memory(back, packed)


@pytest.mark.parametrize("lengths", [[1, 1], [2, 1]], ids=["of one length", "padded"])
@pytest.mark.parametrize("given", [True, False], ids=["out", "new"])
def test_blocks_of_different_features_are_not_stretched_over_each_other(lengths: list[int], given: bool) -> None:
    """Nor over those of the array they are to fill."""
    free = TensorSpec(name="x", dtype="float32", shape=(None, None, None), batch_axis=1, time_axis=0)
    out = np.ones((max(lengths), 4, 5), np.float32) if given else None
    for tails in ((5, 1), (1, 5), (1, 1)) if given else ((5, 1), (1, 5)):
        put = [np.ones((2, length, size), np.float32) for length, size in zip(lengths, tails, strict=True)]
        with pytest.raises(ValueError, match=r"differ in their features|must match exactly|wrong shape"):
            pack(put, lengths, free, out)
