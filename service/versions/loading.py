"""From a model's file to a graph that is ready to run.

Owns the order in which a file is chosen, read, checked, started, and audited, and what is said of it. Must not know
runners or sessions. Called in a thread of its own: all of it may take long.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import structlog

from service.engines.cuda import CudaDevice
from service.engines.engine import Engine, NoManifest, digest
from service.engines.provider import CudaOptions, NotOnCuda, headline, why_no_cuda
from service.engines.resident_engine import ResidentEngine
from service.engines.stepping import RowByRow, StepByStep
from service.errors import LoadError
from service.graphs.description import NAME, Description, read
from service.graphs.graph import Graph, Signature
from service.graphs.onnx_file import OnnxFile, check_seal, check_size, may_have_external_data
from service.graphs.placement import Asked, Choice, Device, choose
from service.graphs.presented import present
from service.graphs.recurrent_path import obstacles, told
from service.manifest import METADATA_KEY, Manifest
from service.settings import Settings
from service.versions.audit import Audit, audit, differences

log = structlog.get_logger()

_MAY_DIFFER = {"layers", "parity", "made_with"}
"""What of the manifest may differ between the forms of a model for different devices."""


_NO_CUDA = "CUDA does not start"
_told: set[tuple[str, str]] = set()
_telling = threading.Lock()


class TooLong(LoadError):
    """A model took too long."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A graph that is ready to run.

    Attributes:
        graph: to be run.
        choice: the device that runs it, and why.
        provider: the onnxruntime execution provider that runs it.
        threads: inside one run.
        warnings: what its operator should know, a sentence each.
        interrupt: ends a run of it that is under way, from another thread; none can follow.
        path: the file of the model; the device may run another, in a form of its own.
        file_digests: of that file and those beside it that hold its data.
        description: what its model.yaml says.
    """

    graph: Graph
    choice: Choice
    provider: str
    threads: int
    warnings: tuple[str, ...]
    interrupt: Callable[[], None]
    path: Path
    file_digests: tuple[str, ...]
    description: Description


def load_model(
    path: Path,
    settings: Settings,
    threads: int = 0,
    before: Loaded | None = None,
    choice: Choice | None = None,
) -> Loaded:
    """Load a model file, and hold it against what the server relies on.

    Args:
        path: DIR/NAME/VERSION/model.onnx; beside it other files of the model, of which its description may choose one.
        settings: of the server.
        threads: inside one run; 0 for what the description says, or else the settings, or else 1.
        before: the same model with other threads, whose file need not be read again to be known, nor warned of.
        choice: the device that is to run it, where that was chosen already.

    Raises:
        LoadError: if it cannot be served; the text says why.
    """
    folder = path.parent.parent
    description = read(folder) or Description()
    path = _chosen(path, description.precision)
    threads = threads or description.threads or settings.threads or 1
    opening = _Opening(path, settings, description, threads, () if before is None else before.file_digests)
    if choice is None and before is not None:
        choice = before.choice
    if choice is None:
        choice, engine = _on_its_device(opening)
    else:
        engine = opening.on_cuda() if choice.device == "cuda" else opening.on_cpu()
    _check_precision(path, engine.manifest.precision, description.precision)
    _check_sizes(engine.manifest, settings.max_message_bytes)
    against: str | None = None
    try:
        with no_longer_than(settings.load_timeout_s, engine.interrupt):
            found = _audited(path, engine, description, threads, choice.tf32)
    except LoadError as error:
        if choice.device == "cpu" or isinstance(error, TooLong):
            raise
        against = error.reason if isinstance(error, NotOnCuda) else str(error)
    if against is not None:
        # Of what has failed on the device nothing is held while the other is tried.
        del engine
        return load_model(path, settings, threads, before, opening.choose(against))
    if choice.tf32 and choice.tf32_difference is None:
        choice = _with_tf32_compared(choice, engine, opening)
    if before is None:
        for warning in found.warnings:
            log.warning("model served with a reservation", **_named(path), reason=warning)
    return Loaded(
        found.graph,
        choice,
        engine.provider,
        threads,
        found.warnings,
        engine.interrupt,
        path,
        engine.file_digests,
        description,
    )


Opened = Engine | ResidentEngine
"""A graph as it was opened. Where its states stay on a device it is served as it is, or not at all."""


class _Opening:
    """How a model's file becomes an engine, on one device or another."""

    def __init__(
        self, path: Path, settings: Settings, description: Description, threads: int, file_digests: Sequence[str]
    ) -> None:
        self.path = path
        self.settings = settings
        self.description = description
        self.threads = threads
        self._file_digests = file_digests
        self._digest_for_cuda = ""

    @property
    def asked(self) -> Asked:
        """The device that was asked for."""
        return self.description.device or self.settings.device

    def choose(self, against_cuda: str | None) -> Choice:
        """Choose the device.

        Args:
            against_cuda: why CUDA does not run it; None where it does.

        Raises:
            LoadError: if CUDA was asked for, does not run it, and nothing else may.
        """
        said = [name for name in ("device", "fallback") if getattr(self.description, name) is not None]
        choice = choose(self.asked, against_cuda, self.description.fallback or self.settings.fallback, said)
        file = self.path if choice.device == "cpu" else self.for_cuda
        return replace(
            choice,
            file=file.name,
            digest="" if file == self.path else self._digest_for_cuda,
            tf32=self.tf32 and choice.device == "cuda",
        )

    @property
    def tf32(self) -> bool:
        """Whether CUDA may multiply in TF32."""
        asked = self.description.tf32
        return self.settings.tf32 == "on" if asked is None else asked

    @property
    def for_cuda(self) -> Path:
        """The file that CUDA runs: the one that was exported for it, where there is one."""
        own = self.path.with_name(f"{self.path.stem}.cuda{self.path.suffix}")
        return own if own.is_file() else self.path

    def on_cpu(self) -> Opened:
        """Open it on the CPU."""
        return self._open(self.path, "cpu", self._file_digests)

    def on_cuda(self, tf32: bool | None = None) -> Opened:
        """Open it on CUDA.

        Args:
            tf32: other than what was asked for.

        Raises:
            NotOnCuda: if CUDA does not run all of its recurrent path.
        """
        path = self.for_cuda
        if reason := why_no_cuda(self.settings.gpu_id):
            raise NotOnCuda(path.name, reason)
        check_size([path], self.settings.max_model_bytes)
        check_seal(path)
        file = OnnxFile(path)
        if against := obstacles(file.model):
            raise NotOnCuda(path.name, told(against) + ("" if path != self.path else _how_to_export(file)))
        if path != self.path:
            check_seal(self.path)
            own = OnnxFile(self.path)
            _check_twins(own, file)
            # By whatever file it is run, it is one model, and its sessions go from one to the other.
            self._file_digests = self._file_digests or [digest(each) for each in (self.path, *own.external_files())]
            digests = [digest(each) for each in (path, *file.external_files())]
            several = hashlib.sha256("".join(digests).encode()).hexdigest()
            self._digest_for_cuda = several if len(digests) > 1 else digests[0]
        return self._open(path, "cuda", self._file_digests, self.tf32 if tf32 is None else tf32)

    def _open(self, path: Path, device: Device, file_digests: Sequence[str], tf32: bool = False) -> Opened:
        settings, description = self.settings, self.description
        folder = path.parent.parent
        check_size([path], settings.max_model_bytes)
        if not file_digests:
            check_seal(path)
        external: list[Path] = []
        describe: Callable[[Signature], Manifest] | None = None
        # A file that was exported here holds all that it needs, and is not worth the time that onnx takes to import.
        if description.of_graph or may_have_external_data(path):
            file = OnnxFile(path)
            file.check(settings.max_model_bytes)
            external = file.external_files()
            if description.of_graph:
                if METADATA_KEY in file.metadata:
                    raise LoadError(
                        "the file has a manifest inside, and model.yaml describes its graph too: remove one"
                    )
                describe = partial(
                    present, description, folder=folder, initializer=file.initializer, precision=file.precision
                )
        cuda = CudaOptions(settings.gpu_id, settings.gpu_memory_limit_bytes, settings.arena_extend, tf32)
        try:
            if device == "cuda":
                if description.row_by_row:
                    raise NotOnCuda(path.name, f"{NAME} says row_by_row, which a device is no use for")
                states_on = CudaDevice(settings.gpu_id)
                return ResidentEngine(
                    path,
                    states_on,
                    self.threads,
                    describe,
                    external,
                    file_digests,
                    cuda,
                    capture=settings.cuda_graphs == "on",
                )
            return Engine(path, device, self.threads, describe, external, file_digests, cuda)
        except NoManifest as error:
            raise LoadError(f"{error}{_near_misses(folder, path)}") from error


