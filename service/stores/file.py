"""Sessions in a file: written when a server drains, read when the next one starts.

Owns the format: one .npz archive with a JSON index and, for each model version, one array a state with a row a session,
so that a hundred thousand sessions are a handful of arrays. Nothing in it is ever executed. Must not know the engine,
or who serves.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.session import Reply

Array = NDArray[np.generic]
_FORMAT = 1


class _NotSessions(Exception):
    """A file is something else; the text says what."""


@dataclass(frozen=True, slots=True)
class Saved:
    """All that it takes to go on with a session in another process.

    Attributes:
        owner: digest of the key that it was opened with.
        identity: its id.
        model: name of its model.
        version: of the model.
        digest: of the model's file; states go on only in the model that made them.
        position: how many steps had been applied.
        epoch: of the session.
        idle_s: seconds since it was last used.
        states: each without the batch axis.
        last: the newest reply.
    """

    owner: bytes
    identity: str
    model: str
    version: int
    digest: str
    position: int
    epoch: int
    idle_s: float
    states: Sequence[Array]
    last: Reply | None


def save(path: Path, sessions: Iterable[Saved]) -> int:
    """Write sessions; what was in the file before is replaced, all at once.

    Returns:
        How many they were.

    Raises:
        OSError: if the file cannot be written.
    """
    groups: dict[tuple[str, int, str], list[Saved]] = {}
    for session in sessions:
        groups.setdefault((session.model, session.version, session.digest), []).append(session)
    index: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    for number, ((model, version, digest), members) in enumerate(groups.items()):
        entries = []
        replies: list[list[Array]] = []
        for session in members:
            entry: dict[str, Any] = {
                "owner": session.owner.hex(),
                "id": session.identity,
                "position": session.position,
                "epoch": session.epoch,
                "idle_s": session.idle_s,
            }
            if session.last is not None:
                outputs = [np.asarray(output) for output in session.last.outputs]
                replies.append(outputs)
                shapes = [output.shape for output in outputs]
                entry["last"] = {"position": session.last.position, "steps": session.last.steps, "shapes": shapes}
            entries.append(entry)
        for state, rows in enumerate(zip(*(session.states for session in members), strict=True)):
            arrays[f"{number}.state.{state}"] = np.stack(rows)
        for output, parts in enumerate(zip(*replies, strict=True)):
            arrays[f"{number}.output.{output}"] = np.concatenate([part.ravel() for part in parts])
        states = len(members[0].states)
        index.append({"model": model, "version": version, "digest": digest, "states": states, "sessions": entries})
    text = json.dumps({"format": _FORMAT, "groups": index}).encode()
    arrays["index"] = np.frombuffer(text, np.uint8)
    partial = path.with_name(path.name + ".partial")
    # States tell what went into them: the file is its owner's alone.
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return sum(map(len, groups.values()))


def load(path: Path) -> list[Saved]:
    """Read sessions.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not one of these files.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise _NotSessions("it is no .npz archive, or not the whole of one")
        with np.load(path, allow_pickle=False) as archive:
            if "index" not in archive:
                raise _NotSessions("it is another .npz archive: it has no array 'index'")
            index = json.loads(archive["index"].tobytes())
            if index["format"] != _FORMAT:
                raise _NotSessions(f"it has format {index['format']!r}; expected {_FORMAT}")
            return [saved for number, group in enumerate(index["groups"]) for saved in _group(number, group, archive)]
    except _NotSessions as error:
        raise ValueError(f"{path} holds no sessions: {error}") from None
    except OSError:
        raise
    except (
        Exception
    ) as error:  # a damaged archive makes its readers raise whatever they meet, and say what helps nobody
        raise ValueError(f"{path} holds no sessions: it is damaged, or was not written by a server") from error


def _group(number: int, group: dict[str, Any], archive: Any) -> Iterable[Saved]:
    states = [archive[f"{number}.state.{state}"] for state in range(group["states"])]
    outputs: list[Array] = []
    ends: list[int] = []
    for row, entry in enumerate(group["sessions"]):
        reply = None
        if "last" in entry:
            shapes = entry["last"]["shapes"]
            if not outputs:
                outputs = [archive[f"{number}.output.{output}"] for output in range(len(shapes))]
                ends = [0] * len(shapes)
            parts = []
            for output, shape in enumerate(shapes):
                begin, size = ends[output], int(np.prod(shape))
                parts.append(outputs[output][begin : begin + size].reshape(shape).copy())
                ends[output] = begin + size
            reply = Reply(entry["last"]["position"], entry["last"]["steps"], parts, sum(part.nbytes for part in parts))
        yield Saved(
            owner=bytes.fromhex(entry["owner"]),
            identity=entry["id"],
            model=group["model"],
            version=group["version"],
            digest=group["digest"],
            position=entry["position"],
            epoch=entry["epoch"],
            idle_s=entry["idle_s"],
            states=[state[row] for state in states],
            last=reply,
        )
