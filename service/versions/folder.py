"""The repository's folder as it stands on the disk: models, their versions, and what tells one state from another.

Owns names, signatures of files, and which versions a model asks to have served. Must not know what is served. Called
off the event loop: a disk may take long.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from service.errors import LoadError
from service.graphs import description
from service.graphs.description import Description
from service.versions import tuning_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_MOST_FILES = 10_000
"""More than a model consists of: a folder that holds something else must not hold up the rest."""

File: TypeAlias = tuple[str, int, int, int, int]
"""A file's path, size, times of change, of its content and of its inode, and inode; -1 for what cannot be read."""
Signature: TypeAlias = tuple[File, ...]
"""The files that a model version consists of."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model version in the folder.

    Attributes:
        name: of the model.
        version: of it.
        path: the model file.
        signature: another one when any of its files changes.
        described: what model.yaml says, once it was read.
    """

    name: str
    version: int
    path: Path
    signature: Signature = ()
    described: Description | None = None

    @property
    def content(self) -> tuple[Signature, Description]:
        """What makes the model: its files, and of model.yaml all but the versions that it wants."""
        yaml = str(self.path.parent.parent / description.NAME)
        files = tuple(file for file in self.signature if file[0] != yaml)
        return files, (self.described or Description()).model_copy(update={"versions": None})


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in the folder; equal to itself as long as no file of it changes.

    Attributes:
        path: its own folder.
        versions: newest first.
        trouble: why it cannot be read; empty where it can.
    """

    path: Path
    versions: tuple[Found, ...] = ()
    trouble: str = ""


def scan(folder: Path) -> dict[str, ModelFolder]:
    """List the models by name, in alphabetical order.

    Raises:
        LoadError: if the folder cannot be read.
    """
    try:
        if not folder.is_dir():
            raise LoadError(f"the repository {folder} is not a folder; expected DIR/NAME/VERSION/model.onnx")
        names = sorted(name for name in os.listdir(folder) if _NAME.fullmatch(name) and os.path.isdir(folder / name))
    except OSError as error:
        raise LoadError(f"the repository {folder} cannot be read: {error.strerror}") from error
    models = {name: _model(folder / name) for name in names}
    return {name: model for name, model in models.items() if model.versions or model.trouble}


def overlooked(folder: Path) -> list[str]:
    """Say of each folder that looks like a model or a version why it is none."""
    said = []
    for path in _folders(folder):
        name = path.name
        if not _NAME.fullmatch(name):
            said.append(f"{name!r} is no name of a model; expected letters, digits, '.', '_' and '-'")
            continue
        versions = [version for version in _folders(path) if _VERSION.fullmatch(version.name)]
        if not versions:
            said.append(f"{name} has no version folder (found {_content(path)}; expected a positive integer)")
        said += [
            f"{name}/{version.name} has no model.onnx (found {_content(version)})"
            for version in versions
            if not os.path.isfile(version / "model.onnx")
        ]
    return said


def wanted(model: ModelFolder, latest: int) -> tuple[Sequence[Found], int, Sequence[int]]:
    """Tell which versions are to be served.

    Args:
        model: as it was found.
        latest: how many versions, the newest, where the model itself does not say.

    Returns:
        The versions that may be served, newest first, with what describes them; how many of them: the first that load;
        and the numbers that model.yaml lists although there are no such versions.

    Raises:
        LoadError: if model.yaml is there and not valid.
    """
    described = description.read(model.path)
    found = [replace(one, described=described) for one in model.versions]
    policy = description.Versions(latest=latest) if described is None or not described.versions else described.versions
    if policy.latest is not None:
        return found, policy.latest, ()
    listed = [one for one in found if one.version in policy.listed]
    return listed, len(listed), sorted({*policy.listed} - {one.version for one in listed})


def look_again(found: Found) -> Found | None:
    """Look at a version once more, with what describes it; None if it is not there.

    Raises:
        LoadError: if it cannot be read.
    """
    model = _model(found.path.parent.parent)
    if model.trouble:
        raise LoadError(model.trouble)
    described = description.read(model.path)
    return next((replace(one, described=described) for one in model.versions if one.version == found.version), None)


def _model(path: Path) -> ModelFolder:
    try:
        versions = sorted(
            (
                int(name)
                for name in os.listdir(path)
                if _VERSION.fullmatch(name) and os.path.isfile(path / name / "model.onnx")
            ),
            reverse=True,
        )
        # What stands beside the versions, model.yaml and what it names, belongs to each.
        common = tuple(islice(_files(path, apart=_VERSION), _MOST_FILES))
        return ModelFolder(
            path,
            tuple(
                Found(
                    path.name,
                    version,
                    path / str(version) / "model.onnx",
                    (*islice(_files(path / str(version)), _MOST_FILES), *common),
                )
                for version in versions
            ),
        )
    except Exception as error:  # whatever it is, it is this model's alone
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        return ModelFolder(path, trouble=f"the model's folder cannot be read: {reason}")


def _files(folder: Path, apart: re.Pattern[str] | None = None) -> Iterator[File]:
    """Go through the files in a folder and those below it.

    Hidden ones are on their way to be others, and what the server has measured is none of the model's.
    """
    entries = _entries(folder)
    entries = [entry for entry in entries if apart is None or not apart.fullmatch(entry.name)]
    # Not by recursion: folders can be deeper than Python's stack.
    while entries:
        entry = entries.pop()
        try:
            if entry.is_dir(follow_symlinks=False):
                entries += _entries(entry)
                continue
            status = entry.stat()
        except OSError:
            # Gone meanwhile, a link to nothing or to itself, a folder that nobody may read.
            yield entry.path, -1, -1, -1, -1
        else:
            yield entry.path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        of_model = (one for one in entries if not one.name.startswith(".") and one.name != tuning_file.NAME)
        return sorted(of_model, key=lambda one: one.name, reverse=True)


def _folders(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in reversed(_entries(folder)) if entry.is_dir()]
    except OSError:
        return []


def _content(folder: Path) -> str:
    """The first few names in a folder, for people."""
    try:
        names = [entry.name for entry in reversed(_entries(folder))]
    except OSError as error:
        return str(error.strerror)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
