"""Model versions on disk: ``DIR/NAME/VERSION/model.onnx``, each there as a whole or not at all.

A version may hold its model in other precisions too, as ``model.int8.onnx`` beside it, and in the form that CUDA runs,
as ``model.cuda.onnx``.

Owns the layout and the order of writing. Must not know what is in a file.

A new version is written beside its place under a name that starts with a dot, flushed to the disk, and then renamed, so
that whoever watches the folder never sees half of one. A file that is replaced is replaced in one step likewise, and
one after the other where they are several.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from export.errors import ExportError
from service.errors import LoadError
from service.graphs.description import NAME as DESCRIPTION
from service.graphs.description import read
from service.manifest import Precision

FILE = "model.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Beside: TypeAlias = Precision | Literal["cuda"]
"""What a file beside the model's own is for: another precision, or CUDA."""
_BESIDE: tuple[Beside, ...] = (*get_args(Precision), "cuda")
_NO_OTHERS: Mapping[Beside, bytes] = MappingProxyType({})
_FOR_CUDA = ".cuda.onnx"


def file_beside(path: Path, what: Beside) -> Path:
    """The file beside a model's own: ``model.int8.onnx``, ``model.cuda.onnx``."""
    return path.with_name(f"{path.stem}.{what}.onnx")


def file_for_cpu(path: Path) -> Path | None:
    """The model's own file beside the one for CUDA; None where this is none for CUDA."""
    name = path.name
    return path.with_name(f"{name.removesuffix(_FOR_CUDA)}.onnx") if name.endswith(_FOR_CUDA) else None


def choose_version(repository: Path, name: str, version: int | None, overwrite: bool) -> int:
    """The version to write: the one asked for, or the one after the last.

    Raises:
        ExportError: the name or the version cannot be one, the version is there and may not be overwritten, its
            place cannot be written to, or the server would refuse what stands there for the model.yaml beside it.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"model name {name!r}: expected letters, digits, '.', '_' and '-', a letter or digit first")
    if version is not None and version < 1:
        raise ExportError(f"version {version}: expected a positive integer")
    folder = repository / name
    with _told(folder):
        if version is None:
            there = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
            version = max(there, default=0) + 1
        target = folder / str(version)
        if target.exists() and not overwrite:
            raise ExportError(f"{target} is there already: choose another version, or --overwrite it")
        _check_writable(target)
    _check_description(folder)
    return version


def check_file(path: Path, overwrite: bool) -> None:
    """See whether one file can be written, and one for CUDA beside it.

    Raises:
        ExportError: one is there and may not be overwritten, its place cannot be written to, the name is that of the
            one for CUDA, or does not end in .onnx.
    """
    if (own := file_for_cpu(path)) is not None:
        raise ExportError(
            f"{path.name} would be taken for what CUDA runs of {own.name}: choose another name; where CUDA takes "
            f"another form, that is written beside {own.name}"
        )
    _check_file(path, overwrite)
    if path.suffix != ".onnx":
        raise ExportError(f"{path} does not end in .onnx; expected FILE.onnx")
    _check_file(file_beside(path, "cuda"), overwrite)


def write_version(
    repository: Path,
    name: str,
    version: int,
    content: bytes,
    overwrite: bool,
    others: Mapping[Beside, bytes] = _NO_OTHERS,
) -> Path:
    """Write a model's files to its version's folder.

    Args:
        repository: the folder of models.
        name: the model's name.
        version: of it.
        content: of its model.onnx.
        overwrite: whether a version that is there may be replaced. What else it has of the model is, or else it goes.
        others: the same model in other precisions, and for CUDA.

    Returns:
        The path of model.onnx.

    Raises:
        ExportError: the version is there and may not be overwritten, or cannot be written; nothing is left of it.
    """
    choose_version(repository, name, version, overwrite)
    target = repository / name / str(version)
    if target.exists():
        return write_files(target / FILE, content, others, _BESIDE)
    files = {file_beside(Path(FILE), what).name: other for what, other in others.items()} | {FILE: content}
    whole = target.with_name(f".{version}.{secrets.token_hex(4)}")
    with _told(target), _made(target.parent):
        try:
            whole.mkdir()
            for file, each in files.items():
                _write_durably(whole / file, each)
            _flush_folder(whole)
            try:
                whole.rename(target)
            except OSError as error:
                if not target.exists():
                    raise
                raise ExportError(f"{target} has appeared meanwhile; nothing was written") from error
            _flush_folder(target.parent)
        finally:
            shutil.rmtree(whole, ignore_errors=True)
    return target / FILE


def write_files(
    path: Path, content: bytes, others: Mapping[Beside, bytes], replaced: Iterable[Beside] = ("cuda",)
) -> Path:
    """Write or replace a model's own file and those beside it, each in one step.

    Args:
        path: of the model's own file.
        content: of it.
        others: what lies beside it.
        replaced: what of an earlier model goes where it is not among the others.

    Raises:
        ExportError: they cannot be written.
    """
    for what, other in others.items():
        write_file(file_beside(path, what), other)
    write_file(path, content)
    with _told(path):
        for what in replaced:
            beside = file_beside(path, what)
            if what not in others:
                beside.unlink(missing_ok=True)
            if what != "cuda":
                # The form for CUDA of another precision is written by itself, and is of the model before.
                file_beside(beside, "cuda").unlink(missing_ok=True)
    return path


def write_file(path: Path, content: bytes) -> Path:
    """Write or replace one file in one step.

    Raises:
        ExportError: it cannot be written; nothing is left of it.
    """
    whole = path.with_name(f".{secrets.token_hex(4)}.part")
    with _told(path), _made(path.parent):
        try:
            _write_durably(whole, content)
            whole.replace(path)
            _flush_folder(path.parent)
        finally:
            whole.unlink(missing_ok=True)
    return path


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say what the system refused, and where."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder to write into; if the writing fails, those that were made for it go again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # somebody else has put something there, and it stays
                each.rmdir()
        raise


def _check_description(folder: Path) -> None:
    """See that no model.yaml describes a graph: of what is exported here the file itself says all."""
    try:
        description = read(folder)
    except LoadError as error:
        raise ExportError(f"{folder / DESCRIPTION}: the server would refuse every version: {error}") from error
    if description is not None and description.of_graph:
        raise ExportError(
            f"{folder / DESCRIPTION} describes a graph, and the server would refuse one that was exported here: choose "
            "another name, or take its inputs, states, outputs and streamable out"
        )


def _check_file(path: Path, overwrite: bool) -> None:
    with _told(path):
        if path.is_dir():
            raise ExportError(f"{path} is a folder, expected a file")
        if path.exists() and not overwrite:
            raise ExportError(f"{path} is there already: choose another file, or --overwrite it")
        _check_writable(path.parent)


def _check_writable(folder: Path) -> None:
    """See whether a folder, or the nearest that is there above it, takes files: before anything is made."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ExportError(f"{there} is a file, expected a folder")
    tempfile.TemporaryFile(dir=there).close()


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
