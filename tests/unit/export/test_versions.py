"""Model versions appear as a whole or not at all, and none is replaced unasked."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from export.errors import ExportError
from export.versions import (
    Beside,
    check_file,
    choose_version,
    file_beside,
    file_for_cpu,
    write_file,
    write_files,
    write_version,
)


def everything(folder: Path) -> list[str]:
    """All files and folders below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_layout(tmp_path: Path) -> None:
    """A version is one file in its folder, and nothing is left beside it."""
    path = write_version(tmp_path, "digits", 3, b"model", overwrite=False)
    assert path == tmp_path / "digits" / "3" / "model.onnx"
    assert path.read_bytes() == b"model"
    assert everything(tmp_path) == ["digits", "digits/3", "digits/3/model.onnx"]


def test_other_precisions_lie_beside_the_first(tmp_path: Path) -> None:
    """A version that is replaced is replaced with them: one that is not given again goes, and other files stay."""
    write_version(tmp_path, "digits", 1, b"a", False, {"int8": b"b", "float16": b"c"})
    folder = tmp_path / "digits/1"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "model.onnx": b"a",
        "model.int8.onnx": b"b",
        "model.float16.onnx": b"c",
    }
    (folder / "tuning.json").touch()
    write_version(tmp_path, "digits", 1, b"d", True, {"int8": b"e"})
    assert everything(folder) == ["model.int8.onnx", "model.onnx", "tuning.json"]
    assert (folder / "model.int8.onnx").read_bytes() == b"e"
    assert everything(tmp_path) == ["digits", "digits/1", *(f"digits/1/{name}" for name in everything(folder))]


def test_a_file_for_cuda_goes_with_its_model(tmp_path: Path) -> None:
    """In a version, and beside a single file, it is replaced with the model, and goes where there is none any more."""
    path = write_version(tmp_path, "digits", 1, b"a", False, {"cuda": b"b", "int8": b"c"})
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {
        "model.onnx": b"a",
        "model.cuda.onnx": b"b",
        "model.int8.onnx": b"c",
    }
    write_version(tmp_path, "digits", 1, b"d", True, {"cuda": b"e"})
    assert everything(path.parent) == ["model.cuda.onnx", "model.onnx"]
    assert path.with_name("model.cuda.onnx").read_bytes() == b"e"
    write_version(tmp_path, "digits", 1, b"f", True)
    assert everything(path.parent) == ["model.onnx"]

    alone = tmp_path / "alone" / "out.onnx"
    write_files(alone, b"a", {"cuda": b"b"})
    alone.with_name("out.int8.onnx").touch()  # somebody's own, of which no more was asked than that it is there
    write_files(alone, b"c", {})
    assert everything(alone.parent) == ["out.int8.onnx", "out.onnx"]


def test_what_cuda_ran_of_a_precision_before_goes(tmp_path: Path) -> None:
    """A version that is replaced has none of the model before, whether that precision is given again or not."""
    path = write_version(tmp_path, "digits", 1, b"a", False, {"float16": b"b"})
    others: tuple[Mapping[Beside, bytes], ...] = ({"float16": b"c"}, {})
    for again in others:
        write_file(path.with_name("model.float16.cuda.onnx"), b"d")
        write_version(tmp_path, "digits", 1, b"e", True, again)
        assert not path.with_name("model.float16.cuda.onnx").exists()


def test_a_name_that_is_the_one_for_cuda(tmp_path: Path) -> None:
    """No model has it as its own: what is written there would be run in place of another's."""
    with pytest.raises(ExportError, match=r"x\.cuda\.onnx would be taken for what CUDA runs of x\.onnx"):
        check_file(tmp_path / "x.cuda.onnx", overwrite=True)


def test_a_file_for_cuda_is_not_replaced_unasked(tmp_path: Path) -> None:
    """A single file is refused for what would lie beside it, too."""
    (tmp_path / "out.cuda.onnx").touch()
    with pytest.raises(ExportError, match=r"out\.cuda\.onnx is there already"):
        check_file(tmp_path / "out.onnx", overwrite=False)
    check_file(tmp_path / "out.onnx", overwrite=True)


def test_which_file_it_lies_beside() -> None:
    """A file for CUDA is known by its name, and the model's own by that."""
    path = Path("models/digits/1/model.onnx")
    assert file_for_cpu(file_beside(path, "cuda")) == path
    assert file_for_cpu(path) is None
    assert file_for_cpu(file_beside(path, "int8")) is None


def test_the_next_version_is_the_one_after_the_last(tmp_path: Path) -> None:
    """Gaps are not filled, and what is no number does not count."""
    assert choose_version(tmp_path, "digits", None, overwrite=False) == 1
    for name in ("1", "7", "notes", ".9.half"):
        (tmp_path / "digits" / name).mkdir(parents=True)
    assert choose_version(tmp_path, "digits", None, overwrite=False) == 8


