"""The real server as a process of its own, for tests that kill, signal or restart it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent


class ServerProcess:
    """``python -m service`` on a free port.

    Attributes:
        port: where it listens.
        target: the same, as an address.
        ready: what its "ready" event says; nothing while it starts.
        events: everything it has logged, one dict an event.

    Args:
        repository: the models.
        flags: more flags.
        port: to listen on; 0 for a free one.
        wait: until it is ready.
    """

    def __init__(self, repository: Path, *flags: str, port: int = 0, wait: bool = True) -> None:
        command = [sys.executable, "-m", "service", "--repository", str(repository), "--port", str(port)]
        self._process = subprocess.Popen(
            [*command, "--log-format", "json", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.events: list[dict[str, Any]] = []
        self._news: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready: dict[str, Any] = {}
        if wait:
            try:
                self.ready = self.wait_for("ready")
            except BaseException:
                self.kill()
                raise
        self.port: int = self.ready.get("port", port)
        self.target = f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_for(self, event: str, timeout_s: float = 30) -> dict[str, Any]:
        """Return the next event of that name.

        Raises:
            RuntimeError: if the process ends first.
            queue.Empty: if it says nothing for ``timeout_s``.
        """
        while (news := self._news.get(timeout=timeout_s)) is not None:
            if news["event"] == event:
                return news
        raise RuntimeError(f"the server ended with status {self._process.wait()} before {event!r}: {self.events}")

    def terminate(self, timeout_s: float = 40) -> int:
        """Send SIGTERM, and return the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout_s)

    def deafen(self) -> None:
        """Close the other end of its log."""
        assert self._process.stderr is not None
        os.close(self._process.stderr.fileno())

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            self.kill()
        self._reader.join(5)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with suppress(OSError):
            for line in self._process.stderr:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = {"event": "not json", "line": line}
                self.events.append(event)
                self._news.put(event)
        self._news.put(None)
