"""Sessions written to a file and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.session import Reply
from service.stores.file import Saved, load, save

Array = NDArray[Any]


def session(identity: str, model: str = "lstm", last: Reply | None = None, version: int = 1) -> Saved:
    """A session with random states, one of them as wide as its model's name is long."""
    random = np.random.default_rng(len(identity))
    states: list[Array] = [random.standard_normal((2, len(model))).astype(np.float32), random.integers(0, 9, 3)]
    return Saved(b"\x00\xff", identity, model, version, "abc", 7, 2**62 + 1, 1.5, states, last)


def assert_same(one: Saved, other: Saved) -> None:
    """All fields are equal, arrays in dtype, shape and every bit."""
    for field in ("owner", "identity", "model", "version", "digest", "position", "epoch", "idle_s"):
        assert getattr(one, field) == getattr(other, field)
    assert (one.last is None) == (other.last is None)
    arrays, others = list(one.states), list(other.states)
    if one.last is not None and other.last is not None:
        assert (one.last.position, one.last.steps) == (other.last.position, other.last.steps)
        arrays, others = [*arrays, *one.last.outputs], [*others, *other.last.outputs]
    assert len(arrays) == len(others)
    for array, again in zip(arrays, others, strict=True):
        assert (array.dtype, array.shape, array.tobytes()) == (again.dtype, again.shape, again.tobytes())


def test_round_trip(tmp_path: Path) -> None:
    """Several models and versions, with and without a last reply of several lengths: all come back as they were."""
    random = np.random.default_rng(0)

    def reply(steps: int) -> Reply:
        outputs = [random.standard_normal((steps, 2)).astype(np.float32), np.ones(3, np.int64)]
        return Reply(7 - steps, steps, outputs, 8 * steps + 24)

    before = [
        session("a", last=reply(3)),
        session("bb"),
        session("ccc", last=reply(1)),
        session("d", "gru", last=reply(2)),
        session("e", "gru", version=2),
        session("a b~", "lstm"),
    ]
    assert save(tmp_path / "sessions", before) == 6
    after = {(one.model, one.version, one.identity): one for one in load(tmp_path / "sessions")}
    assert len(after) == 6
    for one in before:
        assert_same(one, after[one.model, one.version, one.identity])


def test_no_sessions_is_a_file_too(tmp_path: Path) -> None:
    """An empty table replaces an older file, whose states would be the past."""
    path = tmp_path / "sessions"
    save(path, [session("a")])
    assert save(path, []) == 0
    assert load(path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["sessions"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("empty", "it is no .npz archive, or not the whole of one"),
        ("text", "it is no .npz archive, or not the whole of one"),
        ("pickle", "it is no .npz archive, or not the whole of one"),
        ("cut", "it is no .npz archive, or not the whole of one"),
        ("other", "it is another .npz archive: it has no array 'index'"),
        ("future", "it has format 2; expected 1"),
        ("object", "it is damaged, or was not written by a server"),
        ("bit", "it is damaged, or was not written by a server"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, damage: str, says: str) -> None:
    """Anything else than what save wrote is a ValueError that names the file, and nothing in it is executed."""
    path = tmp_path / "sessions"
    save(path, [session("a", last=Reply(0, 1, [np.ones(2)], 16))])
    if damage == "text":
        path.write_text("not an archive")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(b"\x80\x04N.")
    elif damage == "bit":
        content = bytearray(path.read_bytes())
        content[content.index(b"groups")] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other":
        with path.open("wb") as file:
            np.savez(file, x=np.ones(3))
    elif damage == "future":
        text = json.dumps({"format": 2, "groups": []}).encode()
        with path.open("wb") as file:
            np.savez(file, index=np.frombuffer(text, np.uint8))
    else:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=True, index=np.array([{"format": 1}], object))
    with pytest.raises(ValueError, match="holds no sessions") as refused:
        load(path)
    assert str(refused.value) == f"{path} holds no sessions: {says}"