def test_a_version_is_not_replaced_unasked(tmp_path: Path) -> None:
    """An existing version is refused by name and stays as it was; asked for, its file is replaced and others stay."""
    write_version(tmp_path, "digits", 1, b"old", overwrite=False)
    (tmp_path / "digits" / "1" / "labels.txt").touch()
    with pytest.raises(ExportError, match="digits/1 is there already"):
        write_version(tmp_path, "digits", 1, b"new", overwrite=False)
    assert (tmp_path / "digits" / "1" / "model.onnx").read_bytes() == b"old"
    assert write_version(tmp_path, "digits", 1, b"new", overwrite=True).read_bytes() == b"new"
    assert everything(tmp_path / "digits") == ["1", "1/labels.txt", "1/model.onnx"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_that_fails_leaves_nothing(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails before the bytes are safe leaves what was there, and no half of a file."""
    if overwrite:
        write_version(tmp_path, "digits", 1, b"old", overwrite=False)
    before = everything(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"cannot be written: no space left"):
        write_version(tmp_path, "digits", 1, b"new", overwrite=overwrite)
    assert everything(tmp_path) == before
    assert not overwrite or (tmp_path / "digits" / "1" / "model.onnx").read_bytes() == b"old"


def test_bytes_are_flushed_before_the_name_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the file is flushed, its version is not visible yet; when its folder is, the file is."""
    seen: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append((tmp_path / "digits" / "1" / "model.onnx").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_version(tmp_path, "digits", 1, b"model", overwrite=False)
    assert seen == [False, False, True]  # the file, its folder, the folder of versions


def test_two_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second to a version gets an error, and the first one's file stays."""
    fsync = os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write_version(tmp_path, "digits", 1, b"first", overwrite=False)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(ExportError, match="has appeared meanwhile"):
        write_version(tmp_path, "digits", 1, b"second", overwrite=False)
    assert everything(tmp_path) == ["digits", "digits/1", "digits/1/model.onnx"]
    assert (tmp_path / "digits" / "1" / "model.onnx").read_bytes() == b"first"


def test_a_rename_that_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says is told as it is, and not as another writer's doing."""

    def refused(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ExportError, match=r"digits/1 cannot be written: Permission denied"):
        write_version(tmp_path, "digits", 1, b"new", overwrite=False)
    assert everything(tmp_path) == []


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Files for folders, folders for files, names too long and what the system refuses are found beforehand."""
    (tmp_path / "file").touch()
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "1").touch()
    before = everything(tmp_path)
    for repository, name, version, says in (
        (tmp_path / "file", "digits", None, "file is a file, expected a folder"),
        (tmp_path, "file", None, "file is a file, expected a folder"),
        (tmp_path, "digits", 1, "digits/1 is a file, expected a folder"),
        (tmp_path, "n" * 300, 1, "name too long"),
        (Path("/proc/nowhere"), "digits", None, "cannot be written"),
    ):
        with pytest.raises(ExportError, match=f"(?i){says}"):
            choose_version(repository, name, version, overwrite=True)
    for path, says in (
        (Path("."), "is a folder, expected a file"),
        (tmp_path / "digits", "is a folder, expected a file"),
        (tmp_path / "file" / "model.onnx", "file is a file, expected a folder"),
        (tmp_path / f"{'n' * 300}.onnx", "name too long"),
        (Path("/proc/nowhere/model.onnx"), "cannot be written"),
    ):
        with pytest.raises(ExportError, match=f"(?i){says}"):
            check_file(path, overwrite=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "tab\t", "ümlaut"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    """A name is letters, digits and a few signs: nothing that leads out of the repository."""
    with pytest.raises(ExportError, match="model name"):
        write_version(tmp_path, name, 1, b"", overwrite=False)


def test_versions_that_cannot_be(tmp_path: Path) -> None:
    """A version is a positive integer."""
    with pytest.raises(ExportError, match="version 0: expected a positive integer"):
        choose_version(tmp_path, "digits", 0, overwrite=False)


def test_one_file(tmp_path: Path) -> None:
    """A single file is written and replaced likewise, its folder made if need be."""
    path = tmp_path / "new" / "model.onnx"
    write_file(path, b"one")
    assert write_file(path, b"two").read_bytes() == b"two"
    assert everything(tmp_path) == ["new", "new/model.onnx"]


def test_a_model_that_is_described(tmp_path: Path) -> None:
    """Beside a model.yaml that describes a graph an exported version would never be served, and is not written."""
    (tmp_path / "digits").mkdir()
    description = tmp_path / "digits" / "model.yaml"
    for text, says in (
        ("inputs: {x: {}}\noutputs: {y: {}}", "model.yaml describes a graph, and the server would refuse"),
        ("versoins: [1]", "the server would refuse every version: .*unknown key 'versoins'"),
    ):
        description.write_text(text)
        with pytest.raises(ExportError, match=says):
            write_version(tmp_path, "digits", 1, b"model", overwrite=False)
    assert everything(tmp_path / "digits") == ["model.yaml"]
    description.write_text("versions: {latest: 2}")
    assert write_version(tmp_path, "digits", 1, b"model", overwrite=False).exists()
