"""The repository: what is served, how it is switched and freed, and that a broken model is its own trouble alone."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from service.engines.engine import Engine
from service.errors import ControlRefused, Draining, LoadError, LoadFailed, Loading, ModelUnknown
from service.metrics import Metrics
from service.repository import Repository
from service.settings import Settings
from service.states.device import HostDevice
from service.states.pool import Pool
from service.ticks.admission import Limits
from service.ticks.pace import Pace
from service.ticks.runner import Runner
from service.versions.folder import ModelFolder, scan, wanted
from service.versions.loading import Loaded, load_model
from service.versions.tuning import Measurement
from tests.clock import Clock
from tests.graph_variants import LOSS, write_int8
from tests.graphs import replace_lstm, write_broken, write_lstm


def repository_of(folder: Path, **settings: Any) -> Repository:
    """A repository that has not loaded yet."""
    return Repository(Settings(**{"repository": folder, "threads": 1, "tune_s": 0, **settings}), Metrics(), Clock())


@asynccontextmanager
async def loaded(folder: Path, **settings: Any) -> AsyncIterator[Repository]:
    """A repository that has loaded, stopped in the end."""
    repository = repository_of(folder, **settings)
    await repository.load()
    try:
        yield repository
    finally:
        assert await repository.stop(30)


async def look(repository: Repository, times: int = 2) -> None:
    """Poll, and wait for what that begins."""
    for _ in range(times):
        await repository.poll()
    await repository.settle()


def told(repository: Repository) -> dict[tuple[str, int], tuple[str, str]]:
    """The index: state and reason of each version."""
    return {(entry.name, entry.version): (entry.state, entry.reason) for entry in repository.index()}


class Gate:
    """Loads of some models wait until they are let through.

    Attributes:
        waiting: released once for each load that has come.
        begun: the names and versions of all loads, in order.
    """

    def __init__(self, *names: str) -> None:
        self.waiting = threading.Semaphore(0)
        self.begun: list[str] = []
        self._names = names
        self._open = threading.Event()

    def load(self, path: Path, settings: Settings) -> Loaded:
        """In the place of ``load_model``."""
        self.begun.append(f"{path.parent.parent.name} {path.parent.name}")
        if path.parent.parent.name in self._names:
            self.waiting.release()
            assert self._open.wait(30)
        return load_model(path, settings)

    async def one_waits(self) -> None:
        """Return once one more load has come."""
        assert await asyncio.to_thread(self.waiting.acquire, timeout=30)

    def open(self) -> None:
        """Let every load through."""
        self._open.set()


@contextmanager
def gated(*names: str) -> Iterator[Gate]:
    """Hold the loads of some models up."""
    gate = Gate(*names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.versions.tuner.load_model", gate.load)
        try:
            yield gate
        finally:
            gate.open()


# --- what is served ---


async def test_models_are_found_by_name_and_version(tmp_path: Path) -> None:
    """Version 0 is the newest; what is not there is told apart, with what there is."""
    for version in (1, 2, 3):
        write_lstm(tmp_path, "lstm", version)
    write_lstm(tmp_path, "other")
    async with loaded(tmp_path, latest_versions=2) as repository:
        assert repository.names() == ["lstm", "other"]
        assert repository.versions("lstm") == [2, 3]
        assert [repository.find("lstm", version).version for version in (0, 2, 3)] == [3, 2, 3]
        assert {(runner.name, runner.version) for runner in repository} == {("lstm", 2), ("lstm", 3), ("other", 1)}
        assert [repository.ready("lstm", version) for version in (0, 1, 2, 7)] == [True, False, True, False]
        assert not repository.ready("gru")
        with pytest.raises(ModelUnknown, match=r"no model 'gru' is served; there are: lstm, other"):
            repository.find("gru")
        with pytest.raises(ModelUnknown, match=r"model 'lstm' has no version 7 here; there are: 2, 3"):
            repository.find("lstm", 7)
        with pytest.raises(
            ModelUnknown, match=r"version 1 of model 'lstm' is not served: not within the policy; there"
        ):
            repository.find("lstm", 1)
        assert told(repository) == {
            ("lstm", 1): ("UNAVAILABLE", "not within the policy"),
            ("lstm", 2): ("READY", ""),
            ("lstm", 3): ("READY", ""),
            ("other", 1): ("READY", ""),
        }


async def test_a_model_says_itself_which_versions_it_wants(tmp_path: Path) -> None:
    """In its model.yaml, before the server's settings."""
    for version in (1, 2, 3):
        write_lstm(tmp_path, "lstm", version)
    (tmp_path / "lstm/model.yaml").write_text("versions: [1, 2]")
    async with loaded(tmp_path) as repository:
        assert repository.versions("lstm") == [1, 2]


async def test_a_broken_model_does_not_take_others_down(tmp_path: Path) -> None:
    """Its reason stands in the index; of a model with a broken version the newest that loads is served."""
    write_broken(tmp_path, "broken", 1)
    write_broken(tmp_path, "half", 2)
    write_lstm(tmp_path, "half", 1)
    write_lstm(tmp_path, "unclear")
    (tmp_path / "unclear/model.yaml").write_text("versions: newest")
    write_lstm(tmp_path, "whole")
    async with loaded(tmp_path) as repository:
        assert repository.names() == ["half", "whole"]
        assert repository.find("half").version == 1
        index = told(repository)
        assert {key: state for key, (state, _) in index.items() if state != "READY"} == {
            ("broken", 1): "UNAVAILABLE",
            ("half", 2): "UNAVAILABLE",
            ("unclear", 1): "UNAVAILABLE",
        }
        assert "onnxruntime cannot load model.onnx" in index["broken", 1][1]
        assert str(tmp_path) not in index["broken", 1][1]
        assert index["unclear", 1][1].startswith("model.yaml is not valid: versions: ")
        with pytest.raises(ModelUnknown, match=r"model 'broken' did not load: onnxruntime cannot load model\.onnx"):
            repository.find("broken")


