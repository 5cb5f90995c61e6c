"""Client and Session: the asynchronous client seen from threads, under interrupts, at exit and after a fork."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conveyor import Client, ConnectionLost, InvalidRequest, Session, SessionLost, SessionState, StepsFailed
from conveyor.background import shared
from tests.unit.conveyor.sum_server import Fault, SumServer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """An interrupt arrives as KeyboardInterrupt here, also where whoever started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def server() -> Iterator[SumServer]:
    """A server beside the clients, in the thread that runs them."""

    async def start() -> SumServer:
        server = SumServer()
        await server.start()
        return server

    server = shared().run(start())
    yield server
    shared().run(server.stop())


def rows(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Whole numbers, so that their sums are exact: [count, 2]."""
    return np.arange(1, count * 2 + 1, dtype=np.float32).reshape(count, 2)


def test_everything_that_the_asynchronous_client_can_do(server: SumServer, tmp_path: Path) -> None:
    """Models, batches, sessions, forks, states."""
    with Client(server.target) as client:
        assert [model.name for model in client.models()] == ["sum"]
        assert client.model("sum").version == 1
        np.testing.assert_array_equal(client.infer("sum", rows(3)[None]), np.cumsum(rows(3), 0)[None])
        assert client.infer("sum", [rows(2), rows(1)], return_states=True).states["s"].shape == (2, 2)
        with client.session("sum") as session:
            np.testing.assert_array_equal(session.step(rows(3)[0]), rows(1)[0])
            np.testing.assert_array_equal(session.step(rows(3)[1:]), np.cumsum(rows(3), 0)[1:])
            assert (session.position, session.in_doubt, session.model.name) == (3, False, "sum")
            session.export().save(tmp_path / "state.npz")
            with session.fork() as fork, client.attach(session.session_id, position=1) as repeated:
                np.testing.assert_array_equal(repeated.step(rows(3)[1:]), np.cumsum(rows(3), 0)[1:])
                assert fork.position == 3
            with client.import_session(SessionState.load(tmp_path / "state.npz")) as imported:
                assert imported.position == 3
        assert not server.sessions
        session = client.session("sum")
        session.step(rows(2))
        session.reset()
        assert session.position == 0
        assert session.settle() is None
        assert repr(session) == f"<Session {session.session_id} of 'sum' at position 0>"


def test_many_threads_share_a_client(server: SumServer) -> None:
    """Each with its session; connections break meanwhile, and every step is applied once."""
    x = rows(12)

    def run(client: Client, _: int) -> None:
        with client.session("sum") as session:
            np.testing.assert_array_equal([session.step(row) for row in x], np.cumsum(x, 0))

    server.chunk_faults.extend(([None] * 7 + [Fault("after")] + [None] * 5 + [Fault("before")]) * 3)
    with Client(server.target) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(run, [client] * 8, range(8)))
    assert len(server.applied) == 8 * 12
    assert set(server.applied.values()) == {1}


def test_step_many_takes_and_gives_blocking_sessions(server: SumServer) -> None:
    """Also in the error that holds what succeeded."""
    with Client(server.target) as client:
        sessions = [client.session("sum") for _ in range(5)]
        outputs = client.step_many({session: rows(1)[0] + n for n, session in enumerate(sessions)})
        assert list(outputs) == sessions
        np.testing.assert_array_equal(outputs[sessions[4]], rows(1)[0] + 4)
        assert server.messages == [5]
        del server.sessions[sessions[1].session_id]
        with pytest.raises(StepsFailed) as failed:
            client.step_many(dict.fromkeys(sessions, rows(1)))
        assert set(failed.value.outputs) == {*sessions} - {sessions[1]}
        assert isinstance(failed.value.errors[sessions[1]], SessionLost)


def test_step_many_takes_blocking_sessions_and_one_array(server: SumServer) -> None:
    """And gives one; the error has the sessions again."""
    x = np.arange(20, dtype=np.float32).reshape(5, 2, 2)
    with Client(server.target) as client:
        sessions = [client.session("sum") for _ in x]
        np.testing.assert_array_equal(client.step_many(sessions, x), np.cumsum(x, 1))
        np.testing.assert_array_equal(client.step_many(sessions, x[:, 0]), x.sum(1) + x[:, 0])
        assert server.blocks == [5, 5]
        del server.sessions[sessions[1].session_id]
        with pytest.raises(StepsFailed) as failed:
            client.step_many(sessions, x)
        assert list(failed.value.outputs) == [sessions[0], *sessions[2:]]
        assert list(failed.value.errors) == [sessions[1]]
        with pytest.raises(InvalidRequest, match="expected 5 rows"):
            client.step_many(sessions, x[:4])


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_step_is_in_doubt_until_settled(server: SumServer) -> None:
    """Ctrl-C while a step waits: it returns at once, and whether the step counted is found out later."""
    server.chunk_faults.append(Fault("held"))
    with Client(server.target) as client:
        session = client.session("sum")

        async def interrupt() -> None:
            await server.held.get()
            os.kill(os.getpid(), signal.SIGINT)

        async def release() -> None:
            server.released.set()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(shared().run, interrupt())
            with pytest.raises(KeyboardInterrupt):
                session.step(rows(1), timeout_s=10)
        assert session.in_doubt
        shared().run(release())
        np.testing.assert_array_equal(session.settle(), rows(1))
        assert (session.in_doubt, session.position) == (False, 1)


def test_closing_ends_what_other_threads_wait_for(server: SumServer) -> None:
    """Nobody is left waiting; afterwards everything is refused, and closing again does nothing."""
    server.chunk_faults.append(Fault("held"))
    client = Client(server.target)
    session = client.session("sum")
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(session.step, rows(1))
        shared().run(server.held.get())
        client.close()
        with pytest.raises(ConnectionLost, match="closed"):
            step.result(10)
    client.close()
    with pytest.raises(InvalidRequest, match="closed"):
        client.models()


def test_a_forgotten_client_closes_its_connection(server: SumServer) -> None:
    """Without a close, as soon as neither it nor a session of its is left."""
    session: Session | None = Client(server.target).session("sum")
    assert session is not None
    gc.collect()
    session.step(rows(1))
    session = None
    gc.collect()
    assert shared().run(server.ended.get()) is None


PROGRAM = """
import sys
from conveyor import Client
client = Client(sys.argv[1])
session = client.session("sum")
print(session.step([1.0, 2.0]))
{end}
"""


ENDS = [
    "",
    "sys.exit(0)",
    "import threading; threading.Thread(target=session.close).start()",
    "import threading; threading.Thread(target=lambda: [client.models() for _ in iter(int, 1)], daemon=True).start()",
]


@pytest.mark.parametrize("end", ENDS, ids=["falls off", "exits", "leaves a thread", "leaves a daemon at work"])
def test_a_program_that_forgets_to_close_ends_quietly(server: SumServer, end: str) -> None:
    """At the interpreter's exit nothing hangs and nothing is printed."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end), server.target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[1. 2.]\n", "")


GONE = """
import sys, threading
from conveyor import Client, ConnectionLost
client = Client(sys.argv[1], reconnect_timeout_s={patience_s})
session = client.session("sum")
print(session.step([1.0, 2.0]), flush=True)
sys.stdin.readline()
{end}
"""

IDLE = """
try:
    client.models()
except ConnectionLost:
    pass
"""

WAITING = """
threading.Thread(target=session.step, args=[[1.0, 2.0]], daemon=True).start()
while not session.in_doubt:
    pass
"""


@pytest.mark.parametrize(("patience_s", "end"), [(0, IDLE), (30, WAITING)], ids=["idle", "waiting"])
def test_a_program_whose_server_is_gone_ends_quietly(server: SumServer, patience_s: int, end: str) -> None:
    """Also without a close, asyncio has nothing to complain of."""
    with subprocess.Popen(
        [sys.executable, "-c", GONE.format(patience_s=patience_s, end=end), server.target],
        cwd=ROOT,
        # Of the end of a connection gRPC itself sometimes writes a line.
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "[1. 2.]\n"
        shared().run(server.stop())
        printed, told = program.communicate("\n", timeout=30)
        assert (printed, program.returncode) == ("", 0)
        # One line that the server is gone, or none where that is no sooner told than the call has failed.
        assert re.fullmatch(rf"({server.target} is not in service, .*\n)?" if patience_s else "", told), told


def _use(client: Client, results: multiprocessing.SimpleQueue[str]) -> None:
    try:
        client.models()
    except InvalidRequest as error:
        results.put(str(error))
    client.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_client_made_before_a_fork_says_so(server: SumServer) -> None:
    """In the child it would wait for a thread that is not there."""
    with Client(server.target) as client:
        client.models()
        context = multiprocessing.get_context("fork")
        results: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
        child = context.Process(target=_use, args=(client, results))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert "before a fork" in results.get()
        assert client.models()
