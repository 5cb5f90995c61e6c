"""The models that are served: brought in, switched, taken out again.

Owns which versions serve, and the order of a change: what comes is loaded and warmed while the old goes on, and takes
its place in one step on the event loop; what goes is freed once its last session has ended. Must not know grpc or
sessions.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping
from typing import Any, TypeVar

import structlog

from service.background import in_thread
from service.catalogue import Catalogue
from service.errors import ControlRefused, ConveyorError, Draining, LoadError, LoadFailed, ModelUnknown
from service.folder import Found, ModelFolder, scan, wanted
from service.loading import Loaded, load_model
from service.metrics import Metrics
from service.runner import Runner
from service.scheduler import Limits
from service.settings import Settings
from service.version import Version

T = TypeVar("T")
_LOADS_AT_ONCE = 4
_LONGEST_REASON = 1000
log = structlog.get_logger()


async def _tell_nobody(name: str, ready: bool) -> None:
    pass


class Repository(Catalogue):
    """The models that are served.

    Args:
        settings: of the server.
        metrics: what is counted.
        clock: tells the time, in seconds; for runners.
        on_change: told the name of each model that may have begun or ceased to take new work, and whether it does.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float],
        on_change: Callable[[str, bool], Awaitable[None]] = _tell_nobody,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._closed = False
        # What the last look at the folder saw, and what of it was acted on.
        self._seen: Mapping[str, ModelFolder] = {}
        self._acted: dict[str, ModelFolder] = {}
        self._changes: set[asyncio.Task[Any]] = set()
        # One change of a model after the other; models do not wait for each other, but for room to load.
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._room = asyncio.Semaphore(_LOADS_AT_ONCE)

    async def load(self, needed: Container[tuple[str, int]] = ()) -> None:
        """Bring in what is in the folder, at the start. What fails is noted, logged, and left out.

        Args:
            needed: names and versions that sessions of an earlier process need: what would not be served takes no new
                work, and goes on with those sessions alone.

        Raises:
            LoadError: if the folder cannot be read, or nothing in it can be served and nothing else will come.
        """
        self._seen = seen = await in_thread(scan, self._settings.repository)
        self._note(seen)
        names = set(seen)
        if self._settings.model_control == "explicit" and "*" not in self._settings.load_models:
            names = set(self._settings.load_models)
            if missing := sorted(names - seen.keys()):
                log.error("models to load are not there", models=missing)
        await asyncio.gather(*(self._act(name, seen[name]) for name in names & seen.keys()))
        await asyncio.gather(
            *(
                self._keep(found)
                for model in seen.values()
                for found in model.versions
                if (found.name, found.version) in needed and not self.ready(found.name, found.version)
            )
        )
        if self._settings.model_control == "fixed" and not any(map(self.versions, self._models)):
            broken = "; ".join(f"{one.name} {one.number}: {one.failure}" for one in self._every() if one.failure)
            raise LoadError(
                f"no model in {self._settings.repository} can be served: "
                f"{broken or 'there is none; expected DIR/NAME/VERSION/model.onnx'}"
            )
        self._started = True

    async def poll(self) -> None:
        """Look at the folder and begin to act on each change that has come to rest: seen the same twice."""
        try:
            seen = await in_thread(scan, self._settings.repository)
        except Exception as error:
            # A disk that is away for a moment is no order to unload everything, and whatever it is, it may pass.
            log.error("repository not polled", reason=str(error), exc_info=not isinstance(error, LoadError))
            return
        if self._closed:
            return
        before, self._seen = self._seen, seen
        for name in sorted({*seen, *self._acted}):
            now = seen.get(name)
            if now == before.get(name) and now != self._acted.get(name) and not self._turns[name].locked():
                self._begin(self._act, name, now)

    async def settle(self) -> None:
        """Wait until every change that has begun is done."""
        while self._changes:
            await asyncio.wait(self._changes)

    async def load_model(self, name: str) -> None:
        """Bring a model in as it stands in the folder now, on request.

        Raises:
            ControlRefused: if models are not loaded on request here.
            ModelUnknown: if it is not in the folder.
            LoadFailed: if it does not load; what served goes on serving.
            Draining: if the server is about to stop.
        """
        self._be_explicit()
        await self._finished(self._begin(self._load_model, name))

    async def unload_model(self, name: str) -> None:
        """Take a model out, on request: it takes no new work, and is freed once its sessions have ended.

        Raises:
            ControlRefused: if models are not unloaded on request here.
            ModelUnknown: if there is none of that name.
            Draining: if the server is about to stop.
        """
        self._be_explicit()
        if name not in self._models:
            raise ModelUnknown(f"no model {name[:128]!r} is known")
        await self._finished(self._begin(self._unload_model, name))

    async def free(self) -> None:
        """Free what has retired and is not used any more."""
        for name, versions in list(self._models.items()):
            for number, version in list(versions.items()):
                freed = await version.free()
                if version.runners or version.loading:
                    continue
                if freed:
                    self._metrics.forget(name, number)
                if not version.there and versions.get(number) is version:
                    del versions[number]
            if not versions and self._models.get(name) is versions:
                del self._models[name]

    def close(self) -> None:
        """Begin no changes any more, and give up those under way."""
        self._closed = True
        for task in self._changes:
            task.cancel()

    async def stop(self, timeout_s: float) -> bool:
        """Stop every model.

        Returns:
            Whether all have stopped in time.
        """
        self.close()
        return all(await asyncio.gather(*(runner.stop(timeout_s) for runner in self)))

    # --- how a change goes ---

    async def _load_model(self, name: str) -> None:
        try:
            seen = await in_thread(scan, self._settings.repository)
        except LoadError as error:
            log.error("repository not read", reason=str(error))
            raise LoadFailed("the repository cannot be read; the server's log says why") from error
        self._note(seen)
        if name not in seen:
            raise ModelUnknown(f"no model {name[:128]!r} is in the repository; expected NAME/VERSION/model.onnx")
        if failures := await self._act(name, seen[name], again=True):
            raise LoadFailed(f"load failed for model {name!r}: {'; '.join(failures)}")

    async def _unload_model(self, name: str) -> None:
        async with self._turns[name]:
            for version in self._models.get(name, {}).values():
                version.retire("unloaded")
            await self._changed(name)

    async def _act(self, name: str, model: ModelFolder | None, again: bool = False) -> list[str]:
        """Have served of a model what its folder and policy ask for.

        Args:
            name: of the model.
            model: as its folder stands; None if it is not there any more.
            again: try also what has failed before.

        Returns:
            What of it failed, and why.
        """
        async with self._turns[name]:
            if model is None:
                self._acted.pop(name, None)
            else:
                self._acted[name] = model
            there = {found.version: self._version(found) for found in model.versions} if model is not None else {}
            if model is None or not model.trouble:
                for number, version in self._models.get(name, {}).items():
                    if number not in there:
                        version.there = False
                        version.retire("not in the folder any more")
            try:
                return [] if model is None else await self._serve(model, there, again)
            finally:
                await self._changed(name)

    async def _serve(self, model: ModelFolder, there: Mapping[int, Version], again: bool) -> list[str]:
        try:
            if model.trouble:
                raise LoadError(model.trouble)
            candidates, count = await in_thread(wanted, model, self._settings.latest_versions)
        except Exception as error:
            # What serves goes on: nobody can tell what should be instead.
            failure = self._told(error, model=model.path.name)
            for version in there.values():
                version.tried, version.failure = None, failure
            return [failure]
        for version in there.values():
            if version.tried is None:
                version.failure = ""
        serving: list[int] = []
        failures: list[str] = []
        for found in candidates:
            if len(serving) == count:
                break
            version = there[found.version]
            if await self._bring(version, found, again):
                serving.append(found.version)
            if version.failure:
                failures.append(f"version {found.version} is at UNAVAILABLE state: {version.failure}")
        # Where none of those that are wanted loads, the old ones are better than nothing.
        for number, version in there.items() if serving else ():
            if number not in serving:
                version.retire("not within the policy")
        return failures

    async def _bring(self, version: Version, found: Found, again: bool) -> bool:
        """Load a version unless that is done, and switch to it.

        Returns:
            Whether it serves, if only with the files before.
        """
        done = version.tried == found.signature and (version.serving is not None or version.failure)
        if not done or (again and version.failure):
            before = version.serving
            runner = await self._load(version, found)
            # The same model as before, in files that were written anew, needs no switch.
            if runner is not None and (before is None or runner.digest != before.digest):
                runner.start()
                version.switch(runner)
        return version.serving is not None

    async def _keep(self, found: Found) -> None:
        """Load a version for the sessions alone that it has."""
        async with self._turns[found.name]:
            version = self._version(found)
            if version.failure or (runner := await self._load(version, found)) is None:
                return
            runner.start()
            version.switch(runner)
            version.retire("kept for the sessions of an earlier process")

    async def _load(self, version: Version, found: Found) -> Runner | None:
        """Load and warm a version's files; None if that fails, which is noted."""
        began = time.perf_counter()
        version.tried = found.signature
        version.loading = True
        try:
            async with self._room:
                runner, loaded = await in_thread(self._make, found, asyncio.get_running_loop())
        except Exception as error:
            version.failure = self._told(error, model=found.name, version=found.version)
            if not version.runners:
                self._metrics.forget(found.name, found.version)
            return None
        finally:
            version.loading = False
        version.failure = ""
        log.info(
            "model loaded",
            model=found.name,
            version=found.version,
            provider=loaded.provider,
            precision=runner.manifest.precision,
            streamable=runner.manifest.streamable,
            seconds=round(time.perf_counter() - began, 3),
        )
        return runner

    def _make(self, found: Found, loop: asyncio.AbstractEventLoop) -> tuple[Runner, Loaded]:
        settings = self._settings
        loaded = load_model(found.path, settings)
        limits = Limits(
            queued_rows=settings.max_queued_rows,
            queued_bytes=settings.max_queued_bytes,
            queued_s=settings.max_queued_s,
            tick_rows=settings.max_tick_rows,
            tick_steps=settings.max_tick_steps,
            ragged=loaded.graph.manifest.lengths is not None,
            sliced=loaded.graph.manifest.streamable,
            short_tick_s=settings.short_tick_ms * 1e-3,
            long_tick_s=settings.long_tick_ms * 1e-3,
        )
        slots = settings.max_sessions + 2 * (settings.max_queued_rows + settings.max_tick_rows)
        try:
            runner = Runner(found.name, found.version, loaded.graph, limits, slots, self._metrics, self._clock, loop)
            runner.warm_up()
        except Exception as error:
            raise LoadError(f"the model does not run: {error}") from error
        return runner, loaded

    def _note(self, seen: Mapping[str, ModelFolder]) -> None:
        """Know of every version that is there, if only to say why it is not served."""
        there = {self._version(found) for model in seen.values() for found in model.versions}
        for version in self._every():
            version.there = version in there

    def _version(self, found: Found) -> Version:
        version = self._models.setdefault(found.name, {}).setdefault(found.version, Version(found.name, found.version))
        version.there = True
        return version

    async def _changed(self, name: str) -> None:
        if self._started:
            await self._on_change(name, self.ready(name))
        await self.free()

    def _begin(self, work: Callable[..., Coroutine[Any, Any, T]], *given: Any) -> asyncio.Task[T]:
        if self._closed:
            raise Draining("the server is about to stop")
        task = asyncio.create_task(work(*given))
        self._changes.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        # A caller may have gone; an error of ours is logged in any case.
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, ConveyorError):
            log.error("unexpected error", exc_info=error)

    async def _finished(self, task: asyncio.Task[None]) -> None:
        """Wait for a change, which goes on also if whoever waits goes away."""
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Draining("the server is about to stop") from None
            raise

    def _be_explicit(self) -> None:
        self._be_started()
        if (control := self._settings.model_control) != "explicit":
            raise ControlRefused(
                f"explicit model load / unload is not allowed: this server's --model-control is {control}"
            )

    def _told(self, error: Exception, **what: Any) -> str:
        """Log why something did not load; return what a caller may read of it: not where the repository stands."""
        if not isinstance(error, LoadError):
            log.error("model not loaded", **what, exc_info=error)
            return "unexpected error; the server's log has it"
        log.error("model not loaded", **what, reason=str(error))
        return str(error).replace(f"{self._settings.repository}/", "")[:_LONGEST_REASON]
