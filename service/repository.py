"""The models that are served: brought in, switched, taken out again.

Owns which versions serve, and the order of a change: what comes is loaded and warmed while the old goes on, and takes
its place in one step on the event loop; what goes is freed once its last session has ended. Must not know grpc or
sessions.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Container, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from service.background import in_thread
from service.engines.provider import why_no_cuda
from service.errors import ControlRefused, ConveyorError, Draining, LoadError, LoadFailed, ModelUnknown
from service.graphs.description import read
from service.metrics import Metrics
from service.settings import Settings
from service.ticks.admission import Limits
from service.ticks.runner import Runner
from service.versions.catalogue import Catalogue
from service.versions.folder import Found, ModelFolder, look_again, overlooked, scan, wanted
from service.versions.loading import Loaded, TooLong, in_brief, instead_of_cuda, no_longer_than, too_long
from service.versions.tuner import loading, tuned
from service.versions.tuning import Tuning
from service.versions.version import Version

T = TypeVar("T")
_LOADS_AT_ONCE = 4
_MOST_IN_USE = 8
"""Runners of one model that only finish their sessions, until no other is loaded: each holds its weights."""
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
        self._look_to_come: asyncio.Task[Mapping[str, ModelFolder]] | None = None
        self._looking = asyncio.Lock()
        self._overlooked: list[str] | None = None
        self._warned: set[str] = set()
        self._unreadable = ""
        self._changes: set[asyncio.Task[Any]] = set()
        # One change of a model after the other; models do not wait for each other, but for room to load.
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._room = asyncio.Semaphore(_LOADS_AT_ONCE)
        # Of each model the last change on request that has not begun: who asks for the same again waits for it too.
        self._waiting: dict[str, tuple[Callable[[str], Coroutine[Any, Any, None]], asyncio.Task[None]]] = {}

    async def load(self, needed: Container[tuple[str, int]] = ()) -> None:
        """Bring in what is in the folder, at the start. What fails is noted, logged, and left out.

        Args:
            needed: names and versions that sessions of an earlier process need: what would not be served takes no new
                work, and goes on with those sessions alone.

        Raises:
            LoadError: if the folder cannot be read, or nothing in it can be served and nothing else will come; or none
                of the models that are to be loaded by name.
        """
        self._seen = seen = await self._look()
        self._note(seen)
        names, named = set(seen), False
        if self._settings.model_control == "explicit" and "*" not in self._settings.load_models:
            names = set(self._settings.load_models)
            named = bool(names)
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
        if (named or self._settings.model_control == "fixed") and not any(map(self.versions, names)):
            raise LoadError(self._why_nothing(names))
        if not any(map(self.versions, self._models)):
            await in_thread(self._be_able, seen)
        self._started = True

    def _be_able(self, seen: Mapping[str, ModelFolder]) -> None:
        """Refuse to wait for models none of which will load, as far as those that are there show."""
        settings = self._settings
        if settings.device != "cuda" or settings.fallback == "allow":
            return
        if (reason := why_no_cuda(settings.gpu_id)) and not any(map(_does_without_cuda, seen.values())):
            raise LoadError(
                f"no model is served, and CUDA was asked for (--device cuda), which none that is there does without: "
                f"{reason}"
            )

    def _why_nothing(self, names: Collection[str]) -> str:
        failures = [f"{one.name} {one.number or ''}: {one.failure}" for one in self._every() if one.failure]
        if not names:
            why = "there is none; expected DIR/NAME/VERSION/model.onnx"
        elif len(failures) == 1:
            why = failures[0]
        else:
            why = (
                f"{', '.join(sorted(names)[:10])}{', ...' if len(names) > 10 else ''}; why not stands above, one by one"
            )
        return f"no model in {self._settings.repository} can be served: {why}"

    async def poll(self) -> None:
        """Look at the folder and begin to act on each change that has come to rest: seen the same twice."""
        try:
            seen = await self._look()
        except Exception as error:
            # A disk that is away for a moment is no order to unload everything, and whatever it is, it may pass.
            if str(error) != self._unreadable:
                log.error("repository not polled", reason=str(error), exc_info=not isinstance(error, LoadError))
            self._unreadable = str(error)
            return
        if self._unreadable:
            log.info("repository polled again")
            self._unreadable = ""
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
        await self._finished(self._asked(self._load_model, name))

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
        await self._finished(self._asked(self._unload_model, name))

    async def free(self) -> None:
        """Free what has retired and is not used any more."""
        for name, versions in list(self._models.items()):
            for number, version in list(versions.items()):
                freed = await version.free()
                if version.runners or version.loading:
                    continue
                if freed:
                    self._metrics.forget(name, number)
                if not version.there and not version.missed and versions.get(number) is version:
                    del versions[number]
            if not versions and self._models.get(name) is versions:
                del self._models[name]

    def close(self) -> None:
        """Begin no changes any more, and give up those under way."""
        self._closed = True
        for task in self._changes:
            task.cancel()
        if self._look_to_come is not None:
            self._look_to_come.cancel()

    async def stop(self, timeout_s: float) -> bool:
        """Stop every model.

        Returns:
            Whether all have stopped in time.
        """
        self.close()
        return all(await asyncio.gather(*(runner.stop(timeout_s) for runner in self)))

    # --- how a change goes ---

    async def _look(self) -> Mapping[str, ModelFolder]:
        """Look at the folder; one look at a time, and everybody who comes before it begins shares the next."""
        if self._look_to_come is None:
            self._look_to_come = asyncio.create_task(self._look_in_turn())
        return await asyncio.shield(self._look_to_come)

    async def _look_in_turn(self) -> Mapping[str, ModelFolder]:
        async with self._looking:
            self._look_to_come = None
            seen = await in_thread(scan, self._settings.repository)
            passed_over = await in_thread(overlooked, self._settings.repository)
        # At once at the start; later when two looks have seen the same, because a copy may be in progress.
        before = passed_over if self._overlooked is None else self._overlooked
        at_rest = [one for one in passed_over if one in before]
        for one in at_rest:
            if one not in self._warned:
                log.warning("not served", what=one)
        self._warned, self._overlooked = set(at_rest), passed_over
        return seen

    async def _load_model(self, name: str) -> None:
        async with self._turns[name]:
            self._now(name)
            try:
                seen = await self._look()
            except LoadError as error:
                log.error("repository not read", reason=str(error))
                raise LoadFailed("the repository cannot be read; the server's log says why") from error
            self._note(seen)
            if name not in seen:
                raise ModelUnknown(f"no model {name[:128]!r} is in the repository; expected NAME/VERSION/model.onnx")
            if failures := await self._act_now(name, seen[name], again=True):
                raise LoadFailed(f"load failed for model {name!r}: {'; '.join(failures)}")

    async def _unload_model(self, name: str) -> None:
        async with self._turns[name]:
            self._now(name)
            for version in self._models.get(name, {}).values():
                version.retire("unloaded")
            await self._changed(name)

    async def _act(self, name: str, model: ModelFolder | None) -> None:
        async with self._turns[name]:
            await self._act_now(name, model)

    async def _act_now(self, name: str, model: ModelFolder | None, again: bool = False) -> list[str]:
        """Have served of a model what its folder and policy ask for.

        Args:
            name: of the model.
            model: as its folder stands; None if it is not there any more.
            again: try also what has failed before.

        Returns:
            What of it failed, and why.
        """
        if model is None:
            self._acted.pop(name, None)
        else:
            self._acted[name] = model
        there = {found.version for found in model.versions} if model is not None else set()
        for number, version in self._models.get(name, {}).items():
            version.missed = False
            if number not in there and (model is None or not model.trouble):
                version.there, version.tried, version.failure = False, None, ""
                version.retire("not in the folder any more")
        try:
            return [] if model is None else await self._serve(model, again)
        finally:
            await self._changed(name)

    async def _serve(self, model: ModelFolder, again: bool) -> list[str]:
        name = model.path.name
        try:
            if model.trouble:
                raise LoadError(model.trouble)
            candidates, count, missing = await in_thread(wanted, model, self._settings.latest_versions)
        except Exception as error:
            # What serves goes on: nobody can tell what should be instead.
            failure = self._told(error, model=name)
            for version in map(self._version, model.versions):
                version.tried, version.failure = None, failure
            if not model.versions:
                self._miss(name, 0, failure)
            return [failure]
        listed = {found.version for found in candidates}
        for found in model.versions:
            version = self._version(found)
            if version.tried is None:
                version.failure = ""
            if version.serving is None and found.version not in listed:
                version.idle_because = "not within the policy"
        failures = []
        for number in missing:
            numbers = ", ".join(str(found.version) for found in reversed(model.versions))
            absent = LoadError(f"model.yaml asks for version {number}; the folder has {numbers}")
            failures.append((number, self._told(absent, model=name, version=number)))
            self._miss(name, number, str(absent))
        serving: list[int] = []
        for found in candidates:
            if len(serving) == count:
                break
            if await self._bring(found, again):
                serving.append(found.version)
            if failure := self._version(found).failure:
                failures.append((found.version, failure))
        # Where none of those that are wanted loads, the old ones are better than nothing.
        for found in model.versions if serving else ():
            if found.version not in serving:
                self._version(found).retire("not within the policy")
        return [f"version {number} is at UNAVAILABLE state: {failure}" for number, failure in failures]

    async def _bring(self, found: Found, again: bool) -> bool:
        """Load a version unless that is done, and switch to it.

        Returns:
            Whether it serves, if only with the files before.
        """
        version = self._version(found)
        held = next((runner for runner in version.runners if version.contents.get(runner) == found.content), None)
        if held is not None:
            # Also one that was about to go: it holds its weights anyway.
            version.failure, version.tried = "", found.content
            self._switch(version, held)
        elif self._in_use(found.name) >= _MOST_IN_USE:
            # Tried again at the next look, and told once.
            self._acted.pop(found.name, None)
            failure = f"sessions go on with {_MOST_IN_USE} former states of the model; it is loaded when fewer do"
            if version.failure != failure:
                version.failure = self._told(LoadError(failure), model=found.name, version=found.version)
            version.tried = ()
        elif again or not (version.failure and version.tried == found.content):
            runner = await self._load(version, found)
            if runner is not None:
                # The same model as before, in files that were written anew, needs no switch.
                speed = found.content[1].speed
                alike = (one for one in version.runners if _same(one, runner))
                held = next((one for one in alike if version.contents[one][1].speed == speed), runner)
                if held is not runner:
                    runner.let_go()
                version.contents[held] = found.content
                self._switch(version, held)
        return version.serving is not None

    def _switch(self, version: Version, runner: Runner) -> None:
        if runner is version.serving:
            return
        if runner in version.retiring:
            runner.show()
        else:
            runner.start()
        version.switch(runner)

    async def _keep(self, found: Found) -> None:
        """Load a version for the sessions alone that it has."""
        async with self._turns[found.name]:
            version = self._version(found)
            try:
                read = await in_thread(look_again, found)
            except LoadError:
                read = None
            if read is None or version.failure or not await self._bring(read, again=False):
                return
            version.retire("kept for the sessions of an earlier process")

    async def _load(self, version: Version, found: Found) -> Runner | None:
        """Load and warm a version's files; None if that fails, which is noted."""
        began = time.perf_counter()
        version.tried = found.content
        version.loading = True
        timeout_s = self._settings.load_timeout_s
        try:
            # The thread may go on after that; its place is for others.
            async with self._room, asyncio.timeout(timeout_s):
                runner, loaded = await in_thread(self._make, found, asyncio.get_running_loop())
                try:
                    await in_thread(self._settle_in, runner, loaded)
                except BaseException:
                    runner.let_go()
                    raise
        except Exception as error:
            reason = LoadError(too_long(timeout_s)) if isinstance(error, TimeoutError) else error
            version.failure = self._told(reason, model=found.name, version=found.version)
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
            device=loaded.choice.device,
            provider=loaded.provider,
            precision=runner.manifest.precision,
            max_error=None if (parity := runner.manifest.parity) is None else float(f"{parity.max_error:.2g}"),
            threads=loaded.threads,
            streamable=runner.manifest.streamable,
            seconds=round(time.perf_counter() - began, 3),
        )
        return runner

    def _make(self, found: Found, loop: asyncio.AbstractEventLoop) -> tuple[Runner, Loaded]:
        settings = self._settings
        loaded, tuning = tuned(found.path, settings)
        runner = None
        try:
            runner = self._runner(found, loop, loaded, tuning)
        except LoadError as error:
            if loaded.choice.device == "cpu" or isinstance(error, TooLong):
                raise
            choice = instead_of_cuda(loaded, settings, str(error))
        if runner is None:
            # Of what has failed on the device nothing is held while the other is tried.
            del loaded, tuning
            loaded, tuning = tuned(found.path, settings, choice=choice)
            runner = self._runner(found, loop, loaded, tuning)
        # What was read at different times may be of different models, and its digest of neither.
        now = look_again(found)
        if now is None or now.content != found.content:
            raise LoadError("its files changed while they were loaded")
        return runner, loaded

    def _runner(self, found: Found, loop: asyncio.AbstractEventLoop, loaded: Loaded, tuning: Tuning) -> Runner:
        """Make a runner of what was loaded, and warm it."""
        settings = self._settings
        description = loaded.description
        tick_rows = description.max_tick_rows or settings.max_tick_rows or tuning.tick_rows
        delay_us = description.max_queue_delay_us
        limits = Limits(
            queued_rows=settings.max_queued_rows,
            queued_bytes=settings.max_queued_bytes,
            queued_s=settings.max_queued_s,
            tick_rows=tick_rows,
            tick_steps=settings.max_tick_steps,
            ragged=loaded.graph.manifest.lengths is not None,
            sliced=loaded.graph.manifest.streamable,
            short_tick_s=(description.short_tick_ms or settings.short_tick_ms) * 1e-3,
            long_tick_s=(description.long_tick_ms or settings.long_tick_ms) * 1e-3,
            delay_s=(settings.max_queue_delay_us if delay_us is None else delay_us) * 1e-6,
        )
        slots = settings.max_sessions + 2 * (settings.max_queued_rows + tick_rows)
        try:
            runner = Runner(
                found.name,
                found.version,
                loaded.graph,
                limits,
                slots,
                self._metrics,
                self._clock,
                loop,
                pace=tuning.pace,
            )
            runner.choice = loaded.choice
            with loading(settings), no_longer_than(settings.load_timeout_s, loaded.interrupt):
                runner.warm_up()
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(f"the model does not run: {error}") from error
        return runner

    def _settle_in(self, runner: Runner, loaded: Loaded) -> None:
        settings = self._settings
        with loading(settings), no_longer_than(settings.load_timeout_s, loaded.interrupt):
            runner.settle_in()

    def _in_use(self, name: str) -> int:
        """How many runners of a model only finish their sessions."""
        return sum(runner.pool.taken > 0 for one in self._models[name].values() for runner in one.retiring)

    def _note(self, seen: Mapping[str, ModelFolder]) -> None:
        """Know of every version that is there, if only to say why it is not served."""
        there = {self._version(found) for model in seen.values() for found in model.versions}
        for version in self._every():
            version.there = version in there

    def _miss(self, name: str, number: int, failure: str) -> None:
        """Know of a version that should be there and is not."""
        version = self._models.setdefault(name, {}).setdefault(number, Version(name, number))
        version.there, version.missed, version.failure = False, True, failure

    def _version(self, found: Found) -> Version:
        version = self._models.setdefault(found.name, {}).setdefault(found.version, Version(found.name, found.version))
        version.there = True
        return version

    async def _changed(self, name: str) -> None:
        if self._started:
            await self._on_change(name, self.ready(name))
        await self.free()

    def _asked(self, work: Callable[[str], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
        """Begin a change on request, or join the last that waits for its turn, if that is the same."""
        waiting = self._waiting.get(name)
        if waiting is None or waiting[0] != work or waiting[1].done():
            self._waiting[name] = waiting = work, self._begin(work, name)
        return waiting[1]

    def _now(self, name: str) -> None:
        """It is this task's turn: nobody joins it any more."""
        waiting = self._waiting.get(name)
        if waiting is not None and waiting[1] is asyncio.current_task():
            del self._waiting[name]

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
        log.error("model not loaded", **what, reason=in_brief(str(error), self._settings, "error"))
        return str(error).replace(f"{self._settings.repository}/", "")[:_LONGEST_REASON]


def _does_without_cuda(model: ModelFolder) -> bool:
    """Whether a model's own description has the CPU run it where CUDA is missing."""
    try:
        said = read(model.path)
    except LoadError:
        return False
    return said is not None and (said.device in ("cpu", "auto") or said.fallback == "allow")


def _same(one: Runner, other: Runner) -> bool:
    """Whether two runners give the same, and in the same way."""
    ways = [
        (runner.digest, runner.manifest, replace(runner.choice, reason="", tf32_difference=None))
        for runner in (one, other)
    ]
    return ways[0] == ways[1]
