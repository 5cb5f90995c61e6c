"""A real model measured, and what is kept of it between two loads."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from structlog.testing import capture_logs

from service.engines.provider import NotOnCuda
from service.engines.resident_engine import ResidentEngine
from service.errors import LoadError
from service.graphs.placement import Choice
from service.settings import Settings
from service.states.device import HostDevice
from service.tune import tune
from service.versions import loading, tuner, tuning_file
from service.versions.loading import Loaded, TooLong, load_model
from service.versions.trial import measure
from service.versions.tuner import tuned
from service.versions.tuning import Measurement, Tuning
from tests.any_graphs import CASES, Case
from tests.graphs import replace_lstm, write_lstm

SETTINGS = Settings(device="cpu", tune_s=0.05)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many the machine has."""
    monkeypatch.setattr(tuning_file, "cores", lambda: 2)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The thread counts of each time that a model was measured."""
    counts: list[tuple[int, ...]] = []

    def counted(graph_with: Any, given: tuple[int, ...], *more: Any) -> tuple[Measurement, ...]:
        counts.append(given)
        return measure(graph_with, given, *more)

    monkeypatch.setattr(tuner, "measure", counted)
    return counts


def paying(threads: int) -> Callable[..., tuple[Measurement, ...]]:
    """A measurement, without measuring, by which so many threads are the best."""

    def found(graph_with: Any, counts: tuple[int, ...], *more: Any) -> tuple[Measurement, ...]:
        times = {count: 1.0 if count == threads else 9.0 for count in counts}
        assert all(graph_with(count).manifest is not None for count in counts)
        return tuple(Measurement(threads=n, rows=64, steps=1, seconds=s, cpu_s=s) for n, s in times.items())

    return found


def test_measured_once(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    """A second load finds what the first has measured, beside the model; asked to, it measures again."""
    path = write_lstm(tmp_path)
    _, first = tuned(path, SETTINGS)
    assert first.measured
    assert first.pace.step_s(1, 1) > 0
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "tuning.json"]
    assert tuned(path, SETTINGS)[1] == first
    assert measured == [(1, 2)]
    _, again = tuned(path, SETTINGS, anew=True)
    assert {one.threads for one in again.measured} == {1, 2}
    assert measured == [(1, 2), (1, 2)]
    assert tuned(path, SETTINGS)[1] == again


def test_another_file_or_another_machine(
    tmp_path: Path, measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is measured anew; coming back to the first, nothing is."""
    first = write_lstm(tmp_path)
    tuned(first, SETTINGS)
    kept = (first.parent / "tuning.json").read_bytes()
    second = replace_lstm(tmp_path, "lstm", 1, seed=1)
    (second.parent / "tuning.json").write_bytes(kept)
    tuned(second, SETTINGS)
    assert len(measured) == 2
    monkeypatch.setattr(tuning_file, "cores", lambda: 4)
    tuned(second, SETTINGS)
    assert measured[2:] == [(1, 2, 4)]
    monkeypatch.setattr(tuning_file, "cores", lambda: 2)
    tuned(second, SETTINGS)
    assert len(measured) == 3


