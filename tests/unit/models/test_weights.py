"""A digest tells any two sets of weights apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from models.weights import Weights, digest

WEIGHTS = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(2)}


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: {"a": a, "c": b},
        lambda a, b: {"a": a},
        lambda a, b: {"a": a.reshape(3, 2), "b": b},
        lambda a, b: {"a": a.astype(np.float32), "b": b},
        lambda a, b: {"a": a[:, ::-1], "b": b},
        lambda a, b: {"a": np.nextafter(a, 9), "b": b},
        lambda a, b: {"a": a, "b": -b},
    ],
    ids=["name", "fewer", "shape", "dtype", "order", "one bit", "sign of zero"],
)
def test_a_digest_changes_with(change: Callable[..., Weights]) -> None:
    """Names, shapes, dtypes and every bit count."""
    assert digest(change(**WEIGHTS)) != digest(WEIGHTS)


def test_a_digest_stays() -> None:
    """The order in which weights come, how they lie in memory and the machine's byte order do not count."""
    a, b = WEIGHTS["a"], WEIGHTS["b"]
    assert digest({"b": b, "a": np.asfortranarray(a)}) == digest(WEIGHTS)
    assert digest({"b": b, "a": a.astype(">f8")}) == digest(WEIGHTS)
    assert digest({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