async def test_an_unexpected_error_is_no_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a load raises costs that model alone, and its text stays in the log."""
    write_lstm(tmp_path, "lstm")
    write_lstm(tmp_path, "odd")

    def fail(path: Path, settings: Settings) -> Loaded:
        if "odd" in path.parts:
            raise MemoryError("at 0x1234")
        return load_model(path, settings)

    monkeypatch.setattr("service.versions.tuner.load_model", fail)
    async with loaded(tmp_path) as repository:
        assert repository.names() == ["lstm"]
        assert told(repository)["odd", 1] == ("UNAVAILABLE", "unexpected error; the server's log has it")


async def test_a_model_that_loads_and_does_not_run_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when it is warmed, before anyone calls."""

    def fail(engine: Engine, feeds: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Engine, "run", fail)
    write_lstm(tmp_path)
    with pytest.raises(LoadError, match=r"can be served: lstm 1: .*no kernel"):
        await repository_of(tmp_path).load()


@pytest.mark.parametrize("control", ["fixed", "poll", "explicit"])
async def test_an_empty_repository(tmp_path: Path, control: str) -> None:
    """Where nothing will ever come it is not served: a server would count as ready, and be sent calls."""
    if control == "fixed":
        with pytest.raises(LoadError, match=r"there is none; expected DIR/NAME/VERSION/model\.onnx"):
            await repository_of(tmp_path).load()
    else:
        async with loaded(tmp_path, model_control=control) as repository:
            assert (repository.names(), repository.index()) == ([], [])


async def test_until_all_is_loaded_callers_are_told_so(tmp_path: Path) -> None:
    """Not that the model is unknown, nor that there are none: that would end their search."""
    repository = repository_of(tmp_path, model_control="explicit")
    with pytest.raises(Loading):
        repository.find("lstm")
    with pytest.raises(Loading):
        repository.names()
    with pytest.raises(Loading):
        await repository.load_model("lstm")


async def test_versions_that_sessions_need(tmp_path: Path) -> None:
    """Loaded beside what is served, for those sessions alone; freed if there are none after all."""
    for version in (1, 2, 3):
        write_lstm(tmp_path, "lstm", version)
    repository = repository_of(tmp_path)
    await repository.load(needed={("lstm", 1), ("lstm", 2), ("lstm", 3), ("lstm", 9), ("gru", 1)})
    assert repository.versions("lstm") == [3]
    one, two, three = (repository.find_for_session("lstm", version) for version in (1, 2, 3))
    assert [runner.version for runner in (one, two, three)] == [1, 2, 3]
    assert three is repository.find("lstm")
    slot = one.pool.allocate()
    await repository.free()
    assert {(runner.name, runner.version) for runner in repository} == {("lstm", 1), ("lstm", 3)}
    kept = "kept for the sessions of an earlier process"
    assert told(repository)["lstm", 1] == ("UNLOADING", f"{kept}; sessions and batch rows that go on: 1")
    for version in (2, 9):
        with pytest.raises(ModelUnknown):
            repository.find_for_session("lstm", version)
    with pytest.raises(ModelUnknown, match="version 1 of model 'lstm' is being unloaded"):
        repository.find("lstm", 1)
    one.pool.free(slot)
    await repository.stop(30)


# --- polling ---


async def test_a_new_version_takes_over(tmp_path: Path) -> None:
    """Once two looks have seen the same; the one before is freed when its last session has ended."""
    write_lstm(tmp_path, "lstm", 1)
    async with loaded(tmp_path, model_control="poll") as repository:
        before = repository.find("lstm")
        slots = [before.pool.allocate(), before.pool.allocate()]
        write_lstm(tmp_path, "lstm", 2, seed=2)
        write_lstm(tmp_path, "gru", 1, seed=3)
        await look(repository, times=1)
        assert repository.find("lstm") is before
        await look(repository, times=1)
        assert repository.find("lstm").version == 2
        assert repository.names() == ["gru", "lstm"]
        for _ in range(2):
            left = before.pool.taken
            reason = f"not within the policy; sessions and batch rows that go on: {left}"
            assert told(repository)["lstm", 1] == ("UNLOADING", reason)
            with pytest.raises(ModelUnknown, match=r"version 1 of model 'lstm' is being unloaded .*; there are: 2"):
                repository.find("lstm", 1)
            before.pool.free(slots.pop())
            await repository.free()
        assert told(repository)["lstm", 1] == ("UNAVAILABLE", "not within the policy")
        assert before not in list(repository)


async def test_what_is_still_being_copied_is_not_loaded(tmp_path: Path) -> None:
    """A file that is another at each look is left alone, until it has come to rest."""
    write_lstm(tmp_path / "elsewhere", "lstm", 2)
    whole = (tmp_path / "elsewhere/lstm/2/model.onnx").read_bytes()
    folder = tmp_path / "models"
    write_lstm(folder, "lstm", 1)
    with gated() as gate:
        async with loaded(folder, model_control="poll") as repository:
            path = write_broken(folder, "lstm", 2)
            for share in (0.2, 0.4, 0.6, 0.8, 1.0):
                path.write_bytes(whole[: int(share * len(whole))])
                await look(repository, times=1)
            assert repository.versions("lstm") == [1]
            await look(repository, times=1)
            assert repository.versions("lstm") == [2]
        assert gate.begun == ["lstm 1", "lstm 2"]


