"""One model version at work: its queue, the threads in which its ticks run, and how it begins and stops.

Owns the two hand-overs of each tick: blocks of rows go from the event loop to the engine's thread, and come back
together when their tick has ended. Between the two a tick is cut from the queue, started (``execution.py``) and ended
(``completion.py``). Must not know grpc, or what a session is; nor what a tick's arrays are, or what becomes of one that
fails.

Where runs go on by themselves, on a device, a second tick is cut and started while the first is under way, once as much
waits as runs; until then more may come, and a tick of more rows takes hardly longer. Ticks end in the order in which
they began.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import structlog

from service.errors import Draining, EngineFailed, Full
from service.graphs.graph import Graph
from service.graphs.placement import Choice
from service.metrics import Metrics
from service.ticks.admission import Limits
from service.ticks.cohort import Cohort
from service.ticks.completion import Completion
from service.ticks.execution import Execution
from service.ticks.flight import Flight
from service.ticks.pace import Pace
from service.ticks.row import USUAL, Block, Phase, Row
from service.ticks.scheduler import Scheduler, Tick

log = structlog.get_logger()

_TURNS = 8
"""Of the event loop, for which an idle engine lets chunks come together as long as each brings more."""
_QUIET_S = 60.0
"""How long is waited before it is said again that the model is over capacity."""


class Runner:
    """One model version at work.

    Attributes:
        name: of the model.
        version: of it.
        manifest: what the model says of itself.
        digest: tells the model's file from any other.
        pool: the state slots.
        execution: takes ticks through the loaded graph; in this runner's thread alone.
        statistics: what it has done.
        choice: the device that runs it, and why.
        tick_rows: most rows in one tick.
        users: how many are about to give it work that was accepted: it must not be stopped before.

    Args:
        engine: the loaded graph.
        limits: what bounds the queue and a tick.
        slots: most state slots.
        clock: tells the time, in seconds.
        loop: the event loop on which blocks end.
        calendar: tells the time, in seconds since 1970.
        pace: how long ticks take, as far as it is known.
    """

    def __init__(
        self,
        name: str,
        version: int,
        engine: Graph,
        limits: Limits,
        slots: int,
        metrics: Metrics,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        calendar: Callable[[], float] = time.time,
        pace: Pace | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.manifest = engine.manifest
        self.digest = engine.digest
        copies = {way: metrics.state_copies.labels(name, str(version), way) for way in ("up", "down")}
        self.pool = engine.pool(slots, limits.tick_rows, lambda way, size: copies[way].inc(size))
        self.execution = Execution(engine, self.pool, clock)
        self.choice = Choice("cpu", "")
        self.users = 0
        self._scheduler = Scheduler(limits, pace)
        self._clock = clock
        self._metrics = metrics
        # Kept, because the metrics know by it whose queue they show. A circle through this runner would hold the memory
        # of one that has been stopped until the collector comes by.
        scheduler = self._scheduler
        self._queue_length = lambda: scheduler.queued
        self._loop = loop
        # Guards the scheduler, and with it the phase of every block and the position of every track.
        self._wake = threading.Condition()
        self._completion = Completion(
            name, version, self._scheduler, self._wake, self.execution, metrics, clock, calendar
        )
        self.statistics = self._completion.statistics
        self._stopping = False
        self.tick_rows = limits.tick_rows
        self._flights: deque[Flight] = deque()
        # Where nothing goes on by itself, nobody waits for it.
        self._watched: SimpleQueue[Flight | None] = SimpleQueue()
        self._watcher: threading.Thread | None = None
        self._notifying = False
        self._came = False
        self._turns = 0
        self._settled = threading.Event()
        self._ended = asyncio.Event()
        self._thread: threading.Thread | None = None
        labels = (name, str(version))
        self._steps = metrics.steps.labels(*labels)
        self._applied = metrics.rows.labels(*labels, "applied")
        self._refused = metrics.rows.labels(*labels, "refused")
        self._turned_away = metrics.rows.labels(*labels, "turned_away")
        # Since that was last said.
        self._away = 0
        self._quiet_until = float("-inf")

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._scheduler.queued

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Be one of its users."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def warm_up(self) -> None:
        """Run the graph at a few sizes, on states that nobody uses, before the thread starts.

        Raises:
            Exception: whatever the engine raises.
        """
        for rows, steps in ((1, 1), (2, 1), (16, 1), (2, 3)):
            self._scheduler.pace.learn(rows, steps, self.execution.warm_up(rows, steps))

    def settle_in(self) -> None:
        """Start the thread, and wait until it has done what there is to do there once, before it has ticks to run.

        Whoever does not ``start`` the runner after this lets it go.
        """
        self._start_thread()
        self._settled.wait()

    def start(self) -> None:
        """Begin to take rows."""
        self.show()
        self._start_thread()

    def let_go(self) -> None:
        """End the thread of a runner that nobody has given work."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        # Not made before: a thread that has not started holds this runner, and in a circle.
        name = f"engine-{self.name}-{self.version}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Be the one of its name and version that metrics show."""
        labels = (self.name, str(self.version))
        self._metrics.row_by_row.labels(*labels).set(self.manifest.rows_per_run == 1)
        self._metrics.tell_device(*labels, self.choice.device, self.manifest.precision, self.choice.fallback)
        self._metrics.show(*labels, self._queue_length)

    def submit(self, blocks: Sequence[Block]) -> None:
        """Queue blocks, all or none. Each one's ``on_end`` is called once, later, on the event loop.

        Raises:
            InvalidRequest: if they would not fit into an empty queue.
            Full: if they do not fit now, or would not be done in time.
            Draining: if the model is being stopped.
        """
        with self._wake:
            if self._stopping:
                raise Draining("the model is being stopped")
            try:
                self._scheduler.submit(blocks, self._clock())
            except Full:
                self.turn_away(sum(len(block.rows) for block in blocks))
                raise
        # Not at once: what has come already, in the same message or another, should run in the same tick.
        self._came = True
        if not self._notifying:
            self._notifying = True
            self._turns = 0
            self._loop.call_soon(self._notify)

    def refuses(self, steps: int, deadline: float) -> Full | None:
        """Say why a chunk would be refused, if that can be told without looking at it; see ``Admission.refuses``."""
        with self._wake:
            if self._stopping:
                return None
            full = self._scheduler.refuses((False, USUAL), steps, deadline, self._clock())
        if full is not None:
            self.turn_away(1)
        return full

    def turn_away(self, rows: int) -> None:
        """Count rows that were refused for want of room or time before they were queued, and say so now and then."""
        self._turned_away.inc(rows)
        self._away += rows
        now = self._clock()
        if now >= self._quiet_until:
            log.warning("over capacity", model=self.name, version=self.version, turned_away=self._away)
            self._away, self._quiet_until = 0, now + _QUIET_S

    def _notify(self) -> None:
        """Wake the engine once the event loop brings no more, or has had some turns."""
        if self._came and self._turns < _TURNS:
            self._came = False
            self._turns += 1
            self._loop.call_soon(self._notify)
            return
        self._notifying = False
        with self._wake:
            self._wake.notify()

    def cancel(self, rows: Sequence[Row]) -> list[Block]:
        """Give rows up.

        Returns:
            The blocks of those that have ended by this, whose ``on_end`` is not called; for others it will be, or was.
        """
        with self._wake:
            ended = self._scheduler.cancel(rows)
        for block in ended:
            self.execution.release(block)
        return ended

    def spell_out(self, cohort: Cohort) -> None:
        """Have a cohort's rows and tracks stand by themselves, also in the middle of a tick."""
        with self._wake:
            cohort.spell_out()

    async def stop(self, timeout_s: float) -> bool:
        """Refuse what waits, finish the tick that runs, and end the thread. What has steps left then is refused too.

        Returns:
            False if the run did not end in time: it cannot be stopped from outside, and goes on.
        """
        with self._wake:
            self._stopping = True
            refused = self._scheduler.clear(_draining())
            self._wake.notify()
        for block in refused:
            self.execution.release(block)
        self._deliver(refused)
        # From here on nothing but whoever asks holds this runner.
        self._metrics.hide(self.name, str(self.version), self._queue_length)
        if self._thread is None or not self._thread.is_alive():
            return True
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _work(self) -> None:
        try:
            if found := self.pool.settle_in():
                log.info("model settled in", model=self.name, version=self.version, found=found)
        finally:
            self._settled.set()
        self._run_ticks()
        self._watched.put(None)
        # A run that outlasted the wait in stop may outlast the loop too.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set)

    def _run_ticks(self) -> None:
        while (cut := self._next_tick()) is not None:
            self._go_on(*cut)
            # Nothing of it is held while this waits for the next one.
            del cut

    def _go_on(self, tick: Tick | None, ended: list[Block], began: float) -> None:
        """Start what was cut, or end the tick that was started first, and hand over what has ended."""
        if tick is not None:
            self._flights.append(self.execution.start(tick, began))
        if self._flights and (self.pool.in_flight == 1 or not (tick or ended)):
            ended = ended + self._completion.complete(self._flights.popleft())
        for block in ended:
            self.execution.release(block)
        if ended:
            self._loop.call_soon_threadsafe(self._deliver, ended)

    def _next_tick(self) -> tuple[Tick | None, list[Block], float] | None:
        """Wait for a tick, for blocks that are refused, or for the end of a run.

        Returns:
            The tick to be started; none where the one that was started first is to be ended. The blocks. Since when
            there was something to do. None once stopped.
        """
        began = self._clock()
        with self._wake:
            while True:
                if self._stopping:
                    # What the last tick left over.
                    refused = self._scheduler.clear(_draining())
                    return (None, refused, began) if refused or self._flights else None
                delay_s = 0.0
                if self._room():
                    delay_s = self._scheduler.delay_s(self._clock())
                    if not delay_s:
                        tick, refused = self._cut()
                        if tick or refused:
                            return tick, refused, began
                if self._flights and self._over(self._flights[0]):
                    return None, [], began
                self._wake.wait(delay_s or None)
                began = self._clock()

    def _room(self) -> bool:
        """Whether a tick may be started now."""
        if not self._flights:
            return True
        if len(self._flights) == self.pool.in_flight:
            return False
        queued = self._scheduler.queued
        return self._flights[0].done or queued >= min(self._flights[-1].tick.rows, self.tick_rows)

    def _over(self, flight: Flight) -> bool:
        """Whether a tick is to be ended now: nothing can be started meanwhile, or there is nothing to wait for."""
        if flight.done or len(self._flights) == self.pool.in_flight:
            return True
        if flight.watched:
            return False
        flight.watched = True
        if self._watcher is None:
            name = f"device-{self.name}-{self.version}"
            self._watcher = threading.Thread(target=self._watch, name=name, daemon=True)
            self._watcher.start()
        self._watched.put(flight)
        return False

    def _watch(self) -> None:
        """Wait for runs, and wake the engine's thread at the end of each, so that it need not wait for one alone."""
        while (flight := self._watched.get()) is not None:
            assert flight.mark is not None
            with contextlib.suppress(Exception):
                flight.mark.wait()
            # Also where the device has failed, and its mark is never reached: whoever ends the tick is told why.
            flight.over = True
            # Nothing of it is held while this waits for the next one.
            del flight
            with self._wake:
                self._wake.notify()

    def _cut(self) -> tuple[Tick | None, list[Block]]:
        """Cut a tick, and refuse everything that waits if that fails: were the thread to die of it, nobody was told."""
        try:
            return self._scheduler.cut(self._clock())
        except Exception:
            log.exception("no tick could be cut", model=self.name, version=self.version)
            return None, self._scheduler.clear(EngineFailed("the tick failed"))

    def _deliver(self, blocks: Sequence[Block]) -> None:
        steps = applied = refused = 0
        for block in blocks:
            rows = len(block.rows)
            if block.phase is Phase.APPLIED:
                steps += block.steps * rows
                applied += rows
            else:
                refused += rows
            try:
                block.tell()
            except Exception:
                # A caller that cannot take its result must not cost the others theirs.
                log.exception("a result was not taken", model=self.name, version=self.version)
        self._steps.inc(steps)
        self._applied.inc(applied)
        self._refused.inc(refused)


def _draining() -> Draining:
    return Draining("the server is stopping")
