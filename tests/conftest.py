"""Fixtures that tests of the server share: one in this process on a free port, and one as a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.server import Server
from service.settings import Settings
from tests.clock import Clock
from tests.graphs import write_lstm
from tests.process import ServerProcess


@pytest.fixture(scope="session")
def lstm_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one model: ``lstm``, version 1."""
    repository = tmp_path_factory.mktemp("repository")
    write_lstm(repository)
    return repository


@asynccontextmanager
async def running(repository: Path, clock: Clock | None = None, **settings: Any) -> AsyncIterator[Server]:
    """Run a server in this event loop, on a free port; the clock stands still unless the test moves it.

    Models are not measured, unless the test asks for it.
    """
    server = Server(Settings(**{"repository": repository, "port": 0, "tune_s": 0, **settings}), clock or Clock())
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


@asynccontextmanager
async def calling(server: Server) -> AsyncIterator[stubs.ConveyorServiceStub]:
    """Connect to a server with plain stubs."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield stubs.ConveyorServiceStub(channel)


@pytest.fixture
def server_process(lstm_repository: Path) -> Iterator[ServerProcess]:
    """A server as a process of its own, ready, with model ``lstm``."""
    with ServerProcess(lstm_repository) as process:
        yield process
