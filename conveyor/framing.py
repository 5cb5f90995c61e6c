"""A signal cut into overlapping frames: the steps of models that hear many samples at once. Must not know the wire.

Frame k holds the samples from k * hop - context up to, not including, k * hop + size. Samples before the signal's first
are zeros. So is what the last frame lacks, where it is padded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]


def frames(signal: ArrayLike, size: int, hop: int, context: int = 0, pad: bool = True) -> Array:
    """Cuts a whole signal into frames.

    Args:
        signal: samples ``[S, ...]``, with further axes for channels, say.
        size: new samples of a frame.
        hop: samples from the start of one frame to that of the next, at most ``size``.
        context: samples before them that a frame also holds.
        pad: whether samples at the end that do not fill a frame get one, filled up with zeros; else they are left out.

    Returns:
        Frames ``[steps, context + size, ...]`` of the signal's dtype: with ``pad`` as few as hold every sample, and of
        an empty signal none.

    Raises:
        ValueError: a number that is out of range, or a signal without an axis.
    """
    cutter = Frames(size, hop, context)
    return np.concatenate([cutter.push(signal), cutter.end(pad)])


class Frames:
    """Cuts a signal that comes in pieces: together the frames that ``frames`` cuts from the whole, bit for bit.

    Between calls it holds less than ``context + size`` samples.

    Args:
        size: new samples of a frame.
        hop: samples from the start of one frame to that of the next, at most ``size``.
        context: samples before them that a frame also holds.

    Raises:
        ValueError: a number that is out of range.
    """

    def __init__(self, size: int, hop: int, context: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; expected at least 1")
        if not 1 <= hop <= size:
            raise ValueError(f"hop is {hop}; expected 1 to {size}, the size: beyond it samples would be in no frame")
        if context < 0:
            raise ValueError(f"context is {context}; expected at least 0")
        self._hop = hop
        self._context = context
        self._width = context + size
        self._held: Array | None = None
        # How many of those held were in a frame already, or stand for what was before the start.
        self._framed = context

    def push(self, samples: ArrayLike) -> Array:
        """Takes the next samples; returns the frames that are complete by now.

        Args:
            samples: ``[S, ...]``, any number of them, with the dtype and the further axes of those before.

        Returns:
            Frames ``[steps, context + size, ...]``; often none.

        Raises:
            ValueError: samples that do not go on from those before; they are not taken.
        """
        samples = np.asarray(samples)
        if samples.ndim == 0:
            raise ValueError("samples are a single number; expected an array [S, ...]")
        if self._held is None:
            self._held = np.zeros((self._context, *samples.shape[1:]), samples.dtype)
        before = self._held
        if (samples.dtype, samples.shape[1:]) != (before.dtype, before.shape[1:]):
            raise ValueError(
                f"samples are {samples.dtype} with axes {samples.shape[1:]} after the first; "
                f"those before were {before.dtype} with {before.shape[1:]}"
            )
        held = np.concatenate([before, samples])
        steps = max(0, (len(held) - self._width) // self._hop + 1)
        starts = self._hop * np.arange(steps)
        if steps:
            self._framed = self._width - self._hop
        # A copy: a slice would keep all of it.
        self._held = held[steps * self._hop :].copy()
        return np.asarray(held[starts[:, None] + np.arange(self._width)])

    def end(self, pad: bool = True) -> Array:
        """Ends the signal; what is pushed after it begins another.

        Args:
            pad: whether samples that are in no frame yet get one, filled up with zeros.

        Returns:
            Frames ``[steps, context + size, ...]``: one or none.
        """
        held = np.zeros(self._context, np.float32) if self._held is None else self._held
        left_over = len(held) > self._framed
        self._held, self._framed = None, self._context
        last = np.zeros((int(pad and left_over), self._width, *held.shape[1:]), held.dtype)
        last[:, : len(held)] = held
        return last
