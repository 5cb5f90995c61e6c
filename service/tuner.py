"""A model that is ready to run, run as well as this machine can: as was measured before, or by measuring now.

Owns whether to measure, and with which thread counts. Must not know runners or sessions. Called in a thread of its own.
"""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from service import tuning_file
from service.engine import VERSION
from service.graph import Graph
from service.loading import Loaded, load_model, no_longer_than
from service.settings import Settings
from service.trial import measure
from service.tuning import Measurement, Tuning, choose, thread_counts
from service.tuning_file import Subject, Unusable

log = structlog.get_logger()


def tuned(path: Path, settings: Settings, anew: bool = False) -> tuple[Loaded, Tuning]:
    """Load a model with as many threads as pay.

    A number of threads in model.yaml or in the settings is taken as it is; measured are the sizes of ticks all the
    same. Where nothing is to be measured a run has one thread.

    Args:
        path: DIR/NAME/VERSION/model.onnx.
        settings: of the server.
        anew: measure although that was done before, and every thread count whether it pays or not.

    Raises:
        LoadError: if it cannot be served; the text says why.
    """
    began = time.perf_counter()
    loaded = load_model(path, settings)
    load_s = time.perf_counter() - began
    if not settings.tune_s:
        return loaded, Tuning(loaded.threads)
    fixed = loaded.description.threads or settings.threads or loaded.provider != "CPUExecutionProvider"
    counts = (loaded.threads,) if fixed else thread_counts(tuning_file.cores())
    name, version = path.parent.parent.name, path.parent.name
    folder = path.parent if settings.cache_dir is None else settings.cache_dir / name / version
    file, subject = folder / tuning_file.NAME, _subject(loaded, counts)
    told = log.bind(model=name, version=version, file=str(file))
    began = time.perf_counter()
    measured: tuple[Measurement, ...] = ()
    if not anew:
        try:
            measured = tuning_file.read(file, subject)
        except Unusable as error:
            told.warning("what was measured before is not used", reason=str(error))
    known = bool(measured)
    if not known:
        measured = _measured(path, settings, counts, loaded, load_s, anew)
        try:
            tuning_file.write(file, subject, measured)
        except Unusable as error:
            told.info("what was measured is not kept", reason=str(error))
    tuning = choose(measured)
    # What was measured keeps the memory of its largest runs: another one is served.
    best = loaded if known and tuning.threads == loaded.threads else load_model(path, settings, tuning.threads, loaded)
    fastest = max((one for one in measured if one.threads == tuning.threads), key=lambda one: one.steps_per_s)
    told.info(
        "model tuned",
        measured="before" if known else "now",
        sizes=len(measured),
        threads=tuning.threads,
        tick_rows=tuning.tick_rows,
        steps_per_s=round(fastest.steps_per_s),
        with_rows=fastest.rows,
        and_steps=fastest.steps,
        seconds=round(time.perf_counter() - began, 3),
    )
    return best, tuning


def _subject(loaded: Loaded, counts: tuple[int, ...]) -> Subject:
    return Subject(
        digest=loaded.graph.digest,
        row_by_row=loaded.graph.manifest.rows_per_run == 1,
        provider=loaded.provider,
        onnxruntime=VERSION,
        cpu=tuning_file.cpu_name(),
        cores=tuning_file.cores(),
        counts=counts,
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

    with no_longer_than(settings.load_timeout_s, interrupt):
        return measure(graph_with, counts, settings.tune_s, load_s, every)