def test_what_is_kept_may_be_wrong(
    tmp_path: Path, measured: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told, and the model is measured."""
    path = write_lstm(tmp_path)
    (path.parent / "tuning.json").write_text('{"format": 7}')
    assert tuned(path, SETTINGS)[1].measured
    assert "what was measured before is not used" in capsys.readouterr().out
    tuned(path, SETTINGS)
    assert len(measured) == 1


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, measured: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """No failure: the model is measured each time, and the log says why."""
    path = write_lstm(tmp_path)
    (tmp_path / "file").touch()
    settings = SETTINGS.model_copy(update={"cache_dir": tmp_path / "file"})
    for _ in range(2):
        assert tuned(path, settings)[1].measured
    assert "what was measured is not kept" in capsys.readouterr().out
    assert len(measured) == 2


def test_a_folder_for_what_was_measured(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    """Nothing is written beside the model then."""
    path = write_lstm(tmp_path / "models")
    settings = SETTINGS.model_copy(update={"cache_dir": tmp_path / "cache"})
    tuned(path, settings)
    assert (tmp_path / "cache/lstm/1/tuning.json").is_file()
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    tuned(path, settings)
    assert len(measured) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_that_pay_are_those_it_runs_with(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured now and measured before."""
    path = write_lstm(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "measure", paying(threads))
        now, _ = tuned(path, SETTINGS)
    before, tuning = tuned(path, SETTINGS)
    assert now.threads == before.threads == tuning.threads == threads
    assert now.graph.digest == before.graph.digest


@pytest.mark.parametrize(
    ("settings", "described", "threads"),
    [({"threads": 2}, "", 2), ({}, "threads: 2", 2), ({"threads": 2}, "threads: 3", 3)],
    ids=["flag", "model.yaml", "both"],
)
def test_threads_that_are_given_are_not_chosen(
    tmp_path: Path, settings: dict[str, Any], described: str, threads: int, measured: list[tuple[int, ...]]
) -> None:
    """The model's own file goes first; measured are the sizes of ticks alone."""
    path = write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text(described)
    loaded, tuning = tuned(path, SETTINGS.model_copy(update=settings))
    assert loaded.threads == tuning.threads == threads
    assert measured == [(threads,)]


def test_nothing_is_measured_unless_wanted(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    """One thread then, and nothing is read or written."""
    path = write_lstm(tmp_path)
    (path.parent / "tuning.json").write_text("nothing of use")
    loaded, tuning = tuned(path, SETTINGS.model_copy(update={"tune_s": 0}))
    assert (loaded.threads, tuning.threads, tuning.tick_rows, tuning.measured) == (1, 1, 512, ())
    assert measured == []
    assert (path.parent / "tuning.json").read_text() == "nothing of use"


def test_a_measurement_that_fails_is_no_failure_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is served as though nothing were to be measured, and nothing is kept; who asks to measure is told."""

    def fail(*given: Any) -> tuple[Measurement, ...]:
        raise RuntimeError("a table has 64 rows")

    path = write_lstm(tmp_path)
    monkeypatch.setattr(tuner, "measure", fail)
    loaded, tuning = tuned(path, SETTINGS)
    assert (loaded.threads, tuning) == (1, Tuning(1))
    assert "a table has 64 rows" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    with pytest.raises(LoadError, match="could not be measured: a table has 64 rows"):
        tuned(path, SETTINGS, anew=True)


def test_what_is_measured_is_within_the_servers_ticks(tmp_path: Path) -> None:
    """Rows as the model or the settings say, and steps as a chunk may have."""
    path = write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text("max_tick_rows: 4")
    _, tuning = tuned(path, SETTINGS.model_copy(update={"max_steps": 8, "max_tick_rows": 16}))
    assert max(one.rows for one in tuning.measured) <= 4
    assert {one.steps for one in tuning.measured} == {1}


def test_what_was_measured_beside_a_load_is_not_kept(
    tmp_path: Path, measured: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It serves until the next start, which measures again."""
    path = write_lstm(tmp_path)
    settings = SETTINGS.model_copy(update={"tune_s": 0.01})
    with tuner.loading(settings):
        assert tuned(path, settings)[1].measured
    assert "other models were loaded meanwhile" in capsys.readouterr().out
    assert not (path.parent / "tuning.json").exists()
    tuned(path, settings)
    assert (path.parent / "tuning.json").exists()
    assert len(measured) == 2


def test_a_model_that_takes_long_to_load_is_not_loaded_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would miss its time for loading otherwise; that other numbers of threads were not tried is told."""
    path = write_lstm(tmp_path)
    loads = []

    def counted(*given: Any) -> Loaded:
        loads.append(given)
        return load_model(*given)

    now = itertools.count(step=20)
    monkeypatch.setattr(tuner, "load_model", counted)
    monkeypatch.setattr("service.versions.tuner.time.perf_counter", lambda: next(now))
    settings = SETTINGS.model_copy(update={"load_timeout_s": 50})
    assert tuned(path, settings)[0].threads == 1
    assert len(loads) == 1
    assert "other numbers of threads were not tried" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "measure", paying(2))
        assert tuned(path, settings, anew=True)[1].threads == 2
    loads.clear()
    loaded, tuning = tuned(path, settings)
    assert (loaded.threads, tuning.threads, len(loads)) == (1, 1, 1)
    assert "not run with the threads that pay" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_from_elsewhere(tmp_path: Path, case: Case) -> None:
    """Whatever axes, states and inputs a graph has, and whether rows and steps run one by one, it can be measured."""
    loaded, tuning = tuned(case.write(tmp_path), SETTINGS.model_copy(update={"tune_s": 1e-3}))
    assert tuning.measured
    assert loaded.threads == tuning.threads


def timed(on_cuda: float, on_cpu: float) -> Callable[..., tuple[Measurement, ...]]:
    """A measurement, without measuring, in which runs take so many seconds on either device."""

    def found(graph_with: Any, counts: tuple[int, ...], *more: Any) -> tuple[Measurement, ...]:
        seconds = on_cuda if isinstance(graph_with(counts[0]), ResidentEngine) else on_cpu
        return tuple(
            Measurement(threads=count, rows=rows, steps=1, seconds=seconds, cpu_s=seconds)
            for count in counts
            for rows in (1, 16, 64)
        )

    return found


@pytest.mark.parametrize(
    ("asked", "on_cuda", "on_cpu", "device", "reason"),
    [
        ("auto", 1.0, 4.0, "cuda", "CUDA does 4 times the CPU's steps per second, as measured"),
        ("auto", 4.0, 1.0, "cpu", "CUDA does 0.25 times the CPU's steps per second, as measured"),
        ("cuda", 4.0, 1.0, "cuda", "asked for"),
    ],
)
def test_the_quicker_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, on_cuda: float, on_cpu: float, device: str, reason: str
) -> None:
    """Where either may run a model the quicker one does, and the figures are told; asked for by name nothing is tried.

    CUDA's place is taken by this machine's memory; what runs take is handed in.
    """
    monkeypatch.setattr(loading, "why_no_cuda", lambda gpu_id: None)
    monkeypatch.setattr(loading, "CudaDevice", lambda gpu_id: HostDevice())
    monkeypatch.setattr(tuner, "measure", timed(on_cuda, on_cpu))
    path = write_lstm(tmp_path)
    settings = Settings(device=asked, tune_s=0.05, threads=1, cache_dir=tmp_path / "measured")
    with capture_logs() as logs:
        loaded, tuning = tuned(path, settings)
    assert (loaded.choice.device, loaded.choice.reason) == (device, reason)
    assert isinstance(loaded.graph, ResidentEngine) == (device == "cuda")
    assert {one.seconds for one in tuning.measured} == {on_cuda if device == "cuda" else on_cpu}
    compared = [one for one in logs if one["event"] == "devices compared"]
    if asked == "auto":
        assert compared[0]["quicker"] == device
        assert compared[0]["rows_64"] == f"{on_cuda * 1e6:.0f} us against {on_cpu * 1e6:.0f} us"
    else:
        assert compared == []
    (chosen,) = [one for one in logs if one["event"] == "device chosen"]
    assert (chosen["device"], chosen["reason"]) == (device, reason)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA starts, and its device is this machine's own memory."""
    monkeypatch.setattr(loading, "why_no_cuda", lambda gpu_id: None)
    monkeypatch.setattr(loading, "CudaDevice", lambda gpu_id: HostDevice())


def test_captured_graphs_are_measured_for_themselves(
    tmp_path: Path, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured without them says nothing of ticks that may be captured."""
    given: list[Any] = []

    def measured(*what: Any) -> Any:
        given.append(what)
        return timed(1.0, 4.0)(*what)

    monkeypatch.setattr(tuner, "measure", measured)
    path = write_lstm(tmp_path)
    settings = Settings(device="cuda", tune_s=0.05)
    with_graphs = settings.model_copy(update={"cuda_graphs": "on"})
    for asked, runs in ((settings, 1), (settings, 1), (with_graphs, 2)):
        tuned(path, asked)
        assert len(given) == runs


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_device_with_memory_for_one(
    tmp_path: Path, cuda: None, monkeypatch: pytest.MonkeyPatch, asked: Literal["auto", "cuda"]
) -> None:
    """What was measured there is what serves: a second copy of it beside the first is not made."""
    live: weakref.WeakSet[Any] = weakref.WeakSet()

    class Small(ResidentEngine):
        def __init__(self, path: Path, *given: Any, **more: Any) -> None:
            if live:
                raise NotOnCuda(path.name, "out of memory")
            super().__init__(path, *given, **more)
            live.add(self)

    monkeypatch.setattr(loading, "ResidentEngine", Small)
    monkeypatch.setattr(tuner, "measure", timed(1.0, 4.0))
    loaded, tuning = tuned(write_lstm(tmp_path), Settings(device=asked, tune_s=0.05))
    assert loaded.choice.device == "cuda"
    assert loaded.graph in live
    assert tuning.measured


@pytest.mark.parametrize(
    ("takes_s", "reason"), [(0.0, "the CPU takes too much of the time"), (3.0, "it takes long to load on CUDA")]
)
def test_a_slow_cpu_loses_no_model_of_cuda(
    tmp_path: Path, cuda: None, monkeypatch: pytest.MonkeyPatch, takes_s: float, reason: str
) -> None:
    """The CPU has a share of the time for loading to be compared in, and none where most of it is gone."""
    given_s: list[float] = []
    now = 0.0

    def load(path: Path, settings: Settings, *given: Any, choice: Choice | None = None) -> Loaded:
        nonlocal now
        if choice is None:
            now += takes_s
            return load_model(path, settings, *given)
        given_s.append(settings.load_timeout_s)
        raise TooLong("too long")

    monkeypatch.setattr("service.versions.tuner.time.perf_counter", lambda: now)
    monkeypatch.setattr(tuner, "load_model", load)
    monkeypatch.setattr(tuner, "measure", timed(1.0, 4.0))
    with capture_logs() as logs:
        loaded, _ = tuned(write_lstm(tmp_path), Settings(device="auto", tune_s=0.05, load_timeout_s=5.0))
    assert loaded.choice.device == "cuda"
    (said,) = [one for one in logs if one["event"] == "devices not compared"]
    assert reason in said["reason"]
    assert given_s == ([] if takes_s else [2.0])


def test_the_file_that_ran_is_the_one_that_is_told(
    tmp_path: Path, cuda: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """``service tune`` names the form for CUDA where that is what was measured."""
    path = write_lstm(tmp_path)
    path.with_name("model.cuda.onnx").write_bytes(path.read_bytes())
    assert tune(Settings(repository=tmp_path, device="cuda", tune_s=0.01), None) == 0
    assert "lstm 1: model.cuda.onnx, float32" in capsys.readouterr().out
