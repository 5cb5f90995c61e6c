"""The servers that are measured: each started when it is first needed, and anew when it has died.

Owns who answers for a subject and how it is started. Must not know loads or figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench import triton
from bench.cases import Subject
from bench.models import Model, make, model_file
from bench.processes import Process, Worker, python

TUNING = "tuning"
"""Folder, in the benchmark's, of what the server finds out about models when it first loads them."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How measuring is done.

    Attributes:
        folder: where models and peers are kept.
        runs: of what a target rests on; the median counts.
        seconds: of each run that a target rests on; others are shorter by a third.
        threads: inside one run of a model, of every subject.
    """

    folder: Path
    runs: int = 3
    seconds: float = 1.5
    threads: int = 1


class Servers:
    """The servers of some cases, side by side; those that are not asked do nothing.

    Args:
        settings: how measuring is done.
        say: told what is done.

    Attributes:
        settings: as given.
        say: as given.
        client: what puts loads on them.
        event_loops: on which loop each subject that was started runs.
    """

    def __init__(self, settings: Settings, say: Say) -> None:
        self.settings = settings
        self.say = say
        self.client = Worker("bench.load")
        self.event_loops: dict[str, str] = {}
        self._running: dict[tuple[str, str], Process] = {}

    def get(self, subject: Subject, model: Model) -> Process:
        """The server that answers for a subject.

        Raises:
            Failed: if it does not start.
        """
        name, _ = key = _key(subject, model)
        server = self._running.get(key)
        if server is None or not server.alive():
            if server is not None:
                server.end()
            self.say(f"starting {name}")
            server = self._running[key] = self._start(name, model)
            self.event_loops[name] = "its own" if name == "triton" else server.event_loop()
        return server

    def drop(self, subject: Subject, model: Model) -> None:
        """End a server that has failed; asked for again, it is started anew."""
        if (server := self._running.pop(_key(subject, model), None)) is not None:
            server.end()

    def _start(self, name: str, model: Model) -> Process:
        settings = self.settings
        repository, path = make(model, settings.folder, self.say), model_file(model, settings.folder)
        if name == "conveyor":
            return start_conveyor(repository, settings)
        if name == "loop":
            return Process(name, python("bench.loop", str(path), "--threads", str(settings.threads)))
        if name == "echo":
            return Process(name, python("bench.echo", "--event-loop", self._event_loop(model)))
        if name == "bare":
            given = ("--threads", str(settings.threads), "--event-loop", self._event_loop(model))
            return Process(name, python("bench.bare", str(path), *given))
        return triton.start(model, path, settings.folder, settings.threads, self.say)

    def _event_loop(self, model: Model) -> str:
        """A ceiling has to run on what the server that it is a ceiling of runs on."""
        return self.get("conveyor", model).event_loop()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.client.end()
        for server in self._running.values():
            server.end()


def _key(subject: Subject, model: Model) -> tuple[str, str]:
    """Which server answers for a subject. The echo is told by each call what to answer: one serves all models."""
    return "conveyor" if subject == "inference" else subject, "" if subject == "echo" else model.name


def start_conveyor(repository: Path, settings: Settings, *flags: str) -> Process:
    """Start the server with what is in a repository.

    Raises:
        Failed: if it does not start.
    """
    given = ("--repository", str(repository), "--threads", str(settings.threads), *flags)
    fixed = ("--port", "0", "--metrics-port", "0", "--device", "cpu", "--log-format", "json")
    return Process("conveyor", python("service", *given, *fixed, "--cache-dir", str(settings.folder / TUNING)))
