"""A session's state in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conveyor import SessionState
from conveyor.state import decode_state, encode_state

STATE = SessionState(
    "speech",
    3,
    40,
    {"h": np.arange(6, dtype=np.float16).reshape(2, 3), "file": np.array([1.5, -0.0], np.float32)},
    "0a1b",
)


def _equal(a: SessionState, b: SessionState) -> bool:
    same = (a.model, a.version, a.position, a.digest) == (b.model, b.version, b.position, b.digest)
    return (same and list(a.states) == list(b.states)) and all(
        a.states[name].dtype == b.states[name].dtype and a.states[name].tobytes() == b.states[name].tobytes()
        for name in a.states
    )


def test_a_state_survives_a_file(tmp_path: Path) -> None:
    """Saved and loaded it is the same, under exactly the name given, whatever its states are called."""
    STATE.save(tmp_path / "state")
    assert _equal(SessionState.load(tmp_path / "state"), STATE)


def test_a_file_without_a_digest(tmp_path: Path) -> None:
    """Written before there was one, it is read as before."""
    arrays: dict[str, Any] = {f"state.{name}": array for name, array in STATE.states.items()}
    np.savez(tmp_path / "old.npz", model=STATE.model, version=STATE.version, position=STATE.position, **arrays)
    assert _equal(SessionState.load(tmp_path / "old.npz"), replace(STATE, digest=""))


def test_a_state_survives_the_wire() -> None:
    """Model, version, position, digest, names, dtypes and bits."""
    assert _equal(decode_state(encode_state(STATE)), STATE)


class Malice:
    """Unpickled, leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.trace,))


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    """A file with objects in it is refused, and nothing in it runs."""
    trace = tmp_path / "trace"
    arrays: dict[str, Any] = {"state.h": np.array(Malice(trace), object)}
    np.savez(tmp_path / "bad.npz", model="m", version=1, position=0, **arrays)
    with pytest.raises(ValueError, match="is not the state of a session"):
        SessionState.load(tmp_path / "bad.npz")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"\x93NUMPY\x01\x00", b"\x80\x04N."])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """With one kind of error, naming the file and not what NumPy takes it for."""
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"other' is not the state of a session: expected a file that SessionState.save"
    ):
        SessionState.load(tmp_path / "other")


def test_a_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    """As ``open`` tells it."""
    with pytest.raises(FileNotFoundError):
        SessionState.load(tmp_path / "nothing")


def test_a_plain_array_file_is_refused(tmp_path: Path) -> None:
    """Also one that NumPy itself reads."""
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="is not the state of a session"):
        SessionState.load(tmp_path / "array.npy")
