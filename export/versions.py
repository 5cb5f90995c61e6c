"""Model versions on disk: ``DIR/NAME/VERSION/model.onnx``, each there as a whole or not at all.

Owns the layout and the order of writing. Must not know what is in a file.

A new version is written beside its place under a name that starts with a dot, flushed to the disk, and then renamed, so
that whoever watches the folder never sees half of one. A file that is replaced is replaced in one step likewise.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from export.errors import ExportError

FILE = "model.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def choose_version(repository: Path, name: str, version: int | None, overwrite: bool) -> int:
    """The version to write: the one asked for, or the one after the last.

    Raises:
        ExportError: the name or the version cannot be one, or the version is there and may not be overwritten.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"model name {name!r}: expected letters, digits, '.', '_' and '-', a letter or digit first")
    if version is not None and version < 1:
        raise ExportError(f"version {version}: expected a positive integer")
    folder = repository / name
    if version is None:
        there = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
        return max(there, default=0) + 1
    if (folder / str(version)).exists() and not overwrite:
        raise ExportError(f"{folder / str(version)} is there already: choose another version, or overwrite it")
    return version


def write_version(repository: Path, name: str, version: int, content: bytes, overwrite: bool) -> Path:
    """Write a model file to its version's folder.

    Returns:
        The file's path.

    Raises:
        ExportError: the version is there and may not be overwritten.
    """
    choose_version(repository, name, version, overwrite)
    target = repository / name / str(version)
    if target.exists():
        return write_file(target / FILE, content)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_name(f".{version}.{secrets.token_hex(4)}")
    try:
        whole.mkdir()
        _write_durably(whole / FILE, content)
        _flush_folder(whole)
        try:
            whole.rename(target)
        except OSError as error:
            raise ExportError(f"{target} has appeared meanwhile; nothing was written") from error
        _flush_folder(target.parent)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    return target / FILE


def write_file(path: Path, content: bytes) -> Path:
    """Write or replace one file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _write_durably(whole, content)
        whole.replace(path)
        _flush_folder(path.parent)
    finally:
        whole.unlink(missing_ok=True)
    return path


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