def _on_its_device(opening: _Opening) -> tuple[Choice, Opened]:
    """Open a model on the device that was asked for and can be had."""
    against = None
    if opening.asked != "cpu":
        try:
            engine = opening.on_cuda()
            return opening.choose(None), engine
        except NotOnCuda as error:
            against = error.reason
    return opening.choose(against), opening.on_cpu()


def instead_of_cuda(loaded: Loaded, settings: Settings, reason: str) -> Choice:
    """Choose another device for a model that CUDA has run until now.

    Args:
        loaded: the model.
        settings: of the server.
        reason: why CUDA does not run it.

    Raises:
        LoadError: if CUDA was asked for, and nothing else may run it.
    """
    return _Opening(loaded.path, settings, loaded.description, loaded.threads, ()).choose(reason)


def _with_tf32_compared(choice: Choice, engine: Opened, opening: _Opening) -> Choice:
    """Tell how far results with TF32 are from those without it, where the model can be run without it too."""
    try:
        exact = opening.on_cuda(tf32=False)
        with no_longer_than(opening.settings.load_timeout_s / 4, exact.interrupt):
            outputs, states = differences(engine, exact)
    except Exception as error:  # a second copy of it may be too much for the device
        log.warning("TF32 not compared", **_named(opening.path), reason=str(error))
        return choice
    log.info("TF32 compared", **_named(opening.path), outputs=float(f"{outputs:.2g}"), states=float(f"{states:.2g}"))
    return replace(choice, tf32_difference=max(outputs, states))


