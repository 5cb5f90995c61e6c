"""UCI's handwritten digits as sequences: an image is 8 steps of 8 values, its rows from the top.

Owns the data and its split. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository, 1998; the 1797 images that scikit-learn carries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

ROWS = 8
"""Rows of an image, so steps of a sequence."""
VALUES = 8
"""Values of a row, so the model's input size."""
CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 8, 8]``, float32 in [0, 1], and the digits they show ``[N]``."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def load() -> tuple[Digits, Digits]:
    """Gives the images to train on and the 540 held out: the same ones each time, each digit with its share in both."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, ROWS, VALUES) / 16).astype(np.float32)
    parts = train_test_split(images, labels.astype(np.int64), test_size=0.3, stratify=labels, random_state=0)
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])
