"""Values that a description gives: numbers as YAML has them, and .npy files beside it.

Owns that nothing is read from outside the model's folder, no pickle is loaded, and nothing is rounded in silence. Must
not know what a value is for.
"""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
MAX_BYTES = 64 << 20


def from_yaml(value: object, dtype: str) -> Array:
    """Return a number, a bool, or nested lists of them as an array.

    Raises:
        ValueError: if it is none of these, or is not a value of that dtype; the text says what was wrong.
    """
    try:
        given = np.array(value)
    except ValueError as error:
        raise ValueError("its lists differ in length") from error
    if given.dtype.kind in {"b": "b", "i": "i", "f": "if"}[np.dtype(dtype).kind]:
        with np.errstate(over="ignore"):
            cast: Array = given.astype(dtype)
        # A real number is rounded to its float; a number that is too large for the dtype is not taken.
        if np.isfinite(cast).all() if dtype.startswith("float") else np.array_equal(cast, given):
            return cast
    raise ValueError(f"{str(value)[:64]} is given; the graph takes {dtype}")


def from_file(folder: Path, name: str, dtype: str) -> Array:
    """Read a .npy file.

    Args:
        folder: that of the model.
        name: of the file, relative to it.
        dtype: that the file must have.

    Raises:
        ValueError: if it is outside the folder, too large, no such file, or of another dtype; the text says which.
    """
    folder, relative = folder.resolve(), Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{name!r} is outside the model's folder")
    try:
        path = (folder / relative).resolve(strict=True)
        size = path.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be read") from error
    if not path.is_relative_to(folder):
        raise ValueError(f"{name!r} is a link out of the model's folder")
    if not path.is_file() or size > MAX_BYTES:
        raise ValueError(f"{name!r} is no file, or larger than {MAX_BYTES} bytes")
    try:
        # Mapped, so that a header that promises more than the file holds is found out before memory is taken.
        value = np.array(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is not a .npy file of numbers: {error}") from error
    if value.dtype.name != dtype:
        raise ValueError(f"{name!r} is {value.dtype.name}; the graph takes {dtype}")
    return value


def to_text(value: Array) -> str:
    """Return a value as a manifest holds it: base64, row-major, little-endian."""
    return base64.b64encode(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()).decode()


def from_text(text: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return what ``to_text`` wrote.

    Raises:
        ValueError: if the bytes do not fill the shape.
    """
    little = np.frombuffer(base64.b64decode(text, validate=True), np.dtype(dtype).newbyteorder("<"))
    return little.astype(dtype).reshape(shape)
