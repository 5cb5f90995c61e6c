"""A client killed, a connection cut, a server restarted: no step is lost or doubled, outputs are the same bits."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor import AsyncClient, AsyncSession, Client, SessionLost
from tests.graphs import INPUT, expected
from tests.process import ROOT, ServerProcess

pytestmark = pytest.mark.e2e

KEY = "the owner's"

CLIENT = """
import sys
import numpy as np
from conveyor import Client

target, key, session_id, position, series = sys.argv[1:]
x = np.load(series)
with Client(target, key=key) as client:
    session = client.attach(session_id, position=int(position))
    while session.position < len(x):
        at = session.position
        y = session.step(x[at : at + 1 + at % 3])
        print(at, y.tobytes().hex(), flush=True)
"""
"""Goes on with a session to the end of its series, in chunks of 1 to 3 steps, and prints each reply."""


async def test_a_client_that_comes_before_its_server(lstm_repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says at once that nobody is there, waits, and says when somebody is."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        call = asyncio.create_task(client.models())
        while not caplog.messages:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        with await asyncio.to_thread(ServerProcess, lstm_repository, port=port):
            assert [model.name for model in await call] == ["lstm"]
    away, back = (record.getMessage() for record in caplog.records if record.name == "conveyor")
    assert away.startswith(f"127.0.0.1:{port} is not in service, and is tried again for up to 30 s: ")
    assert back.startswith(f"127.0.0.1:{port} is in service again, after ")


def test_a_client_killed_in_mid_stream(server_process: ServerProcess, tmp_path: Path) -> None:
    """One process after the other is killed, the next attaches by id; the outputs are those of an undisturbed run."""
    x = np.random.default_rng(1).standard_normal((400, INPUT)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    after = random.Random(2)
    outputs: dict[int, bytes] = {}
    lives = 0
    with Client(server_process.target, key=KEY) as client:
        with client.session("lstm") as undisturbed:
            whole = undisturbed.step(x)
            end = undisturbed.export()
        session_id = client.session("lstm").session_id
        position = 0
        while position < len(x):
            lives += 1
            arguments = [server_process.target, KEY, session_id, str(position), str(tmp_path / "x.npy")]
            command = [sys.executable, "-c", CLIENT, *arguments]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                lines = after.randrange(10, 60)
                for line in process.stdout:
                    if not line.endswith(b"\n"):
                        break
                    at, y = line.split()
                    assert int(at) == position
                    outputs[position] = bytes.fromhex(y.decode())
                    position += 1 + position % 3
                    lines -= 1
                    if lines == 0:
                        process.kill()
        assert lives > 4
        assert b"".join(outputs.values()) == whole.tobytes()
        with client.attach(session_id) as session:
            assert session.position == len(x)
            for name, state in session.export().states.items():
                assert state.tobytes() == end.states[name].tobytes()
    np.testing.assert_allclose(whole, expected(x), rtol=0, atol=2e-6)


class Cutter:
    """Passes bytes between clients and a server, and cuts each connection after a random number of them.

    Attributes:
        cuts: how many connections were cut.
        port: where it listens.
    """

    def __init__(self, server_port: int, seed: int) -> None:
        self.cuts = 0
        self.port = 0
        self._server_port = server_port
        self._random = random.Random(seed)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        left = self._random.randrange(500, 12_000)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal left
            while data := await source.read(4096):
                if len(data) >= left:
                    # Up to the byte: often in the middle of a frame.
                    sink.write(data[:left])
                    self.cuts += 1
                    return
                left -= len(data)
                sink.write(data)

        ways = [asyncio.create_task(pass_on(reader, far_writer)), asyncio.create_task(pass_on(far_reader, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way, end in zip(ways, (writer, far_writer), strict=True):
            way.cancel()
            self._random.choice([end.close, end.transport.abort])()


@asynccontextmanager
async def cutter(server_port: int, seed: int) -> AsyncIterator[Cutter]:
    """A cutter on a free port, in this event loop."""
    cutter = Cutter(server_port, seed)
    listener = await asyncio.start_server(cutter.connected, "127.0.0.1", 0)
    cutter.port = listener.sockets[0].getsockname()[1]
    try:
        yield cutter
    finally:
        listener.close()


@pytest.mark.parametrize("seed", [1, 2])
async def test_connections_cut_at_any_byte(lstm_repository: Path, seed: int) -> None:
    """Opening, stepping, forking, resetting, exporting and closing over connections that keep breaking: each once."""
    random = np.random.default_rng(seed)
    series = random.standard_normal((6, 200, INPUT)).astype(np.float32)
    with ServerProcess(lstm_repository, "--metrics-port", "0") as server:
        async with (
            AsyncClient(server.target) as direct,
            cutter(server.port, seed) as between,
            AsyncClient(f"127.0.0.1:{between.port}") as client,
        ):
            whole = await direct.infer("lstm", series, return_states=True)

            async def stream(session: AsyncSession, x: NDArray[np.float32], cuts: list[int]) -> NDArray[np.float32]:
                return np.concatenate([await session.step(part) for part in np.split(x, cuts)])

            async def use(n: int) -> None:
                x, y = series[n], whole.outputs[n]
                cuts = sorted(random.choice(np.arange(1, 200), 70, replace=False).tolist())
                async with client.session("lstm") as session:
                    await session.step(x[:7])
                    await session.reset()
                    np.testing.assert_array_equal(
                        await stream(session, x[:100], [cut for cut in cuts if cut < 100]), y[:100]
                    )
                    async with await session.fork() as fork:
                        rest = await asyncio.gather(
                            stream(session, x[100:], [cut - 100 for cut in cuts if cut > 100]),
                            stream(fork, x[100:], [3, 9]),
                        )
                        for part in rest:
                            np.testing.assert_array_equal(part, y[100:])
                        for each in (session, fork):
                            state = await each.export()
                            assert state.position == each.position == 200
                            for name, array in state.states.items():
                                np.testing.assert_array_equal(array, whole.states[name][n])

            await asyncio.gather(*(use(n) for n in range(len(series))))
            assert between.cuts > 10
            # A session that a lost reply had left behind would still be open.
            url = f"http://127.0.0.1:{server.ready['metrics_port']}/metrics"
            metrics = await asyncio.to_thread(lambda: urlopen(url, timeout=10).read().decode())
            assert "conveyor_sessions 0.0" in metrics.splitlines()


async def test_blocks_cut_at_any_byte(lstm_repository: Path) -> None:
    """Many sessions stepped together over connections that keep breaking: each chunk counts once."""
    random = np.random.default_rng(4)
    x = random.standard_normal((8, 200, INPUT)).astype(np.float32)
    with ServerProcess(lstm_repository) as server:
        async with (
            AsyncClient(server.target) as direct,
            cutter(server.port, seed=4) as between,
            AsyncClient(f"127.0.0.1:{between.port}") as client,
        ):
            sessions = [await client.session("lstm") for _ in x]
            parts = np.split(x, np.sort(random.choice(np.arange(1, 200), 70, replace=False)), 1)
            y = np.concatenate([await client.step_many(sessions, part) for part in parts], 1)
            np.testing.assert_allclose(y, await direct.infer("lstm", x), rtol=0, atol=2e-6)
            assert {session.position for session in sessions} == {200}
            assert between.cuts > 10


@pytest.mark.parametrize("kept", [True, False])
async def test_a_server_restarted_under_its_clients(lstm_repository: Path, tmp_path: Path, kept: bool) -> None:
    """With its sessions in a file a stream goes on as if nothing had been; without, it ends with SessionLost."""
    x = np.random.default_rng(3).standard_normal((40, INPUT)).astype(np.float32)
    flags: list[Any] = ["--sessions-file", str(tmp_path / "sessions")] if kept else []
    first = ServerProcess(lstm_repository, *flags)
    async with AsyncClient(first.target) as client:
        session = await client.session("lstm")
        y = [await session.step(row) for row in x[:20]]
        assert first.terminate() == 0
        waiting = asyncio.create_task(session.step(x[20]))
        with await asyncio.to_thread(ServerProcess, lstm_repository, *flags, port=first.port):
            if kept:
                y += [await waiting, *[await session.step(row) for row in x[21:]]]
                np.testing.assert_allclose(y, expected(x), rtol=0, atol=2e-6)
            else:
                with pytest.raises(SessionLost, match="position 20"):
                    await waiting


async def test_a_server_restarted_twice_under_many_clients(lstm_repository: Path, tmp_path: Path) -> None:
    """With its sessions in a file, thirty streams and all calls beside them notice nothing: no error, the same bits."""
    x = np.random.default_rng(4).standard_normal((30, 600, INPUT)).astype(np.float32)
    flags = ["--sessions-file", str(tmp_path / "sessions")]
    server = ServerProcess(lstm_repository, *flags)
    target, ended = server.target, asyncio.Event()
    sessions: list[AsyncSession] = []

    async def stream(series: NDArray[np.float32]) -> NDArray[np.float32]:
        async with AsyncClient(target) as client, client.session("lstm") as session:
            sessions.append(session)
            y = [await session.step(series[:1])]
            while session.position < len(series):
                y.append(await session.step(series[session.position :][: 1 + session.position % 3]))
            return np.concatenate(y)

    async def call(series: NDArray[np.float32]) -> int:
        rounds = 0
        async with AsyncClient(target) as client:
            while not ended.is_set():
                async with client.session("lstm") as session:
                    y = await session.step(series[:9])
                    async with await session.fork() as fork, client.import_session(await session.export()) as imported:
                        await session.reset()
                        again = await session.step(series[:9])
                        batch = await client.infer("lstm", series[None, :9])
                        for other in (again, batch[0]):
                            np.testing.assert_array_equal(other, y)
                        assert [each.position for each in (session, fork, imported)] == [9, 9, 9]
                rounds += 1
        return rounds

    try:
        async with AsyncClient(target) as client:
            undisturbed = await client.infer("lstm", x)
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(stream(series)) for series in x]
            callers = [group.create_task(call(series)) for series in x[:5]]
            for begun in (50, 250):
                while len(sessions) < len(x) or min(session.position for session in sessions) < begun:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                assert await asyncio.to_thread(server.terminate) == 0
                # The quickest may have come to their end; most are on their way.
                assert np.median([session.position for session in sessions]) < x.shape[1]
                server = await asyncio.to_thread(ServerProcess, lstm_repository, *flags, port=server.port)
            for task, whole in zip(streams, undisturbed, strict=True):
                np.testing.assert_array_equal(await task, whole)
            ended.set()
        assert min(task.result() for task in callers) > 0
    finally:
        server.kill()
