"""A model that is ready to run, run as well as this machine can: as was measured before, or by measuring now.

Owns whether to measure, on which devices, and with which thread counts. Must not know runners or sessions. Called in a
thread of its own.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import structlog

from service.engines.provider import VERSION, gpu_name
from service.errors import LoadError
from service.graphs.graph import Graph
from service.graphs.placement import Choice
from service.settings import Settings
from service.versions import tuning_file
from service.versions.loading import Loaded, TooLong, in_brief, load_model, no_longer_than
from service.versions.quiet import Quiet
from service.versions.trial import measure
from service.versions.tuning import WIDEST, Bounds, Measurement, Tuning, choose, speedup, thread_counts
from service.versions.tuning_file import Subject, Unusable

log = structlog.get_logger()

_PATIENCE, _MOST_PATIENCE_S = 10, 60.0
"""How many times the seconds of a measurement others are waited for: one that never ends must not hold them up."""
_IN_HASTE = 0.5
"""Share of the time for loading after which a model is not made ready once more."""
_COMPARED_BY = 0.8
"""Share of it by which the devices are compared: half of what is left then is to load on the CPU, half to measure."""
_quiet = Quiet()


def loading(settings: Settings) -> AbstractContextManager[None]:
    """Within it a model is loaded, or warmed: none is measured meanwhile, as far as that can be waited for."""
    return _quiet.loading(_patience_s(settings))


def _patience_s(settings: Settings) -> float:
    return min(_PATIENCE * settings.tune_s, _MOST_PATIENCE_S)


def tuned(path: Path, settings: Settings, anew: bool = False, choice: Choice | None = None) -> tuple[Loaded, Tuning]:
    """Load a model on the device that is quicker, where either may run it, with as many threads as pay; say which.

    A number of threads in model.yaml or in the settings is taken as it is; measured are the sizes of ticks all the
    same. Where nothing is to be measured a run has one thread.

    Args:
        path: DIR/NAME/VERSION/model.onnx.
        settings: of the server.
        anew: measure although that was done before, and every thread count whether it pays or not.
        choice: the device that is to run it, where that was chosen already.

    Raises:
        LoadError: if it cannot be served; the text says why.
    """
    began = time.perf_counter()
    loaded, tuning = _tuned(path, settings, anew, choice)
    asked = loaded.description.device or settings.device
    told = log.bind(model=path.parent.parent.name, version=path.parent.name)
    if asked == "auto" and loaded.choice.device == "cuda" and tuning.measured:
        spent_s = 0.0 if anew else time.perf_counter() - began
        loaded, tuning = _quicker(path, settings, anew, loaded, tuning, spent_s, told)
    choice = loaded.choice
    level: Literal["info", "warning"] = "warning" if choice.fallback else "info"
    what = "CUDA was asked for, and the CPU runs the model" if choice.fallback else "device chosen"
    reason = in_brief(choice.reason, settings, level)
    getattr(told, level)(what, asked=asked, device=choice.device, file=choice.file, reason=reason)
    return loaded, tuning


def _quicker(
    path: Path, settings: Settings, anew: bool, loaded: Loaded, tuning: Tuning, spent_s: float, told: Any
) -> tuple[Loaded, Tuning]:
    """Hold a model that CUDA runs against itself on the CPU, within what is left of the time for loading."""
    # A model that CUDA runs is not given up for a CPU that is slow: what follows for it takes of the time too.
    left_s = settings.load_timeout_s * _COMPARED_BY - spent_s
    if spent_s > _IN_HASTE * settings.load_timeout_s:
        told.info("devices not compared", reason="it takes long to load on CUDA: say device in model.yaml")
        return loaded, tuning
    in_time = settings if anew else settings.model_copy(update={"load_timeout_s": left_s / 2})
    try:
        other, of_cpu = _tuned(path, in_time, anew, Choice("cpu", "", file=loaded.path.name))
    except TooLong:
        told.info("devices not compared", reason="the CPU takes too much of the time for loading (--load-timeout-s)")
        return loaded, tuning
    except LoadError as error:
        told.info("only CUDA runs the model", reason=str(error))
        return loaded, tuning
    times = speedup(tuning, of_cpu)
    if times is None:
        return loaded, tuning
    reason = f"CUDA does {times:.2g} times the CPU's steps per second, as measured"
    device = "cuda" if times >= 1 else "cpu"
    told.info("devices compared", quicker=device, **_side_by_side(tuning, of_cpu))
    if times >= 1:
        return replace(loaded, choice=replace(loaded.choice, reason=reason)), tuning
    return replace(other, choice=replace(other.choice, reason=reason)), of_cpu


def _side_by_side(cuda: Tuning, cpu: Tuning) -> dict[str, str]:
    """What runs of one step took on either, in microseconds, for people."""
    micros = [
        {one.rows: one.seconds * 1e6 for one in each.measured if (one.threads, one.steps) == (each.threads, 1)}
        for each in (cuda, cpu)
    ]
    rows = [number for number in (1, 16, 64, 256) if all(number in one for one in micros)]
    return {f"rows_{number}": " against ".join(f"{one[number]:.0f} us" for one in micros) for number in rows}


def _tuned(path: Path, settings: Settings, anew: bool, choice: Choice | None = None) -> tuple[Loaded, Tuning]:
    with loading(settings):
        began = time.perf_counter()
        loaded = load_model(path, settings) if choice is None else load_model(path, settings, choice=choice)
        load_s = time.perf_counter() - began
    if not settings.tune_s:
        return loaded, Tuning(loaded.threads)
    fixed = loaded.description.threads or settings.threads or loaded.choice.device != "cpu"
    counts = (loaded.threads,) if fixed else thread_counts(tuning_file.cores())
    name, version = path.parent.parent.name, path.parent.name
    folder = path.parent if settings.cache_dir is None else settings.cache_dir / name / version
    file, subject = folder / tuning_file.NAME, _subject(loaded, counts, settings)
    told = log.bind(model=name, version=version, file=str(file))
    measured: tuple[Measurement, ...] = ()
    if not anew:
        try:
            measured = tuning_file.read(file, subject)
        except Unusable as error:
            told.warning("what was measured before is not used", reason=str(error))
    known = bool(measured)
    if not known:
        with _quiet.measuring(_patience_s(settings)) as turn:
            try:
                measured = _measured(path, settings, counts, loaded, load_s, anew)
            except TooLong:
                raise
            except Exception as error:
                if anew:
                    raise LoadError(f"it could not be measured: {error}") from error
                told.warning("not measured, and served as though it were not to be", reason=str(error))
        try:
            if measured and not turn.alone:
                raise Unusable("other models were loaded meanwhile, so that it may be wrong; the next start measures")
            if measured:
                tuning_file.write(file, subject, measured)
        except Unusable as error:
            told.info("what was measured is not kept", reason=str(error))
    tuning = choose(measured) if measured else Tuning(loaded.threads)
    # What was measured keeps the memory of its largest runs: another one is served, where there is time to load it; but
    # not on a device, which may have no memory for two.
    on_cpu = loaded.choice.device == "cpu"
    in_haste = not anew and time.perf_counter() - began + load_s > _IN_HASTE * settings.load_timeout_s
    best = loaded
    if on_cpu and not in_haste and (not known or tuning.threads != loaded.threads):
        with loading(settings):
            best = load_model(path, settings, tuning.threads, loaded)
    if measured:
        _tell(told, "before" if known else "now", counts, tuning, round(time.perf_counter() - began - load_s, 3))
    if best.threads != tuning.threads:
        told.warning("not run with the threads that pay", reason="it takes long to load: say threads in model.yaml")
    return best, replace(tuning, threads=best.threads)


def _tell(told: Any, when: str, counts: tuple[int, ...], tuning: Tuning, seconds: float) -> None:
    fastest = max((one for one in tuning.measured if one.threads == tuning.threads), key=lambda one: one.steps_per_s)
    tried = sorted({one.threads for one in tuning.measured})
    told.info(
        "model tuned",
        measured=when,
        sizes=len(tuning.measured),
        compared=tried,
        threads=tuning.threads,
        tick_rows=tuning.tick_rows,
        steps_per_s=round(fastest.steps_per_s),
        with_rows=fastest.rows,
        and_steps=fastest.steps,
        seconds=seconds,
    )
    if len(tried) == 1 < len(counts):
        told.info(
            "other numbers of threads were not tried", reason="it takes long to load; python -m service tune does"
        )


def _subject(loaded: Loaded, counts: tuple[int, ...], settings: Settings) -> Subject:
    choice = loaded.choice
    how = [gpu_name(settings.gpu_id), choice.file, choice.digest, "tf32" if choice.tf32 else ""]
    how.append("graphs" if settings.cuda_graphs == "on" else "")
    return Subject(
        digest=loaded.graph.digest,
        row_by_row=loaded.graph.manifest.rows_per_run == 1,
        provider=loaded.provider,
        onnxruntime=VERSION,
        cpu=tuning_file.cpu_name(),
        cores=tuning_file.cores(),
        counts=counts,
        gpu=" ".join(filter(None, how)) if choice.device == "cuda" else "",
    )


def _measured(
    path: Path, settings: Settings, counts: tuple[int, ...], loaded: Loaded, load_s: float, every: bool
) -> tuple[Measurement, ...]:
    ready = {loaded.threads: loaded}

    def graph_with(threads: int) -> Graph:
        if threads not in ready:
            ready[threads] = load_model(path, settings, threads, loaded)
        return ready[threads].graph

    def interrupt() -> None:
        for one in list(ready.values()):
            one.interrupt()

    bounds = Bounds(
        rows=loaded.description.max_tick_rows or settings.max_tick_rows or WIDEST.rows,
        steps=settings.max_steps,
        cells=settings.max_tick_steps,
    )
    with no_longer_than(settings.load_timeout_s, interrupt):
        return measure(graph_with, counts, settings.tune_s, load_s, every, bounds)
