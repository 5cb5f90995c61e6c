"""Values from YAML and from .npy files: what is taken, and that nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from service.values import from_file, from_text, from_yaml, to_text


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [
        (16000, "int64", ()),
        (16000, "float32", ()),
        (0.1, "float16", ()),
        (True, "bool", ()),
        ([[1, 2], [3, 4]], "int8", (2, 2)),
        ([0.5, 1], "float64", (2,)),
    ],
)
def test_numbers(value: object, dtype: str, shape: tuple[int, ...]) -> None:
    """In the dtype of the graph, there and back through a manifest's text."""
    array = from_yaml(value, dtype)
    assert (array.dtype.name, array.shape) == (dtype, shape)
    np.testing.assert_array_equal(array, np.asarray(value, dtype))
    np.testing.assert_array_equal(from_text(to_text(array), dtype, shape), array)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, "int64"),
        (1, "bool"),
        (True, "int32"),
        (300, "int8"),
        (2**40, "int32"),
        (2**70, "int64"),
        (1e6, "float16"),
        (float("nan"), "float32"),
        ("16000", "int64"),
        (None, "float32"),
        ({"a": 1}, "float32"),
        ([1, [2]], "float32"),
    ],
)
def test_what_is_not_a_value_of_the_dtype(value: object, dtype: str) -> None:
    """Nothing is rounded, cut or parsed to make it fit."""
    with pytest.raises(ValueError, match=r"the graph takes|differ in length"):
        from_yaml(value, dtype)


def test_a_file(tmp_path: Path) -> None:
    """With its dtype and shape, also where it lies in a folder below, or is big-endian."""
    (tmp_path / "sub").mkdir()
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "sub/h.npy", value)
    np.testing.assert_array_equal(from_file(tmp_path, "sub/h.npy", "float32"), value)
    np.save(tmp_path / "b.npy", value.astype(">f4"))
    np.testing.assert_array_equal(from_text(to_text(from_file(tmp_path, "b.npy", "float32")), "float32", (2, 3)), value)


def spoil(folder: Path) -> dict[str, tuple[str, str]]:
    """Files that must not be read: the name of each, and what is said of it."""
    np.save(folder.parent / "outside.npy", np.zeros(2, np.float32))
    os.symlink(folder.parent / "outside.npy", folder / "link.npy")
    np.save(folder / "wrong.npy", np.zeros(2))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    (folder / "text.npy").write_text("hello")
    (folder / "folder.npy").mkdir()
    np.savez(folder / "many.npz", a=np.zeros(2))
    whole = (folder / "wrong.npy").read_bytes()
    (folder / "short.npy").write_bytes(whole[:-1])
    (folder / "greedy.npy").write_bytes(whole.replace(b"(2,), }", b"(9999999999999,), }"))
    with (folder / "large.npy").open("wb") as file:
        file.truncate((64 << 20) + 1)
    return {
        "absolute": (str(folder / "wrong.npy"), "outside the model's folder"),
        "upward": ("../outside.npy", "outside the model's folder"),
        "link": ("link.npy", "a link out of the model's folder"),
        "missing": ("nothing.npy", "cannot be read"),
        "dtype": ("wrong.npy", "is float64; the graph takes float32"),
        "pickle": ("objects.npy", "not a .npy file of numbers"),
        "text": ("text.npy", "not a .npy file of numbers"),
        "folder": ("folder.npy", "is no file"),
        "archive": ("many.npz", "not a .npy file of numbers"),
        "short": ("short.npy", "not a .npy file of numbers"),
        "greedy": ("greedy.npy", "not a .npy file of numbers"),
        "large": ("large.npy", "larger than"),
        "nul": ("a\0b", "cannot be read"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "absolute", "upward", "link", "missing", "dtype", "pickle", "text", "folder", "archive", "short", "greedy",
        "large", "nul",
    ],
)  # fmt: skip
def test_files_that_are_not_read(tmp_path: Path, what: str) -> None:
    """Nothing from outside the folder, no pickles, nothing that is not whole."""
    folder = tmp_path / "model"
    folder.mkdir()
    name, says = spoil(folder)[what]
    with pytest.raises(ValueError, match=says):
        from_file(folder, name, "float32")