async def test_a_broken_version_disturbs_nobody_and_is_tried_once(tmp_path: Path) -> None:
    """What served goes on; the reason is told; only when the files change is it tried again."""
    write_lstm(tmp_path, "lstm", 1)
    with gated() as gate:
        async with loaded(tmp_path, model_control="poll") as repository:
            write_broken(tmp_path, "lstm", 2)
            await look(repository, times=5)
            assert repository.find("lstm").version == 1
            state, reason = told(repository)["lstm", 2]
            assert (state, "onnxruntime cannot load" in reason) == ("UNAVAILABLE", True)
            write_lstm(tmp_path, "other")
            await look(repository, times=3)
            assert gate.begun == ["lstm 1", "lstm 2", "other 1"]
            replace_lstm(tmp_path, "lstm", 2, seed=2)
            await look(repository)
            assert repository.find("lstm").version == 2
            assert told(repository)["lstm", 2] == ("READY", "")


async def test_a_file_replaced_under_its_number(tmp_path: Path) -> None:
    """Is a switch like any other; one that holds the same bytes is none; a broken one leaves the one before."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with loaded(tmp_path, model_control="poll") as repository:
        first = repository.find("lstm")
        replace_lstm(tmp_path, "lstm", 1, seed=1)
        await look(repository)
        assert repository.find("lstm") is first
        slot = first.pool.allocate()
        replace_lstm(tmp_path, "lstm", 1, seed=2)
        await look(repository)
        second = repository.find("lstm", 1)
        assert second.digest != first.digest
        assert told(repository)["lstm", 1] == ("READY", "sessions and batch rows that go on: 1, with the files before")
        first.pool.free(slot)
        write_broken(tmp_path, "lstm", 1)
        await look(repository)
        assert repository.find("lstm", 1) is second
        state, reason = told(repository)["lstm", 1]
        assert (state, reason.startswith("the files have changed and did not load: ")) == ("READY", True)


async def test_what_is_removed_is_unloaded(tmp_path: Path) -> None:
    """A version, and a whole model; the one before takes over again where the policy has room for it."""
    for version in (1, 2):
        write_lstm(tmp_path, "lstm", version)
    write_lstm(tmp_path, "other")
    async with loaded(tmp_path, model_control="poll") as repository:
        runner = repository.find("lstm")
        slot = runner.pool.allocate()
        shutil.rmtree(tmp_path / "lstm/2")
        shutil.rmtree(tmp_path / "other")
        await look(repository)
        assert repository.find("lstm").version == 1
        assert told(repository) == {
            ("lstm", 1): ("READY", ""),
            ("lstm", 2): ("UNLOADING", "not in the folder any more; sessions and batch rows that go on: 1"),
        }
        with pytest.raises(ModelUnknown, match="no model 'other' is served; there are: lstm"):
            repository.find("other")
        runner.pool.free(slot)
        await repository.free()
        assert told(repository).keys() == {("lstm", 1)}


async def test_a_policy_that_changes(tmp_path: Path) -> None:
    """Is followed; one that cannot be read leaves everything as it is, and says so."""
    for version in (1, 2):
        write_lstm(tmp_path, "lstm", version)
    async with loaded(tmp_path, model_control="poll") as repository:
        runner = repository.find("lstm")
        for text, versions in (("[1, 2]", [1, 2]), ("nonsense", [1, 2]), ("[1]", [1]), ("{latest: 1}", [2])):
            (tmp_path / "lstm/model.yaml").write_text(f"versions: {text}")
            await look(repository)
            assert repository.versions("lstm") == versions
            assert [entry.state for entry in repository.index()].count("READY") == len(versions)
            said = {reason for _, reason in told(repository).values()}
            assert any("model.yaml is not valid" in reason for reason in said) == (text == "nonsense")
        assert repository.find("lstm").digest == runner.digest


async def test_a_folder_that_is_away_unloads_nothing(tmp_path: Path) -> None:
    """A disk that fails for a moment is no order."""
    folder = tmp_path / "models"
    write_lstm(folder)
    async with loaded(folder, model_control="poll") as repository:
        runner = repository.find("lstm")
        folder.rename(tmp_path / "away")
        await look(repository, times=3)
        (tmp_path / "away").rename(folder)
        await look(repository)
        assert repository.find("lstm") is runner


async def test_a_load_that_takes_long_holds_nobody_up(tmp_path: Path) -> None:
    """What serves goes on meanwhile, and other models come; whoever asks for the model is told that it is coming."""
    write_lstm(tmp_path, "lstm", 1)
    with gated("large") as gate:
        async with loaded(tmp_path, model_control="poll") as repository:
            write_lstm(tmp_path, "large")
            await repository.poll()
            await repository.poll()
            await gate.one_waits()
            write_lstm(tmp_path, "small")
            write_lstm(tmp_path, "lstm", 2)
            for _ in range(2):
                await repository.poll()
            while repository.versions("small") != [1] or repository.versions("lstm") != [2]:
                await asyncio.to_thread(int)
            assert told(repository)["large", 1] == ("LOADING", "")
            with pytest.raises(Loading, match="model 'large' is being loaded"):
                repository.find("large")
            gate.open()
            await repository.settle()
            assert repository.ready("large")
        assert gate.begun.count("large 1") == 1


# --- explicit control ---


async def test_models_on_request(tmp_path: Path) -> None:
    """Nothing but what is asked for is served; a load during an unload brings the model back."""
    for name in ("a", "b", "c"):
        write_lstm(tmp_path, name)
    async with loaded(tmp_path, model_control="explicit", load_models=("a", "missing")) as repository:
        assert repository.names() == ["a"]
        assert told(repository)["b", 1] == ("UNAVAILABLE", "not loaded")
        with pytest.raises(ModelUnknown, match="model 'b' is not served: not loaded"):
            repository.find("b")
        await repository.load_model("b")
        before = repository.find("b")
        await repository.load_model("b")
        assert repository.find("b") is before
        slot = before.pool.allocate()
        await repository.unload_model("b")
        assert told(repository)["b", 1] == ("UNLOADING", "unloaded; sessions and batch rows that go on: 1")
        with pytest.raises(ModelUnknown, match=r"model 'b' is being unloaded \(unloaded\)"):
            repository.find("b")
        await repository.load_model("b")
        assert repository.find("b") is before
        assert before.pool.taken == 1
        assert told(repository)["b", 1] == ("READY", "")
        before.pool.free(slot)
        await repository.unload_model("b")
        await repository.unload_model("b")
        assert told(repository)["b", 1] == ("UNAVAILABLE", "unloaded")
        assert repository.names() == ["a"]
        for call in (repository.load_model, repository.unload_model):
            with pytest.raises(ModelUnknown, match="'gru'"):
                await call("gru")
        await repository.load_model("a")
        shutil.rmtree(tmp_path / "c")
        with pytest.raises(ModelUnknown):
            await repository.load_model("c")


async def test_all_models_at_the_start(tmp_path: Path) -> None:
    """With a star for their names."""
    for name in ("a", "b"):
        write_lstm(tmp_path, name)
    async with loaded(tmp_path, model_control="explicit", load_models=("*",)) as repository:
        assert repository.names() == ["a", "b"]


async def test_a_load_that_fails_is_told_and_changes_nothing(tmp_path: Path) -> None:
    """With the reason; asked for again it is tried again."""
    write_lstm(tmp_path, "lstm", 1)
    async with loaded(tmp_path, model_control="explicit", load_models=("*",)) as repository:
        before = repository.find("lstm")
        write_broken(tmp_path, "lstm", 2)
        with gated() as gate:
            for _ in range(2):
                with pytest.raises(
                    LoadFailed, match=r"load failed for model 'lstm': version 2 is at UNAVAILABLE state: "
                ):
                    await repository.load_model("lstm")
            assert gate.begun == ["lstm 2", "lstm 2"]
        assert repository.find("lstm") is before


@pytest.mark.parametrize("control", ["fixed", "poll"])
async def test_requests_where_they_are_not_taken(tmp_path: Path, control: str) -> None:
    """Refused, and told what the server does instead."""
    write_lstm(tmp_path)
    async with loaded(tmp_path, model_control=control) as repository:
        for call in (repository.load_model, repository.unload_model):
            says = f"explicit model load / unload is not allowed: this server's --model-control is {control}"
            with pytest.raises(ControlRefused, match=says):
                await call("lstm")


async def test_loads_of_one_model_take_turns(tmp_path: Path) -> None:
    """The second finds it loaded; an unload comes after both; another model does not wait."""
    for name in ("a", "b"):
        write_lstm(tmp_path, name)
    with gated("a") as gate:
        async with loaded(tmp_path, model_control="explicit") as repository:
            first = asyncio.create_task(repository.load_model("a"))
            await gate.one_waits()
            second = asyncio.create_task(repository.load_model("a"))
            await repository.load_model("b")
            assert repository.names() == ["b"]
            assert not first.done()
            gate.open()
            await asyncio.gather(first, second)
            assert gate.begun == ["a 1", "b 1"]
            await repository.unload_model("a")
            assert repository.names() == ["b"]


async def test_a_caller_that_goes_away_does_not_stop_its_load(tmp_path: Path) -> None:
    """What was asked for comes."""
    write_lstm(tmp_path, "a")
    with gated("a") as gate:
        async with loaded(tmp_path, model_control="explicit") as repository:
            call = asyncio.create_task(repository.load_model("a"))
            await gate.one_waits()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert call.cancelled()
            gate.open()
            await repository.settle()
            assert repository.names() == ["a"]


async def test_loads_in_progress_do_not_hold_the_end(tmp_path: Path) -> None:
    """They are given up, and whoever waits for one is told; what serves goes on until it is stopped."""
    write_lstm(tmp_path, "a")
    write_lstm(tmp_path, "b")
    with gated("a") as gate:
        async with loaded(tmp_path, model_control="explicit", load_models=("b",)) as repository:
            call = asyncio.create_task(repository.load_model("a"))
            await gate.one_waits()
            repository.close()
            with pytest.raises(Draining):
                await call
            with pytest.raises(Draining):
                await repository.load_model("b")
            assert repository.names() == ["b"]


# --- what settles in ---


class Settling:
    """Models settle in when the test says so.

    Attributes:
        begun: released once for each that has begun.
        go: lets them.
        threads: those in which they do.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.threads: list[threading.Thread] = []
        patch.setattr(Pool, "settle_in", self.settle_in)

    def settle_in(self, pool: Pool | None = None) -> str:
        """In the place of a pool's."""
        self.threads.append(threading.current_thread())
        self.begun.release()
        assert self.go.wait(30)
        return ""


