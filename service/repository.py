"""Model folders: NAME/VERSION/model.onnx, found, loaded, warmed, looked up.

Owns which model versions are served, and why one is not. Must not know grpc.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.engine import LoadError
from service.errors import Loading, ModelUnknown
from service.loading import load_model
from service.metrics import Metrics
from service.runner import Runner
from service.scheduler import Limits
from service.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """A model version in the folder."""

    name: str
    version: int
    path: Path


def scan(folder: Path, latest: int, needed: Container[tuple[str, int]] = ()) -> list[Found]:
    """List the versions of each model that are to be served.

    Args:
        folder: the repository.
        latest: how many versions of each, newest first.
        needed: names and versions beside those, where they are there.

    Raises:
        LoadError: if the folder cannot be read.
    """
    if not folder.is_dir():
        raise LoadError(f"the repository {folder} is not a folder; expected DIR/NAME/VERSION/model.onnx")
    found: list[Found] = []
    for model in sorted(folder.iterdir()):
        if not model.is_dir() or not _NAME.fullmatch(model.name):
            continue
        versions = [
            Found(model.name, int(entry.name), entry / "model.onnx")
            for entry in model.iterdir()
            if _VERSION.fullmatch(entry.name) and (entry / "model.onnx").is_file()
        ]
        versions.sort(reverse=True)
        found += versions[:latest] + [found for found in versions[latest:] if (found.name, found.version) in needed]
    return found


class Repository:
    """The models that are served.

    Attributes:
        broken: the model versions that did not load, and why.
    """

    def __init__(self, settings: Settings, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._runners: dict[str, dict[int, Runner]] = {}
        self.broken: dict[tuple[str, int], str] = {}
        self._loaded = False

    async def load(self, needed: Container[tuple[str, int]] = ()) -> None:
        """Load and warm what is in the folder. One that fails is noted, logged, and left out.

        Args:
            needed: names and versions to load although newer ones are there.

        Raises:
            LoadError: if the folder cannot be read, or nothing in it can be served.
        """
        for found in scan(self._settings.repository, self._settings.latest_versions, needed):
            began = time.perf_counter()
            try:
                runner, provider = await asyncio.to_thread(self._load, found, asyncio.get_running_loop())
            except LoadError as error:
                self.broken[found.name, found.version] = str(error)
                log.error("model not loaded", model=found.name, version=found.version, reason=str(error))
                continue
            runner.start()
            self._runners.setdefault(found.name, {})[found.version] = runner
            log.info(
                "model loaded",
                model=found.name,
                version=found.version,
                provider=provider,
                precision=runner.manifest.precision,
                streamable=runner.manifest.streamable,
                seconds=round(time.perf_counter() - began, 3),
            )
        if not self._runners:
            reasons = "; ".join(f"{name} {version}: {why}" for (name, version), why in self.broken.items())
            raise LoadError(
                f"no model in {self._settings.repository} can be served: "
                f"{reasons or 'there is none; expected DIR/NAME/VERSION/model.onnx'}"
            )
        self._loaded = True

    def _load(self, found: Found, loop: asyncio.AbstractEventLoop) -> tuple[Runner, str]:
        settings = self._settings
        loaded = load_model(found.path, settings)
        limits = Limits(
            queued_rows=settings.max_queued_rows,
            queued_bytes=settings.max_queued_bytes,
            tick_rows=settings.max_tick_rows,
            tick_steps=settings.max_tick_steps,
            ragged=loaded.graph.manifest.lengths is not None,
        )
        slots = settings.max_sessions + settings.max_queued_rows + settings.max_tick_rows
        try:
            runner = Runner(found.name, found.version, loaded.graph, limits, slots, self._metrics, self._clock, loop)
            runner.warm_up()
        except Exception as error:
            raise LoadError(f"the model does not run: {error}") from error
        return runner, loaded.provider

    def names(self) -> list[str]:
        """The models that are served, in alphabetical order.

        Raises:
            Loading: if models are being loaded still.
        """
        if not self._loaded:
            raise Loading("models are being loaded")
        return sorted(self._runners)

    def find(self, name: str, version: int = 0) -> Runner:
        """Look a model up.

        Args:
            name: of the model.
            version: of it; 0 for the newest.

        Raises:
            ModelUnknown: if it is not served.
            Loading: if models are being loaded still.
        """
        if not self._loaded:
            raise Loading("models are being loaded")
        versions = self._runners.get(name)
        if versions is None:
            if any(broken == name for broken, _ in self.broken):
                raise ModelUnknown(f"model {name!r} did not load; the server's log says why")
            raise ModelUnknown(f"no model {name[:128]!r} is served; there are: {', '.join(self.names()) or 'none'}")
        runner = versions.get(version or max(versions))
        if runner is None:
            raise ModelUnknown(
                f"model {name!r} has no version {version} here; there are: {', '.join(map(str, sorted(versions)))}"
            )
        return runner

    def __iter__(self) -> Iterator[Runner]:
        return (runner for versions in self._runners.values() for runner in versions.values())

    async def stop(self, timeout_s: float) -> bool:
        """Stop every model.

        Returns:
            Whether all have stopped in time.
        """
        return all(await asyncio.gather(*(runner.stop(timeout_s) for runner in self)))
