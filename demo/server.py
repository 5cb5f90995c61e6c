"""The real server as a process of its own, for as long as it is needed.

Owns its start, its end, and that nothing of it is left behind. Must not know what is asked of it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parent.parent
_START_S, _DRAIN_S, _POLL_S = 30.0, 40.0, 0.05


class ServerFailed(RuntimeError):
    """The server did not become ready, or did not end as it should; the text names its log."""


@dataclass(frozen=True)
class Server:
    """A server that is ready.

    Attributes:
        pid: the process.
        port: for gRPC, on 127.0.0.1.
        metrics_port: for its metrics over HTTP.
        ready_s: seconds from the start of the process until it was ready.
    """

    pid: int
    port: int
    metrics_port: int
    ready_s: float

    @property
    def target(self) -> str:
        """Its address, as clients want it."""
        return f"127.0.0.1:{self.port}"

    def metrics(self) -> dict[tuple[str, str], float]:
        """All that it counts now: the sum over models, by sample name and, for a histogram's bucket, upper bound."""
        # No proxy stands between two processes of one machine, whatever the environment says.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        totals: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, sample.labels.get("le", ""))
                totals[key] = totals.get(key, 0.0) + sample.value
        return totals


@contextmanager
def running(repository: Path, log: Path) -> Iterator[Server]:
    """Starts a server on free ports and, however the block ends, stops it.

    Args:
        repository: the models.
        log: a file for the server's log.

    Raises:
        ServerFailed: the server did not become ready, or did not end as it should; the text names the log.
    """
    command = [sys.executable, "-m", "service", "--repository", str(repository.resolve())]
    command += ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--device", "cpu", "--log-format", "json"]
    with log.open("w") as file:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then drains the server.
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        server = _ready(process, log)
        yield server
    finally:
        status = _stop(process)
    if status != 0:
        raise ServerFailed(f"the server ended with status {status}; its log is {log}")
    for port in (server.port, server.metrics_port):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                raise ServerFailed(f"port {port} is still open after the server has ended")


def _ready(process: subprocess.Popen[bytes], log: Path) -> Server:
    began = time.monotonic()
    while time.monotonic() - began < _START_S:
        for line in log.read_text().splitlines():
            event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if event.get("event") == "ready":
                return Server(process.pid, event["port"], event["metrics_port"], time.monotonic() - began)
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with status {process.returncode} before it was ready: see {log}")
        time.sleep(_POLL_S)
    raise ServerFailed(f"the server was not ready within {_START_S:.0f} s: see {log}")


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Lets the server drain; kills it if that takes too long or the wait is interrupted."""
    process.terminate()
    try:
        return process.wait(_DRAIN_S)
    except subprocess.TimeoutExpired:
        return -9
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
