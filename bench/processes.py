"""Servers as processes of their own: started, asked what they have used, ended.

Owns how cost is counted: CPU time of the whole process tree, user and system, from the kernel's accounting.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A process did not do what it should; the text has the end of what it said."""


class Process:
    """A server of which it is known when it is ready: it says so on a line of its output, as JSON with a ``port``.

    Attributes:
        name: for people.
        port: where it listens.
        said: the line.

    Args:
        name: for people.
        command: to run, from the project's folder.
        environment: more of it.
        ready: for a server that does not: waits until it is, and gives what it would have said.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        ready: Callable[[], dict[str, object]] | None = None,
    ) -> None:
        self.name = name
        self._lines: list[str] = []
        self._ready = threading.Event()
        self.said: dict[str, object] = {}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready is not None:
            threading.Thread(target=self._ask, args=(ready,), daemon=True).start()
        if not self._ready.wait(120) or not self.said:
            self.end()
            raise Failed(f"{name} did not start:\n" + "\n".join(self._lines[-10:]))

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(str(self.said["port"]))

    def cpu_s(self) -> float:
        """CPU time that it and all its children have used, in seconds."""
        return tree_cpu_s(self._process.pid)

    def resident_bytes(self) -> int:
        """Memory that it and all its children hold."""
        return sum(_resident_bytes(pid) for pid in _tree(self._process.pid))

    def peak_resident_bytes(self) -> int:
        """The most memory that it has held at once."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def event_loop(self) -> str:
        """The event loop that it runs on, told from the libraries it has mapped."""
        return "uvloop" if "uvloop" in Path(f"/proc/{self.pid}/maps").read_text() else "asyncio"

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def metric(self, name: str) -> float:
        """The sum of one metric over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.said['metrics_port']}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)

    def end(self) -> None:
        """End it, and what it started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reader.join(5)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def _ask(self, ready: Callable[[], dict[str, object]]) -> None:
        self.said = ready()
        self._ready.set()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines = [*self._lines[-50:], line.rstrip()]
            if not self.said and line.startswith("{"):
                said = json.loads(line)
                if "port" in said:
                    self.said = said
                    self._ready.set()
        self._ready.set()


class Worker:
    """A process that answers each line with one of JSON; it stays, for starting it takes as long as a short run.

    Args:
        module: to run.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> None:
        """Give it something to do; ``answer`` comes next.

        Raises:
            Failed: if it has ended meanwhile.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                python(self._module),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self.end()
            raise Failed(f"{self._module} ended early") from error

    def answer(self, timeout_s: float) -> dict[str, float]:
        """What came of it.

        Raises:
            Failed: if it failed, ended, or has not answered in time; the next question starts it anew.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.end()
            raise Failed(f"{self._module}: " + ("ended early" if ready else f"no answer after {timeout_s:g} s"))
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            raise Failed(str(said["failed"]))
        return said

    def end(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()


def tree_cpu_s(pid: int) -> float:
    """CPU time that a process and all its children have used, in seconds."""
    return sum(_cpu_s(member) for member in _tree(pid))


def python(module: str, *flags: str) -> list[str]:
    """The command that runs one of the project's modules."""
    return [sys.executable, "-m", module, *flags]


def _tree(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    tree = [pid]
    for member in tree:
        tree += parents.get(member, [])
    return tree


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