async def test_a_model_serves_once_it_has_settled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that runs its ticks, and before anybody can open a session; the version before serves till then."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with loaded(tmp_path, model_control="explicit", load_models=("*",)) as repository:
        settling = Settling(monkeypatch)
        before = repository.find("lstm")
        replace_lstm(tmp_path, "lstm", 1, seed=2)
        load = asyncio.create_task(repository.load_model("lstm"))
        assert await asyncio.to_thread(settling.begun.acquire, timeout=30)
        assert repository.find("lstm") is before
        settling.go.set()
        await load
        after = repository.find("lstm")
        assert after is not before
        assert settling.threads == [after._thread]


async def test_a_model_that_is_given_up_while_it_settles_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends once it has."""
    settling = Settling(monkeypatch)
    write_lstm(tmp_path, "lstm", 1)
    load = asyncio.create_task(repository_of(tmp_path).load())
    assert await asyncio.to_thread(settling.begun.acquire, timeout=30)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    settling.go.set()
    await asyncio.to_thread(settling.threads[0].join, 30)
    assert not settling.threads[0].is_alive()


# --- what is freed ---


async def test_what_is_unloaded_is_freed(tmp_path: Path) -> None:
    """The runner, its thread, its graph and its metrics, at once and not when the collector comes by."""
    write_lstm(tmp_path, "lstm", 1)
    metrics = Metrics()
    settings = Settings(repository=tmp_path, threads=1, tune_s=0, model_control="explicit", load_models=("*",))
    repository = Repository(settings, metrics, Clock())
    gc.disable()
    try:
        await repository.load()
        runner = repository.find("lstm")
        held = weakref.ref(runner), weakref.ref(runner.execution.engine), weakref.ref(runner.pool)
        del runner
        assert b'model="lstm"' in generate_latest(metrics.registry)
        await repository.unload_model("lstm")
        # The thread that loaded it and the one that ran it are at their ends, but may not have got there.
        for thread in threading.enumerate():
            if thread.name.startswith(("background-", "engine-lstm-")):
                thread.join(5)
        await asyncio.sleep(0)
        assert [reference() for reference in held] == [None, None, None]
        assert not any("lstm" in thread.name for thread in threading.enumerate())
        assert b'model="lstm"' not in generate_latest(metrics.registry)
    finally:
        gc.enable()


async def test_what_takes_over_keeps_its_metrics(tmp_path: Path) -> None:
    """Freeing the runner before does not hide the queue of the one that has its number now."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    metrics = Metrics()
    repository = Repository(Settings(repository=tmp_path, threads=1, tune_s=0, model_control="poll"), metrics, Clock())
    await repository.load()
    replace_lstm(tmp_path, "lstm", 1, seed=2)
    await look(repository)
    assert len(list(repository)) == 1
    assert b'conveyor_queued_rows{model="lstm",version="1"} 0.0' in generate_latest(metrics.registry)
    await repository.stop(30)


