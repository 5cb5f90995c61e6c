"""The repository's folder: which versions are found, what tells one state of them from another, which are wanted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from service.errors import LoadError
from service.versions.folder import ModelFolder, look_again, overlooked, scan, wanted


def place(folder: Path, *names: str) -> None:
    """Files that are there, and nothing more."""
    for name in names:
        path = folder / name / "model.onnx"
        path.parent.mkdir(parents=True)
        path.touch()


def versions(model: ModelFolder) -> list[int]:
    """The versions found, in the order in which they are listed."""
    return [found.version for found in model.versions]


# --- what is found ---


def test_versions_are_numbers(tmp_path: Path) -> None:
    """Newest first, and not as text: 10 is newer than 9."""
    place(tmp_path, "lstm/9", "lstm/10", "lstm/1", "gru/3")
    models = scan(tmp_path)
    assert list(models) == ["gru", "lstm"]
    assert versions(models["lstm"]) == [10, 9, 1]
    (found,) = models["gru"].versions
    assert (found.name, found.version, found.path) == ("gru", 3, tmp_path / "gru/3/model.onnx")


def test_other_things_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    """Folders that are no versions, versions without a model, hidden folders, stray files."""
    odd = ["v1", "0", "01", "-1", "1.0", " 1", "١", "1.partial", "9" * 19, ".tmp"]
    place(tmp_path, "lstm/1", *(f"lstm/{name}" for name in odd), ".hidden/1", "_private/1", "sp ace/1")
    (tmp_path / "lstm/2").mkdir()
    (tmp_path / "lstm/3/model.onnx").mkdir(parents=True)
    (tmp_path / "lstm/4").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / "lstm/model.yaml").touch()
    models = scan(tmp_path)
    assert list(models) == ["lstm"]
    assert versions(models["lstm"]) == [1]


@pytest.mark.parametrize("there", [False, True], ids=["missing", "a file"])
def test_a_repository_that_is_no_folder(tmp_path: Path, there: bool) -> None:
    """An error that names it, and what was expected."""
    path = tmp_path / "models"
    if there:
        path.touch()
    with pytest.raises(LoadError, match=r"models is not a folder; expected DIR/NAME/VERSION/model\.onnx"):
        scan(path)


def test_a_model_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own trouble: the others are found. A link that leads nowhere is no model."""
    place(tmp_path, "lstm/1", "other/1")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nothing").symlink_to(tmp_path / "away")
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if path == tmp_path / "other":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    models = scan(tmp_path)
    assert list(models) == ["lstm", "other"]
    assert versions(models["lstm"]) == [1]
    assert models["other"].trouble == "the model's folder cannot be read: Permission denied"


# --- what tells one state from another ---


@pytest.mark.parametrize(
    "name",
    [
        "lstm/2/model.onnx",
        "lstm/2/model.int8.onnx",
        "lstm/2/model.onnx.data",
        "lstm/2/weights/0",
        "lstm/model.yaml",
        "lstm/initial/h0.npy",
    ],
)
@pytest.mark.parametrize("change", ["written", "touched", "put in its place", "removed"])
def test_a_change_of_any_file_shows(tmp_path: Path, name: str, change: str) -> None:
    """Of the model file, of what stands beside it and below it, of what its versions share."""
    place(tmp_path, "lstm/2", "lstm/1", "other/1")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1234")
    os.utime(path, ns=(1, 1))
    before = scan(tmp_path)
    assert scan(tmp_path) == before
    if change == "written":
        path.write_bytes(b"12345")
        os.utime(path, ns=(1, 1))
    elif change == "touched":
        os.utime(path, ns=(1, 2))
    elif change == "put in its place":
        other = path.with_name("another")
        other.write_bytes(b"4321")
        os.utime(other, ns=(1, 1))
        other.replace(path)
    else:
        path.unlink()
    after = scan(tmp_path)
    assert after["lstm"] != before["lstm"]
    assert after["other"] == before["other"]
    of_one = [{found.version: found.signature for found in seen["lstm"].versions}[1] for seen in (before, after)]
    assert (of_one[0] == of_one[1]) == name.startswith("lstm/2/")


def test_files_on_their_way_do_not_show(tmp_path: Path) -> None:
    """Copying tools and editors write under hidden names, and rename in the end."""
    place(tmp_path, "lstm/1")
    before = scan(tmp_path)
    (tmp_path / "lstm/1/.model.onnx.Ab12").write_bytes(b"half")
    (tmp_path / "lstm/.model.yaml.swp").write_bytes(b"half")
    assert scan(tmp_path) == before