def _check_twins(own: OnnxFile, other: OnnxFile) -> None:
    """Refuse two files that are not one model: a session goes from one to the other."""
    for file in (own, other):
        if METADATA_KEY not in file.metadata:
            raise LoadError(
                f"{file.path.name} has no manifest inside, so that nothing tells whether {own.path.name} and "
                f"{other.path.name} are one model: remove {other.path.name}, or export both"
            )
    texts = [file.metadata[METADATA_KEY] for file in (own, other)]
    manifests = [Manifest.model_validate_json(text).model_dump(exclude=_MAY_DIFFER) for text in texts]
    wrong = sorted(name for name, value in manifests[0].items() if manifests[1][name] != value)
    if wrong:
        raise LoadError(
            f"{other.path.name} is not of the same model as {own.path.name}: they differ in {', '.join(wrong)}; "
            "export both anew, or remove the first"
        )


def _how_to_export(file: OnnxFile) -> str:
    """What makes a file for CUDA beside one that CUDA does not run; empty where nothing does."""
    if METADATA_KEY not in file.metadata or (precision := file.precision) == "int8":
        return ""
    name = file.path.name
    how = "" if name == "model.onnx" else f" --precision {precision} --output {name} --overwrite"
    return f"; python -m export{how} writes {file.path.stem}.cuda.onnx beside it, in a form that CUDA runs"


def in_brief(text: str, settings: Settings, level: Literal["info", "warning", "error"]) -> str:
    """What a line of the log says of one model: why CUDA does not start here, and what to do, stand in a line before.

    That line comes once a process, and once for each level, so that whoever reads the one reads the other too.

    Args:
        text: what is to be said; returned as it is where it holds no such reason.
        settings: of the server.
        level: of the line.
    """
    reason = why_no_cuda(settings.gpu_id)
    if reason is None or reason not in text:
        return text
    before, _, after = text.partition(reason)
    with _telling:
        if (reason + after, level) not in _told:
            getattr(log, level)(_NO_CUDA, reason=reason + after)
            _told.add((reason + after, level))
    return f"{before}{headline(reason)}, see '{_NO_CUDA}' above"


def _named(path: Path) -> dict[str, str]:
    return {"model": path.parent.parent.name, "version": path.parent.name}


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


def _audited(path: Path, engine: Opened, description: Description, threads: int, tf32: bool) -> Audit:
    began = time.perf_counter()
    graph: Graph = engine
    resident = isinstance(engine, ResidentEngine)
    if graph.manifest.steps_per_run == 1 and not resident:
        graph = StepByStep(graph)
    if graph.manifest.rows_per_run == 1 or description.row_by_row:
        graph = RowByRow(graph)
    # A model whose run does not end is known by this line being its last.
    log.info("model to be audited", **_named(path), provider=engine.provider)
    found = audit(graph, description.strict, description.tolerance, description.of_graph, tf32)
    if resident and found.graph is not engine:
        raise NotOnCuda(path.name, "; ".join(found.warnings) or "it is to be run row by row")
    log.info(
        "model audited",
        **_named(path),
        provider=engine.provider,
        threads=threads,
        rows=found.rows,
        chunks=found.chunks,
        row_by_row=found.graph.manifest.rows_per_run == 1,
        step_by_step=found.graph.manifest.steps_per_run == 1,
        seconds=round(time.perf_counter() - began, 3),
    )
    return found
