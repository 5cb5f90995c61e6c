"""One version of a model in the repository: which runner of it serves, which only finish their sessions, and why not.

Owns the passage of a runner from serving to retiring to freed, and what is told of it. Must not know grpc, sessions or
the folder. Lives on the event loop's thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import structlog

from service.ticks.runner import Runner

_FREE_TIMEOUT_S = 1.0
_LONGEST_REASON = 300

log = structlog.get_logger()

State: TypeAlias = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """What is told of a version.

    Attributes:
        name: of the model.
        version: of it; 0 for the model as a whole, where nobody can tell its versions.
        state: READY takes work; LOADING will; UNLOADING goes on with the sessions it has; UNAVAILABLE does nothing.
        reason: why it is so, for an operator; empty where there is nothing to say.
    """

    name: str
    version: int
    state: State
    reason: str


class Version:
    """One version of a model.

    Attributes:
        serving: the runner that takes new work; None if there is none.
        retiring: runners that only go on with what they have.
        loading: whether a file is being loaded.
        contents: what the folder held of each runner.
        tried: what the folder held when it was loaded last, or failed to.
        failure: why that failed; empty if it did not.
        idle_because: why nothing of it serves, though nothing failed.
        there: whether it is in the folder.
        missed: whether it should be and is not, so that its failure is told.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.serving: Runner | None = None
        self.retiring: list[Runner] = []
        self.loading = False
        self.contents: dict[Runner, Any] = {}
        self.tried: Any = None
        self.failure = ""
        self.idle_because = "not loaded"
        self.there = True
        self.missed = False

    @property
    def runners(self) -> list[Runner]:
        """Every runner that is not freed, the one that serves first."""
        return [*([self.serving] if self.serving is not None else []), *self.retiring]

    def switch(self, runner: Runner) -> None:
        """Give new work to another runner, maybe one that has retired; the one before goes on with what it has."""
        self.retire("replaced")
        if runner in self.retiring:
            self.retiring.remove(runner)
        self.serving = runner

    def retire(self, why: str) -> None:
        """Take no new work."""
        self.idle_because = why
        if self.serving is not None:
            log.info("model retired", model=self.name, version=self.number, reason=why, in_use=self.serving.pool.taken)
            self.retiring.append(self.serving)
            self.serving = None

    @property
    def refusal(self) -> str:
        """Why it takes no new work, for those who ask for some."""
        if self.failure:
            return f"did not load: {self.failure[:_LONGEST_REASON]}"
        if self.retiring:
            return f"is being unloaded ({self.idle_because}); sessions that it has go on"
        return f"is not served: {self.idle_because}"

    async def free(self) -> bool:
        """Stop the retiring runners that nobody uses any more, and let go of them.

        Returns:
            Whether there were any.
        """
        unused = [runner for runner in self.retiring if not runner.pool.taken and not runner.users]
        # Before the first wait, so that nobody frees one twice or counts on it.
        self.retiring = [runner for runner in self.retiring if runner not in unused]
        for runner in unused:
            self.contents.pop(runner, None)
            await runner.stop(_FREE_TIMEOUT_S)
            log.info("model freed", model=self.name, version=self.number)
        return bool(unused)

    def entry(self) -> Entry:
        """Tell how it stands."""
        held = sum(runner.pool.taken for runner in self.retiring)
        goes_on = f"sessions and batch rows that go on: {held}" if held else ""
        why = self.failure or self.idle_because
        if self.serving is not None:
            changed = "the files have changed and are being loaded" if self.loading else ""
            failed = f"the files have changed and did not load: {self.failure}" if self.failure else ""
            return self._entry("READY", changed or failed, goes_on and f"{goes_on}, with the files before")
        if self.loading:
            return self._entry("LOADING", goes_on)
        if self.retiring:
            return self._entry("UNLOADING", why, goes_on)
        return self._entry("UNAVAILABLE", why)

    def _entry(self, state: State, *reasons: str) -> Entry:
        return Entry(self.name, self.number, state, "; ".join(filter(None, reasons)))