def test_what_the_server_has_measured_does_not_show(tmp_path: Path) -> None:
    """It is written while the model is loaded, and changes nothing of it."""
    place(tmp_path, "lstm/1")
    before = scan(tmp_path)
    (tmp_path / "lstm/1/tuning.json").write_text("{}")
    assert scan(tmp_path) == before
    assert overlooked(tmp_path) == []


# --- what is wanted ---


@pytest.mark.parametrize(
    ("text", "candidates", "count", "missing"),
    [
        (None, [5, 3, 1], 2, []),
        ("strict: true", [5, 3, 1], 2, []),
        ("versions: {latest: 1}", [5, 3, 1], 1, []),
        ("versions: {latest: 9}", [5, 3, 1], 9, []),
        ("versions: [1, 3, 9, 4]", [3, 1], 2, [4, 9]),
        ("versions: [7]", [], 0, [7]),
    ],
)
def test_the_policy(tmp_path: Path, text: str | None, candidates: list[int], count: int, missing: list[int]) -> None:
    """The model's own before the server's: so many of the newest, or those named, as far as they are there."""
    place(tmp_path, "lstm/1", "lstm/3", "lstm/5")
    if text is not None:
        (tmp_path / "lstm/model.yaml").write_text(text)
    found, at_once, not_there = wanted(scan(tmp_path)["lstm"], latest=2)
    assert ([one.version for one in found], at_once, list(not_there)) == (candidates, count, missing)


def test_a_policy_that_cannot_be_read(tmp_path: Path) -> None:
    """Nobody can tell what is wanted: an error, not a default."""
    place(tmp_path, "lstm/1")
    (tmp_path / "lstm/model.yaml").write_text("versions: newest")
    with pytest.raises(LoadError, match=r"model\.yaml is not valid: versions: expected {latest: N} or a list"):
        wanted(scan(tmp_path)["lstm"], latest=1)


def test_what_makes_a_model(tmp_path: Path) -> None:
    """Not the versions that it wants: an edit of the policy is no reason to load it anew; any other is."""
    place(tmp_path, "lstm/1")
    yaml = tmp_path / "lstm/model.yaml"
    contents = []
    for text in (None, "", "versions: [1]", "{versions: [1], strict: true}", "strict: true", "row_by_row: true"):
        if text is not None:
            yaml.write_text(text)
        ((found,), _, _) = wanted(scan(tmp_path)["lstm"], latest=1)
        contents.append(found.content)
        assert look_again(found) == found
    plain, _, listed, strict, only_strict, row_by_row = contents
    assert plain == listed == contents[1]
    assert strict == only_strict
    assert plain != strict != row_by_row != plain


def test_folders_that_are_deep_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    """Neither costs a model its place: what cannot be read counts as not there."""
    place(tmp_path, "deep/1", "loop/1")
    os.symlink("me", tmp_path / "loop/me")
    inside = os.open(tmp_path / "deep", os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=inside)
        below = os.open("d", os.O_RDONLY, dir_fd=inside)
        os.close(inside)
        inside = below
    os.close(inside)
    try:
        models = scan(tmp_path)
        assert [versions(models[name]) for name in ("deep", "loop")] == [[1], [1]]
    finally:
        # Deeper than pytest, which goes by recursion, could remove.
        subprocess.run(["rm", "-r", tmp_path / "deep"], check=True)


def test_a_model_that_raises_what_nobody_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that model's trouble too."""
    place(tmp_path, "lstm/1", "other/1")
    listdir = os.listdir

    def fail(path: Path) -> list[str]:
        if path == tmp_path / "other":
            raise RecursionError("too deep")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fail)
    models = scan(tmp_path)
    assert versions(models["lstm"]) == [1]
    assert "too deep" in models["other"].trouble


def test_what_is_overlooked_is_told(tmp_path: Path) -> None:
    """Each folder that nobody would put there for nothing, and what was found in it."""
    place(tmp_path, "v/v1", "lstm/1", "sp ace/1", ".hidden/1")
    (tmp_path / "e/1").mkdir(parents=True)
    (tmp_path / "e/1/net.onnx").touch()
    (tmp_path / "e/2").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").touch()
    assert overlooked(tmp_path) == [
        "e/1 has no model.onnx (found net.onnx)",
        "e/2 has no model.onnx (found nothing)",
        "empty has no version folder (found nothing; expected a positive integer)",
        "'sp ace' is no name of a model; expected letters, digits, '.', '_' and '-'",
        "v has no version folder (found v1; expected a positive integer)",
    ]