# --- what the folder says and does not hold ---


async def test_versions_that_are_asked_for_and_not_there(tmp_path: Path) -> None:
    """Told in the index and to whoever loads, not passed over; forgotten once nobody asks for them."""
    for version in (1, 2):
        write_lstm(tmp_path, "lstm", version)
    yaml = tmp_path / "lstm/model.yaml"
    says = "model.yaml asks for version 7; the folder has 1, 2"
    async with loaded(tmp_path, model_control="explicit") as repository:
        await repository.load_model("lstm")
        runner = repository.find("lstm")
        yaml.write_text("versions: [7]")
        with pytest.raises(LoadFailed, match=f"version 7 is at UNAVAILABLE state: {says}"):
            await repository.load_model("lstm")
        assert told(repository) == {
            ("lstm", 1): ("UNAVAILABLE", "not within the policy"),
            ("lstm", 2): ("READY", ""),
            ("lstm", 7): ("UNAVAILABLE", says),
        }
        assert repository.find("lstm") is runner
        with pytest.raises(ModelUnknown, match=f"version 7 of model 'lstm' did not load: {says}"):
            repository.find("lstm", 7)
        yaml.unlink()
        await repository.load_model("lstm")
        assert told(repository).keys() == {("lstm", 1), ("lstm", 2)}
        assert repository.find("lstm") is runner
    yaml.write_text("versions: [7]")
    with pytest.raises(LoadError, match=f"can be served: lstm 7: {says}"):
        await repository_of(tmp_path).load()


async def test_what_is_passed_over_is_logged_once(tmp_path: Path) -> None:
    """At the start at once; later when it has come to rest; again when it has been away."""
    write_lstm(tmp_path)
    (tmp_path / "v/v1").mkdir(parents=True)
    with capture_logs() as logs:
        async with loaded(tmp_path, model_control="poll") as repository:
            await look(repository, times=3)
            (tmp_path / "e/1").mkdir(parents=True)
            await look(repository, times=1)
            before = [entry["what"] for entry in logs if entry["event"] == "not served"]
            await look(repository, times=3)
    assert before == ["v has no version folder (found v1; expected a positive integer)"]
    after = [entry["what"] for entry in logs if entry["event"] == "not served"]
    assert after == [*before, "e/1 has no model.onnx (found nothing)"]


async def test_a_model_in_trouble_is_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no version, because nobody can tell which there are; what serves goes on, though it seems to be away."""
    write_lstm(tmp_path, "lstm")
    write_lstm(tmp_path, "other")
    listdir, away = os.listdir, {tmp_path / "other"}

    def refuse(path: Path) -> list[str]:
        if path in away:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    reason = "the model's folder cannot be read: Permission denied"
    async with loaded(tmp_path, model_control="poll") as repository:
        assert told(repository)["other", 0] == ("UNAVAILABLE", reason)
        with pytest.raises(ModelUnknown, match=f"model 'other' did not load: {reason}"):
            repository.find("other")
        away.clear()
        await look(repository)
        runner = repository.find("other")
        assert told(repository).keys() == {("lstm", 1), ("other", 1)}
        away.add(tmp_path / "other")
        await look(repository)
        assert repository.find("other") is runner
        away.clear()
        await look(repository)
        assert told(repository) == {("lstm", 1): ("READY", ""), ("other", 1): ("READY", "")}


async def test_a_reason_goes_with_its_files(tmp_path: Path) -> None:
    """What is not there any more did not fail to load."""
    write_lstm(tmp_path, "lstm")
    write_lstm(tmp_path, "other")
    async with loaded(tmp_path, model_control="poll") as repository:
        runner = repository.find("lstm")
        slot = runner.pool.allocate()
        (tmp_path / "lstm/model.yaml").write_text("version: [1]")
        await look(repository)
        assert "model.yaml is not valid" in told(repository)["lstm", 1][1]
        shutil.rmtree(tmp_path / "lstm")
        await look(repository)
        gone = "not in the folder any more; sessions and batch rows that go on: 1"
        assert told(repository)["lstm", 1] == ("UNLOADING", gone)
        runner.pool.free(slot)


@pytest.mark.parametrize("names", [("missing",), ("broken",), ("missing", "broken")])
async def test_none_of_the_models_that_are_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A server that was told what to serve, and can serve none of it, does not start."""
    write_lstm(tmp_path, "lstm")
    write_broken(tmp_path, "broken", 1)
    with pytest.raises(LoadError, match=r"no model in .* can be served: .*(missing|broken)"):
        await repository_of(tmp_path, model_control="explicit", load_models=names).load()


