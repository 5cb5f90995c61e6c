"""Model folders: which versions are found, which are served, and that a broken one is its own trouble alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.engine import Engine, LoadError
from service.errors import Loading, ModelUnknown
from service.metrics import Metrics
from service.repository import Found, Repository, scan
from service.settings import Settings
from tests.clock import Clock
from tests.graphs import write_lstm


def place(folder: Path, *names: str) -> None:
    """Files that are there, and nothing more."""
    for name in names:
        path = folder / name / "model.onnx"
        path.parent.mkdir(parents=True)
        path.touch()


@asynccontextmanager
async def loaded(folder: Path, **settings: Any) -> AsyncIterator[Repository]:
    """A repository that has loaded, stopped in the end."""
    repository = Repository(Settings(repository=folder, threads=1, **settings), Metrics(), Clock())
    await repository.load()
    try:
        yield repository
    finally:
        await repository.stop(30)


# --- what is found ---


@pytest.mark.parametrize(("latest", "versions"), [(1, [10]), (2, [10, 9]), (9, [10, 9, 1])])
def test_the_newest_versions_are_found(tmp_path: Path, latest: int, versions: list[int]) -> None:
    """As numbers, not as text: 10 is newer than 9."""
    place(tmp_path, "lstm/9", "lstm/10", "lstm/1", "gru/3")
    found = scan(tmp_path, latest)
    assert found == [
        Found("gru", 3, tmp_path / "gru/3/model.onnx"),
        *(Found("lstm", version, tmp_path / f"lstm/{version}/model.onnx") for version in versions),
    ]


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
    assert scan(tmp_path, 100) == [Found("lstm", 1, tmp_path / "lstm/1/model.onnx")]


@pytest.mark.parametrize("there", [False, True], ids=["missing", "a file"])
def test_a_repository_that_is_no_folder(tmp_path: Path, there: bool) -> None:
    """An error that names it, and what was expected."""
    path = tmp_path / "models"
    if there:
        path.touch()
    with pytest.raises(LoadError, match=r"models is not a folder; expected DIR/NAME/VERSION/model\.onnx"):
        scan(path, 1)


# --- what is served ---


async def test_models_are_found_by_name_and_version(tmp_path: Path) -> None:
    """Version 0 is the newest; what is not there is told apart, with what there is."""
    for version in (1, 2, 3):
        write_lstm(tmp_path, "lstm", version)
    write_lstm(tmp_path, "other")
    async with loaded(tmp_path, latest_versions=2) as repository:
        assert repository.names() == ["lstm", "other"]
        assert [repository.find("lstm", version).version for version in (0, 2, 3)] == [3, 2, 3]
        assert {(runner.name, runner.version) for runner in repository} == {("lstm", 2), ("lstm", 3), ("other", 1)}
        with pytest.raises(ModelUnknown, match=r"no model 'gru' is served; there are: lstm, other"):
            repository.find("gru")
        with pytest.raises(ModelUnknown, match=r"model 'lstm' has no version 1 here; there are: 2, 3"):
            repository.find("lstm", 1)


async def test_a_broken_model_does_not_take_others_down(tmp_path: Path) -> None:
    """Its reason is kept; an older version of it that works is served where it is asked for."""
    place(tmp_path, "broken/1", "half/2")
    write_lstm(tmp_path, "half", 1)
    write_lstm(tmp_path, "whole")
    async with loaded(tmp_path, latest_versions=2) as repository:
        assert repository.names() == ["half", "whole"]
        assert repository.find("half").version == 1
        assert repository.broken.keys() == {("broken", 1), ("half", 2)}
        assert "onnxruntime cannot load model.onnx" in repository.broken["broken", 1]
        with pytest.raises(ModelUnknown):
            repository.find("broken")


async def test_a_model_that_loads_and_does_not_run_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when it is warmed, before anyone calls."""

    def fail(engine: Engine, feeds: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Engine, "run", fail)
    write_lstm(tmp_path)
    repository = Repository(Settings(repository=tmp_path, threads=1), Metrics(), Clock())
    with pytest.raises(LoadError, match="can be served: lstm 1: the model does not run: no kernel"):
        await repository.load()


async def test_a_file_that_cannot_be_read_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone, or not ours to read, between the scan and the load: its own trouble, as any."""
    write_lstm(tmp_path)
    (tmp_path / "other/1").mkdir(parents=True)
    gone = Found("other", 1, tmp_path / "other/1/model.onnx")
    monkeypatch.setattr("service.repository.scan", lambda folder, latest, needed: [gone, *scan(folder, latest)])
    async with loaded(tmp_path) as repository:
        assert repository.names() == ["lstm"]
        assert repository.broken == {("other", 1): "cannot read model.onnx: No such file or directory"}


async def test_an_empty_repository_is_not_served(tmp_path: Path) -> None:
    """A server without a model would count as ready, and be sent calls; it says what it looked for instead."""
    repository = Repository(Settings(repository=tmp_path), Metrics(), Clock())
    with pytest.raises(LoadError, match=r"there is none; expected DIR/NAME/VERSION/model\.onnx"):
        await repository.load()


def test_older_versions_that_are_needed_are_found(tmp_path: Path) -> None:
    """Beside the newest, where they are there."""
    place(tmp_path, "a/1", "a/2", "a/3", "b/1")
    found = scan(tmp_path, 1, {("a", 1), ("a", 9), ("c", 1)})
    assert [(one.name, one.version) for one in found] == [("a", 3), ("a", 1), ("b", 1)]


async def test_until_all_is_loaded_callers_are_told_so(tmp_path: Path) -> None:
    """Not that the model is unknown, nor that there are none: that would end their search."""
    repository = Repository(Settings(repository=tmp_path), Metrics(), Clock())
    with pytest.raises(Loading):
        repository.find("lstm")
    with pytest.raises(Loading):
        repository.names()
