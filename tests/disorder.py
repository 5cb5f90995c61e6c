"""A device that does what it is asked for later, and in any order that its streams and their events leave open.

Its memory is this machine's own, so that the numbers are real. What is asked of a stream waits in a queue. Whoever
waits for a mark has the device do things until that is reached: at each turn chance picks a stream whose next thing can
be done. Two things that no event orders are so done in either order, and where that matters numbers come out wrong.
Runs wait in a queue too, as they do on CUDA; each is done with what the graph was tied to when it was asked for.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from service.engines.resident_engine import _started
from service.engines.resident_graph import ResidentGraph
from service.states.device import Buffer, Device, HostDevice, HostStream, Stream

Array = NDArray[Any]
_PATIENCE_S = 30.0


class Point:
    """A moment in a queue; see ``Mark``.

    Attributes:
        reached: whether it has been.
    """

    def __init__(self, device: Disorder) -> None:
        self.reached = False
        self._device = device

    @property
    def done(self) -> bool:
        """Whether it has been reached. The device may go on before it is asked."""
        self._device.go_on()
        return self.reached

    def wait(self) -> None:
        """Have the device go on until it is reached."""
        self._device.work(lambda: self.reached)


class Queue:
    """A stream; see ``Stream``.

    Attributes:
        address: None.
        done: how many things of each kind have been done.
        may: how many things it may do beside marks until the test lets it do more; None for any.
    """

    def __init__(self, device: Disorder) -> None:
        self.address: int | None = None
        self.done: Counter[str] = Counter()
        self.may: int | None = None
        self._device = device
        self._asked: deque[tuple[str, Callable[[], object], Point | None]] = deque()

    def ask(self, kind: str, work: Callable[[], object], after: Point | None = None) -> None:
        """Queue something, which is not done before a point of another queue is reached."""
        with self._device.turn:
            self._asked.append((kind, work, after))
            self._device.turn.notify_all()
        self._device.go_on()

    @property
    def waiting(self) -> int:
        """How many things are still to be done."""
        return len(self._asked)

    @property
    def ready(self) -> bool:
        """Whether its next thing can be done."""
        if not self._asked:
            return False
        kind, _, after = self._asked[0]
        return (after is None or after.reached) and (self.may != 0 or kind in ("mark", "follow"))

    def step(self) -> None:
        """Do its next thing."""
        kind, work, _ = self._asked.popleft()
        if self.may is not None and kind not in ("mark", "follow"):
            self.may -= 1
        work()
        self.done[kind] += 1

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy what the array holds by then."""
        self.ask("upload", lambda: _AT_ONCE.upload(array, buffer))

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy what the buffer holds by then."""
        self.ask("download", lambda: _AT_ONCE.download(buffer, array))

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy what the buffer holds by then."""
        self.ask("copy", lambda: _AT_ONCE.copy(source, target))

    def follow(self, other: Stream) -> None:
        """Do nothing more before this moment of the other."""
        assert isinstance(other, Queue)
        self.ask("follow", lambda: None, other.mark())

    def mark(self) -> Point:
        """Mark this moment."""
        point = Point(self._device)
        self.ask("mark", lambda: setattr(point, "reached", True))
        return point


class Disorder(HostDevice):
    """The device.

    Attributes:
        turn: held by whoever has it do something.

        queues: its streams.

    Args:
        seed: of the order in which things are done.
        lazy: whether it does nothing before somebody waits.
    """

    def __init__(self, seed: int = 0, lazy: bool = False) -> None:
        super().__init__()
        self.turn = threading.Condition(threading.RLock())
        self._chance = random.Random(seed)
        self._lazy = lazy
        self._memory: list[object] = []
        self.queues = [Queue(self) for _ in range(3)]
        self.ahead, self.runs, self.behind = self.queues

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """Take memory, which is kept: what comes too late should give wrong numbers, and do no more."""
        buffer = super().empty(shape, dtype)
        self._memory.append(buffer.memory)
        return buffer

    @property
    def idle(self) -> bool:
        """Whether all has been done that it was asked for."""
        with self.turn:
            return not any(queue.waiting for queue in self.queues)

    def let(self, queue: Stream, may: int | None) -> None:
        """Let a queue do so many more things, or any number."""
        assert isinstance(queue, Queue)
        with self.turn:
            queue.may = may
            self.turn.notify_all()

    def go_on(self) -> None:
        """Do a few things, or none."""
        with self.turn:
            for _ in range(0 if self._lazy else self._chance.choice((0, 0, 1, 3))):
                self._step()

    def work(self, over: Callable[[], bool]) -> None:
        """Do things until that is so, or the test lets it."""
        with self.turn:
            while not over():
                if not self._step():
                    assert self.turn.wait(_PATIENCE_S), "nothing can be done any more"

    def _step(self) -> bool:
        """Do one thing, of those that can be done; say whether there was one."""
        if ready := [queue for queue in self.queues if queue.ready]:
            self._chance.choice(ready).step()
        return bool(ready)


class _Ties:
    """What a run is tied to, as it is said; onnxruntime is told when the run is done."""

    def __init__(self, said: dict[str, tuple[Any, ...]] | None = None) -> None:
        self.said = said or {}

    def bind_cpu_input(self, name: str, value: Array) -> None:
        self.said[name] = ("bind_cpu_input", name, value)

    def bind_input(self, name: str, *where: Any) -> None:
        self.said[name] = ("bind_input", name, *where)

    def bind_output(self, name: str, *where: Any) -> None:
        self.said[f"out {name}"] = ("bind_output", name, *where)


class _Session:
    """An onnxruntime session whose runs are asked of a queue."""

    def __init__(self, session: Any, runs: Queue) -> None:
        self._session = session
        self._runs = runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> _Ties:
        return _Ties()

    def run_with_iobinding(self, ties: _Ties, options: Any) -> None:
        said = list(ties.said.values())

        def run() -> None:
            binding = self._session.io_binding()
            for method, *given in said:
                getattr(binding, method)(*given)
            self._session.run_with_iobinding(binding, options)

        self._runs.ask("run", run)


def runs_wait_in_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of every graph that is loaded on such a device from here on be asked of its queue."""
    monkeypatch.setattr("service.engines.resident_engine._started", _started_late)


def _started_late(folder: Path, device: Device, *more: Any) -> ResidentGraph:
    graph = _started(folder, device, *more)
    if not isinstance(device, Disorder):
        return graph
    return replace(graph, session=_Session(graph.session, device.queues[1]))


_AT_ONCE = HostStream()
