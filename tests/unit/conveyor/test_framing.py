"""Frames of a signal: which samples each holds, and that they are the same however the signal comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor import Frames, frames


def test_frames_with_context() -> None:
    """Frame k begins ``context`` samples before k * hop; zeros stand before the start and after the end."""
    assert frames(np.arange(1, 8), size=3, hop=3, context=2).tolist() == [
        [0, 0, 1, 2, 3],
        [2, 3, 4, 5, 6],
        [5, 6, 7, 0, 0],
    ]


def test_overlapping_frames() -> None:
    """With a hop below the size new samples overlap too; without padding what does not fill a frame is left out."""
    signal = np.arange(1, 8)
    assert frames(signal, size=4, hop=2).tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert frames(signal, size=4, hop=2, pad=False).tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert frames(signal[:6], size=4, hop=2).tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]


@given(
    st.data(),
    st.integers(0, 60),
    st.integers(1, 12),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([(), (2,)]),
)
def test_any_cutting_of_a_signal_gives_the_same_frames(
    data: st.DataObject, length: int, size: int, context: int, pad: bool, channels: tuple[int, ...]
) -> None:
    """Whole or in pieces, each frame k holds the samples k * hop - context to k * hop + size, and none is forgotten."""
    hop = data.draw(st.integers(1, size))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    signal = np.random.default_rng(0).normal(size=(length, *channels)).astype(np.float32)
    cutter = Frames(size, hop, context)
    pieces = [cutter.push(piece) for piece in np.split(signal, cuts)]
    cut = np.concatenate([*pieces, cutter.end(pad)])
    whole = frames(signal, size, hop, context, pad)
    assert cut.dtype == whole.dtype == signal.dtype
    assert np.array_equal(cut, whole)

    def sample(at: int) -> Any:
        return signal[at] if 0 <= at < length else np.zeros(channels)

    for k, frame in enumerate(whole):
        assert np.array_equal(frame, [sample(at) for at in range(k * hop - context, k * hop + size)])
    framed = (len(whole) - 1) * hop + size if len(whole) else 0
    assert framed >= length if pad else framed <= length < len(whole) * hop + size
    if pad and len(whole) > 1:
        assert framed - hop < length, "the last frame holds a sample that the one before it does not"


def test_a_signal_after_the_end_is_another() -> None:
    """Nothing of the first signal is in the frames of the second, which may have another dtype."""
    cutter = Frames(size=2, hop=2, context=1)
    cutter.push(np.ones(3))
    cutter.end()
    assert cutter.push(np.array([5, 6], np.int16)).tolist() == [[0, 5, 6]]


def test_nothing_pushed() -> None:
    """An empty signal has no frames, padded or not."""
    assert Frames(size=4, hop=4).end().shape == (0, 4)
    assert frames([], size=4, hop=4, context=1).shape == (0, 5)


def test_a_stream_holds_little() -> None:
    """However much was pushed, what is kept is less than one frame."""
    cutter = Frames(size=512, hop=160, context=64)
    for _ in range(20):
        cutter.push(np.zeros(10_000, np.float32))
    assert cutter._held is not None
    assert cutter._held.base is None
    assert len(cutter._held) < 64 + 512


@pytest.mark.parametrize(
    ("size", "hop", "context", "says"),
    [
        (0, 1, 0, "size is 0; expected at least 1"),
        (4, 0, 0, "hop is 0; expected 1 to 4"),
        (4, 5, 0, "hop is 5; expected 1 to 4"),
        (4, 4, -1, "context is -1; expected at least 0"),
    ],
)
def test_numbers_out_of_range(size: int, hop: int, context: int, says: str) -> None:
    """Each is named with what was expected."""
    with pytest.raises(ValueError, match=says):
        Frames(size, hop, context)


def test_samples_that_do_not_go_on() -> None:
    """Another dtype or other channels are refused, and the signal can go on as it was."""
    cutter = Frames(size=2, hop=2)
    cutter.push(np.ones(1, np.float32))
    for wrong in (np.ones(3), np.ones((3, 2), np.float32), np.float32(1)):
        with pytest.raises(ValueError, match="samples are"):
            cutter.push(wrong)
    assert cutter.push(np.ones(1, np.float32)).tolist() == [[1, 1]]
