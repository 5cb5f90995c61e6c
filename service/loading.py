"""From a model's file to a graph that is ready to run.

Owns the order in which a file is chosen, read, checked, started, and audited, and what is said of it. Must not know
runners or sessions. Called in a thread of its own: all of it may take long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from service.audit import Audit, audit
from service.description import NAME, Description, read
from service.engine import Engine, NoManifest
from service.errors import LoadError
from service.graph import Graph, Signature
from service.manifest import METADATA_KEY, Manifest
from service.onnx_file import OnnxFile, check_size, may_have_external_data
from service.presented import present
from service.settings import Settings
from service.stepping import RowByRow, StepByStep

log = structlog.get_logger()


class TooLong(LoadError):
    """A model took too long."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A graph that is ready to run.

    Attributes:
        graph: to be run.
        provider: the onnxruntime execution provider that runs it.
        threads: inside one run.
        warnings: what its operator should know, a sentence each.
        interrupt: ends a run of it that is under way, from another thread; none can follow.
        path: the file that was loaded.
        file_digests: of the file and those beside it that hold its data.
        description: what its model.yaml says.
    """

    graph: Graph
    provider: str
    threads: int
    warnings: tuple[str, ...]
    interrupt: Callable[[], None]
    path: Path
    file_digests: tuple[str, ...]
    description: Description


def load_model(path: Path, settings: Settings, threads: int = 0, before: Loaded | None = None) -> Loaded:
    """Load a model file, and hold it against what the server relies on.

    Args:
        path: DIR/NAME/VERSION/model.onnx; beside it other files of the model, of which its description may choose one.
        settings: of the server.
        threads: inside one run; 0 for what the description says, or else the settings, or else 1.
        before: the same model with other threads, whose file need not be read again to be known, nor warned of.

    Raises:
        LoadError: if it cannot be served; the text says why.
    """
    folder = path.parent.parent
    description = read(folder) or Description()
    path = _chosen(path, description.precision)
    check_size([path], settings.max_model_bytes)
    external: list[Path] = []
    describe: Callable[[Signature], Manifest] | None = None
    # A file that was exported here holds all that it needs, and is not worth the time that onnx takes to import.
    if description.of_graph or may_have_external_data(path):
        file = OnnxFile(path)
        file.check(settings.max_model_bytes)
        external = file.external_files()
        if description.of_graph:
            if METADATA_KEY in file.metadata:
                raise LoadError("the file has a manifest inside, and model.yaml describes its graph too: remove one")
            describe = partial(
                present, description, folder=folder, initializer=file.initializer, precision=file.precision
            )
    threads = threads or description.threads or settings.threads or 1
    file_digests = () if before is None else before.file_digests
    try:
        engine = Engine(path, settings.device, threads, describe, external, file_digests)
    except NoManifest as error:
        raise LoadError(f"{error}{_near_misses(folder, path)}") from error
    _check_precision(path, engine.manifest.precision, description.precision)
    _check_sizes(engine.manifest, settings.max_message_bytes)
    with no_longer_than(settings.load_timeout_s, engine.interrupt):
        found = _audited(path, engine, description, threads)
    if before is None:
        for warning in found.warnings:
            name, version = path.parent.parent.name, path.parent.name
            log.warning("model served with a reservation", model=name, version=version, reason=warning)
    return Loaded(
        found.graph,
        engine.provider,
        threads,
        found.warnings,
        engine.interrupt,
        path,
        engine.file_digests,
        description,
    )


def _chosen(path: Path, precision: str | None) -> Path:
    """The file of a precision, where there is one of its own."""
    own = path.with_name(f"{path.stem}.{precision}{path.suffix}")
    return own if precision is not None and own.is_file() else path


def _check_precision(path: Path, have: str, want: str | None) -> None:
    if want is not None and have != want:
        own = "" if path.stem.endswith(want) else f" and there is no {path.stem}.{want}{path.suffix} beside it"
        raise LoadError(f"{NAME} asks for precision {want}; {path.name} is {have}{own}")


@contextmanager
def no_longer_than(seconds: float, interrupt: Callable[[], object]) -> Iterator[None]:
    """Interrupt what runs within, once it has taken too long.

    Raises:
        TooLong: if it has, instead of what was raised within because of that.
    """
    ended = threading.Event()

    def end() -> None:
        ended.set()
        interrupt()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not ended.is_set():
            raise
    finally:
        timer.cancel()
        timer.join()
    if ended.is_set():
        raise TooLong(too_long(seconds))


def too_long(seconds: float) -> str:
    """What is said of a model that took too long."""
    return f"the model was not loaded within {seconds:g} s (--load-timeout-s)"


def _check_sizes(manifest: Manifest, limit: int) -> None:
    """Refuse sizes that no request could have, before memory is taken for them."""
    for what, size in (("one step of its inputs", manifest.step_bytes), ("the states of a row", manifest.state_bytes)):
        if size > limit:
            raise LoadError(f"{what} would take {size} bytes; this server takes up to {limit} (--max-message-bytes)")


def _near_misses(folder: Path, path: Path) -> str:
    """What stands in the folder that may have been meant to describe the model."""
    if (folder / NAME).exists():
        return f"; {NAME} is there, and says nothing of inputs, states and outputs"
    near = [folder / "model.yml", path.parent / NAME, path.parent / "model.yml"]
    there = [str(file.relative_to(folder)) for file in near if file.exists()]
    return f"; there is {there[0]}, which is not read: expected {folder.name}/{NAME}" if there else ""


def _audited(path: Path, engine: Engine, description: Description, threads: int) -> Audit:
    began = time.perf_counter()
    graph: Graph = engine
    if graph.manifest.steps_per_run == 1:
        graph = StepByStep(graph)
    if graph.manifest.rows_per_run == 1 or description.row_by_row:
        graph = RowByRow(graph)
    name, version = path.parent.parent.name, path.parent.name
    # A model whose run does not end is known by this line being its last.
    log.info("model to be audited", model=name, version=version)
    found = audit(graph, description.strict, description.tolerance, description.of_graph)
    log.info(
        "model audited",
        model=name,
        version=version,
        provider=engine.provider,
        threads=threads,
        rows=found.rows,
        chunks=found.chunks,
        row_by_row=found.graph.manifest.rows_per_run == 1,
        step_by_step=found.graph.manifest.steps_per_run == 1,
        seconds=round(time.perf_counter() - began, 3),
    )
    return found