async def test_a_folder_that_stays_away_is_told_once(tmp_path: Path) -> None:
    """And when it is back."""
    folder = tmp_path / "models"
    write_lstm(folder)
    async with loaded(folder, model_control="poll") as repository:
        with capture_logs() as logs:
            folder.rename(tmp_path / "away")
            await look(repository, times=3)
            (tmp_path / "away").rename(folder)
            await look(repository, times=2)
    events = [entry["event"] for entry in logs]
    assert (events.count("repository not polled"), events.count("repository polled again")) == (1, 1)


# --- how often, and for how long, something is loaded ---


async def test_how_a_model_is_run_is_switched_too(tmp_path: Path) -> None:
    """The same file, run row by row: another runner. Sessions that it has go on in the one before."""
    write_lstm(tmp_path)
    async with loaded(tmp_path, model_control="poll") as repository:
        before = repository.find("lstm")
        (tmp_path / "lstm/model.yaml").write_text("row_by_row: true")
        await look(repository)
        after = repository.find("lstm")
        assert after.manifest.rows_per_run == 1
        assert after.digest == before.digest


async def test_how_fast_a_model_is_run_is_switched_too(tmp_path: Path) -> None:
    """The same file, run in other ticks: another runner; written anew, it is none."""
    write_lstm(tmp_path)
    async with loaded(tmp_path, model_control="poll") as repository:
        before = repository.find("lstm")
        (tmp_path / "lstm/model.yaml").write_text("max_tick_rows: 2")
        await look(repository)
        after = repository.find("lstm")
        assert after is not before
        assert after.digest == before.digest
        replace_lstm(tmp_path, "lstm", 1, seed=0)
        await look(repository)
        assert repository.find("lstm") is after
        for thread in threading.enumerate():
            if thread.name == "engine-lstm-1" and thread is not after._thread:
                await asyncio.to_thread(thread.join, 5)
                assert not thread.is_alive()


async def test_another_precision_is_another_model(tmp_path: Path) -> None:
    """It takes over like a new version; one that is not there changes nothing, and the reason is told."""
    path = write_lstm(tmp_path)
    write_int8(path)
    async with loaded(tmp_path, model_control="poll") as repository:
        assert repository.find("lstm").manifest.precision == "float32"
        (tmp_path / "lstm/model.yaml").write_text("precision: int8")
        await look(repository)
        small = repository.find("lstm")
        assert small.manifest.precision == "int8"
        path.with_name("model.int8.onnx").unlink()
        await look(repository)
        assert repository.find("lstm") is small
        state, reason = told(repository)["lstm", 1]
        assert (state, "asks for precision int8; model.onnx is float32" in reason) == ("READY", True)


async def test_the_error_that_was_measured_is_logged(tmp_path: Path) -> None:
    """When the model is loaded, beside its precision and its threads."""
    write_int8(write_lstm(tmp_path))
    (tmp_path / "lstm/model.yaml").write_text("precision: int8")
    with capture_logs() as logs:
        async with loaded(tmp_path):
            (line,) = (line for line in logs if line["event"] == "model loaded")
    assert (line["precision"], line["max_error"], line["threads"]) == ("int8", LOSS, 1)


