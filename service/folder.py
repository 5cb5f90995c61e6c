"""The repository's folder as it stands on the disk: models, their versions, and what tells one state from another.

Owns names, signatures of files, and which versions a model asks to have served. Must not know what is served. Called
off the event loop: a disk may take long.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from service import description
from service.errors import LoadError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_MOST_FILES = 10_000
"""More than a model consists of: a folder that holds something else must not hold up the rest."""

Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""The path, size, time of change and inode of each file that a model version consists of."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model version in the folder.

    Attributes:
        name: of the model.
        version: of it.
        path: the model file.
        signature: another one when any of its files changes.
    """

    name: str
    version: int
    path: Path
    signature: Signature = ()


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
        names = sorted(name for name in os.listdir(folder) if _NAME.fullmatch(name) and (folder / name).is_dir())
    except OSError as error:
        raise LoadError(f"the repository {folder} cannot be read: {error.strerror}") from error
    models = {name: _model(folder / name) for name in names}
    return {name: model for name, model in models.items() if model.versions or model.trouble}


def wanted(model: ModelFolder, latest: int) -> tuple[Sequence[Found], int]:
    """Tell which versions are to be served.

    Args:
        model: as it was found.
        latest: how many versions, the newest, where the model itself does not say.

    Returns:
        The versions that may be served, newest first, and how many of them: the first that load.

    Raises:
        LoadError: if model.yaml is there and not valid.
    """
    described = description.read(model.path)
    policy = description.Versions(latest=latest) if described is None or not described.versions else described.versions
    if policy.latest is not None:
        return model.versions, policy.latest
    listed = [found for found in model.versions if found.version in policy.listed]
    return listed, len(listed)


def _model(path: Path) -> ModelFolder:
    try:
        versions = sorted(
            (
                int(name)
                for name in os.listdir(path)
                if _VERSION.fullmatch(name) and (path / name / "model.onnx").is_file()
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
    except OSError as error:
        return ModelFolder(path, trouble=f"the model's folder cannot be read: {error.strerror}")


def _files(folder: Path, apart: re.Pattern[str] | None = None) -> Iterator[tuple[str, int, int, int]]:
    """Go through the files in a folder and those below it, but for hidden ones: those are on their way to be others."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or (apart is not None and apart.fullmatch(entry.name)):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            # Gone meanwhile, or a link to nothing.
            yield entry.path, -1, -1, -1
        else:
            yield entry.path, status.st_size, status.st_mtime_ns, status.st_ino