@pytest.mark.parametrize(
    ("settings", "described", "limits"),
    [
        ({}, "", (512, 0.002, 0.05)),
        ({"tune_s": 0.01}, "", (96, 0.002, 0.05)),
        ({"tune_s": 0.01, "max_tick_rows": 512, "short_tick_ms": 3, "long_tick_ms": 30}, "", (512, 0.003, 0.03)),
        ({"max_tick_rows": 32, "short_tick_ms": 3}, "max_tick_rows: 16\nlong_tick_ms: 9", (16, 0.003, 0.009)),
        ({"short_tick_ms": 3, "long_tick_ms": 30}, "short_tick_ms: 1.5", (512, 0.0015, 0.03)),
        ({"max_queue_delay_us": 700}, "", (512, 0.002, 0.05, 0.0007)),
        ({"max_queue_delay_us": 700}, "max_queue_delay_us: 0", (512, 0.002, 0.05, 0)),
    ],
    ids=[
        "defaults",
        "measured",
        "flags before what was measured",
        "model.yaml before flags",
        "one key alone",
        "a delay",
        "none again",
    ],
)
async def test_where_the_limits_of_a_tick_come_from(
    tmp_path: Path,
    settings: dict[str, Any],
    described: str,
    limits: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From model.yaml, or else the flags, or else what was measured; and the pace of the first ticks from that."""
    given: list[Limits] = []
    paces: list[Pace | None] = []

    def seen(*more: Any, **named: Any) -> Runner:
        given.append(next(one for one in more if isinstance(one, Limits)))
        paces.append(named["pace"])
        return Runner(*more, **named)

    measured = tuple(
        Measurement(threads=1, rows=rows, steps=1, seconds=max(96, rows), cpu_s=0) for rows in (1, 96, 512)
    )
    monkeypatch.setattr("service.repository.Runner", seen)
    monkeypatch.setattr("service.versions.tuner.measure", lambda *more: measured)
    write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text(described)
    async with loaded(tmp_path, **settings):
        (limit,), (pace,) = given, paces
        came = (limit.tick_rows, limit.short_tick_s, limit.long_tick_s, limit.delay_s)
        assert came == pytest.approx((*limits, 0)[:4])
        assert pace is not None
        assert (pace.step_s(512, 1) == 512) == ("tune_s" in settings)


async def test_a_policy_is_no_reason_to_load_anew(tmp_path: Path) -> None:
    """Nor is one that could not be read and is mended."""
    write_lstm(tmp_path, "lstm", 1)
    with gated() as gate:
        async with loaded(tmp_path, model_control="poll") as repository:
            for text in ("versions: [1]", "versions: newest", "versions: {latest: 2}"):
                (tmp_path / "lstm/model.yaml").write_text(text)
                await look(repository)
            assert told(repository)["lstm", 1] == ("READY", "")
        assert gate.begun == ["lstm 1"]


async def test_one_content_is_held_once(tmp_path: Path) -> None:
    """However often it is unloaded and loaded while sessions hold it; and when the files before come back."""
    write_lstm(tmp_path, "lstm", 1, seed=1)
    async with loaded(tmp_path, model_control="explicit", load_models=("*",)) as repository:
        first = repository.find("lstm")
        slots = [first.pool.allocate()]
        for _ in range(3):
            await repository.unload_model("lstm")
            await repository.load_model("lstm")
            assert list(repository) == [first]
        replace_lstm(tmp_path, "lstm", 1, seed=2)
        await repository.load_model("lstm")
        second = repository.find("lstm")
        slot = second.pool.allocate()
        replace_lstm(tmp_path, "lstm", 1, seed=1)
        await repository.load_model("lstm")
        assert list(repository) == [first, second]
        second.pool.free(slot)
        first.pool.free(slots.pop())


async def test_former_states_of_a_model_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds its weights: no other is loaded until the sessions of one have ended; then it is, by itself."""
    monkeypatch.setattr("service.repository._MOST_IN_USE", 2)
    write_lstm(tmp_path, "lstm", 1, seed=0)
    async with loaded(tmp_path, model_control="poll") as repository:
        held = []
        for seed in (1, 2, 3):
            runner = repository.find("lstm")
            held.append((runner, runner.pool.allocate()))
            replace_lstm(tmp_path, "lstm", 1, seed=seed)
            with capture_logs() as logs:
                await look(repository, times=4)
        says = "sessions go on with 2 former states of the model; it is loaded when fewer do"
        assert says in told(repository)["lstm", 1][1]
        assert [entry["reason"] for entry in logs if entry["event"] == "model not loaded"] == [says]
        assert repository.find("lstm") is runner
        for one, slot in held:
            one.pool.free(slot)
        await repository.free()
        await look(repository)
        assert repository.find("lstm") is not runner
        assert told(repository)["lstm", 1] == ("READY", "")


async def test_files_that_change_while_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read may be of neither: it is not served, and the files are loaded again once they rest."""
    write_lstm(tmp_path, "lstm", 1, seed=1)

    def late(path: Path, settings: Settings) -> Loaded:
        result = load_model(path, settings)
        replace_lstm(tmp_path, "lstm", 1, seed=3)
        return result

    async with loaded(tmp_path, model_control="poll") as repository:
        before = repository.find("lstm")
        replace_lstm(tmp_path, "lstm", 1, seed=2)
        with monkeypatch.context() as patch:
            patch.setattr("service.versions.tuner.load_model", late)
            await look(repository)
        assert told(repository)["lstm", 1] == (
            "READY",
            "the files have changed and did not load: its files changed while they were loaded",
        )
        assert repository.find("lstm") is before
        await look(repository)
        assert (
            repository.find("lstm").digest == hashlib.sha256((tmp_path / "lstm/1/model.onnx").read_bytes()).hexdigest()
        )


async def test_a_load_that_does_not_end(tmp_path: Path) -> None:
    """Is given up: its reason is told, and its place is for others; the server is ready without it."""
    write_lstm(tmp_path, "large")
    write_lstm(tmp_path, "small")
    with gated("large") as gate:
        async with loaded(tmp_path, load_timeout_s=0.2) as repository:
            await gate.one_waits()
            assert repository.names() == ["small"]
            says = "the model was not loaded within 0.2 s (--load-timeout-s)"
            assert told(repository)["large", 1] == ("UNAVAILABLE", says)
            gate.open()


async def test_what_is_asked_for_twice_is_done_once(tmp_path: Path) -> None:
    """Callers that wait for their turn wait for one load, also when most have gone; an unload between parts them."""
    write_broken(tmp_path, "a", 1)
    with gated("a") as gate:
        async with loaded(tmp_path, model_control="explicit") as repository:
            calls = [asyncio.create_task(repository.load_model("a"))]
            await gate.one_waits()
            for _ in range(20):
                calls.append(asyncio.create_task(repository.load_model("a")))
                await asyncio.sleep(0)
                calls[-1].cancel()
            calls += [asyncio.create_task(call("a")) for call in (repository.load_model, repository.unload_model)]
            calls += [asyncio.create_task(repository.load_model("a")) for _ in range(5)]
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(*calls, return_exceptions=True)
            assert gate.begun == ["a 1"] * 3


async def test_one_look_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask for whatever: those that come during a look share the next."""
    write_lstm(tmp_path)
    looks = []

    def counted(folder: Path) -> dict[str, ModelFolder]:
        looks.append(threading.active_count())
        return scan(folder)

    async with loaded(tmp_path, model_control="explicit") as repository:
        monkeypatch.setattr("service.repository.scan", counted)
        calls = (repository.load_model(f"no-{number}") for number in range(50))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {ModelUnknown}
        assert len(looks) <= 2


async def test_a_model_that_is_away_while_it_is_loaded(tmp_path: Path) -> None:
    """Another model's load sees it gone and forgets it; when it is loaded it is served all the same."""
    write_lstm(tmp_path, "a")
    write_lstm(tmp_path, "b")
    read, reading, go_on = wanted, threading.Semaphore(0), threading.Event()

    def held_up(model: ModelFolder, latest: int) -> Any:
        result = read(model, latest)
        if model.path.name == "a":
            reading.release()
            assert go_on.wait(30)
        return result

    with pytest.MonkeyPatch.context() as patch:
        async with loaded(tmp_path, model_control="explicit") as repository:
            patch.setattr("service.repository.wanted", held_up)
            call = asyncio.create_task(repository.load_model("a"))
            assert await asyncio.to_thread(reading.acquire, timeout=30)
            (tmp_path / "a").rename(tmp_path / ".a")
            await repository.load_model("b")
            (tmp_path / ".a").rename(tmp_path / "a")
            go_on.set()
            await call
            assert repository.names() == ["a", "b"]


async def test_polling_leaves_a_model_whose_turn_it_is_alone(tmp_path: Path) -> None:
    """While it is loaded no further change of it begins, however often it is looked at."""
    write_lstm(tmp_path, "other")
    with gated("lstm") as gate:
        async with loaded(tmp_path, model_control="poll") as repository:
            write_lstm(tmp_path, "lstm", 1)
            await repository.poll()
            await repository.poll()
            await gate.one_waits()
            write_lstm(tmp_path, "lstm", 2)
            for _ in range(10):
                await repository.poll()
            assert len(repository._changes) == 1
            gate.open()
            await repository.settle()
            await look(repository)
            assert repository.versions("lstm") == [2]


async def test_the_old_goes_on_where_nothing_new_can_be_had(tmp_path: Path) -> None:
    """A policy that none of the versions can follow takes none away."""
    write_lstm(tmp_path, "lstm", 1)
    write_broken(tmp_path, "lstm", 2)
    async with loaded(tmp_path, model_control="poll") as repository:
        assert repository.versions("lstm") == [1]
        (tmp_path / "lstm/model.yaml").write_text("versions: [2]")
        await look(repository)
        assert repository.versions("lstm") == [1]


async def test_what_did_not_load_has_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it failed so late that its runner was there."""
    write_lstm(tmp_path, "lstm")
    write_lstm(tmp_path, "odd")

    def fail(runner: Runner) -> None:
        if runner.name == "odd":
            raise RuntimeError("no kernel")

    monkeypatch.setattr(Runner, "warm_up", fail)
    metrics = Metrics()
    repository = Repository(Settings(repository=tmp_path, threads=1, tune_s=0), metrics, Clock())
    await repository.load()
    assert b'model="lstm"' in generate_latest(metrics.registry)
    assert b'model="odd"' not in generate_latest(metrics.registry)
    assert await repository.stop(30)


async def test_what_is_being_loaded_is_not_forgotten(tmp_path: Path) -> None:
    """Its files may seem to be away for a moment; it is there when it comes."""
    write_lstm(tmp_path, "a")
    write_lstm(tmp_path, "b")
    with gated("a") as gate:
        async with loaded(tmp_path, model_control="explicit") as repository:
            call = asyncio.create_task(repository.load_model("a"))
            await gate.one_waits()
            (tmp_path / "a").rename(tmp_path / ".a")
            await repository.load_model("b")
            assert told(repository)["a", 1] == ("LOADING", "")
            (tmp_path / ".a").rename(tmp_path / "a")
            gate.open()
            await call
            assert repository.names() == ["a", "b"]


# --- devices ---


@pytest.mark.parametrize(("settings", "fallback"), [({}, False), ({"device": "cuda", "fallback": "allow"}, True)])
async def test_states_that_do_not_fit_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fallback: bool
) -> None:
    """The CPU runs the model where it may, and says why; by name alone it is not served."""

    class Little(HostDevice):
        def empty(self, shape: Any, dtype: Any) -> Any:
            if shape[0] > 50_000:
                raise MemoryError("out of memory")
            return super().empty(shape, dtype)

    monkeypatch.setattr("service.versions.loading.why_no_cuda", lambda gpu_id: None)
    monkeypatch.setattr("service.versions.loading.CudaDevice", lambda gpu_id: Little())
    write_lstm(tmp_path)
    async with loaded(tmp_path, max_sessions=60_000, **settings) as repository:
        choice = repository.find("lstm").choice
        assert (choice.device, choice.fallback) == ("cpu", fallback)
        assert "states" in choice.reason
    with pytest.raises(LoadError, match=r"CUDA was asked for and does not run it: .*states"):
        await repository_of(tmp_path, max_sessions=60_000, device="cuda").load()


@pytest.mark.parametrize(
    ("control", "yaml", "starts"),
    [
        ("explicit", "device: cpu", True),
        ("explicit", "device: auto", True),
        ("explicit", "fallback: allow", True),
        ("explicit", "", False),
        ("explicit", "device: cuda", False),
        ("explicit", None, False),
        ("poll", None, False),
    ],
)
async def test_waiting_for_models_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: str, yaml: str | None, starts: bool
) -> None:
    """A server that is told to use CUDA waits for none but models that do without, as those that are there say."""
    monkeypatch.setattr("service.repository.why_no_cuda", lambda gpu_id: "no driver")
    if yaml is not None:
        write_lstm(tmp_path)
        (tmp_path / "lstm/model.yaml").write_text(yaml)
    repository = repository_of(tmp_path, device="cuda", model_control=control)
    if starts:
        await repository.load()
    else:
        with pytest.raises(LoadError, match=r"none that is there does without: no driver"):
            await repository.load()
