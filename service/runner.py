"""One model version at work: its queue, its state slots, its engine, and the thread in which ticks run.

Owns the two hand-overs of each tick: rows go from the event loop to the engine's thread, and come back together when
their tick has ended. Must not know grpc, or what a session is.

Between the hand-overs a tick is: cut the queue, gather the states, run the graph, seal the rows, scatter the states of
those that were applied. Whatever fails before the seal leaves every state as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import structlog
from numpy.typing import NDArray

from service.errors import ConveyorError, Draining, EngineFailed
from service.graph import Graph
from service.metrics import Metrics
from service.pace import Pace
from service.packing import pack, unpack
from service.pool import Pool
from service.row import Phase, Row, Track
from service.scheduler import Limits, Scheduler, Tick
from service.statistics import Statistics

Array = NDArray[np.generic]
log = structlog.get_logger()


class Runner:
    """One model version at work.

    Attributes:
        name: of the model.
        version: of it.
        manifest: what the model says of itself.
        digest: tells the model's file from any other.
        pool: the state slots.
        engine: the loaded graph; only this runner's thread runs it.
        statistics: what it has done.

    Args:
        engine: the loaded graph.
        limits: what bounds the queue and a tick.
        slots: most state slots.
        clock: tells the time, in seconds.
        loop: the event loop on which rows end.
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
        self.pool = Pool(self.manifest.states, slots)
        self.engine = engine
        self.statistics = Statistics()
        self._scheduler = Scheduler(limits, pace)
        self._clock = clock
        self._calendar = calendar
        self._metrics = metrics
        # Kept, because the metrics know by it whose queue they show. A circle through this runner would hold the memory
        # of one that has been stopped until the collector comes by.
        scheduler = self._scheduler
        self._queue_length = lambda: scheduler.queued
        self._loop = loop
        # Guards the scheduler, and with it the phase of every row and the position of every track.
        self._wake = threading.Condition()
        self._stopping = False
        self._notifying = False
        self._ended = asyncio.Event()
        self._thread: threading.Thread | None = None
        labels = (name, str(version))
        self._steps = metrics.steps.labels(*labels)
        self._padding = metrics.padding.labels(*labels)
        self._tick_rows = metrics.tick_rows.labels(*labels)
        self._tick_seconds = metrics.tick_seconds.labels(*labels)
        self._applied = metrics.rows.labels(*labels, "applied")
        self._refused = metrics.rows.labels(*labels, "refused")

    @property
    def queued(self) -> int:
        """How many rows wait."""
        return self._scheduler.queued

    def warm_up(self) -> None:
        """Run the graph at a few sizes, on states that nobody uses, before the thread starts.

        Raises:
            Exception: whatever the engine raises.
        """
        for rows, steps in ((1, 1), (2, 1), (16, 1), (2, 3)):
            inputs = [
                np.zeros((steps, *(size or 1 for size in spec.tail)), spec.dtype) for spec in self.manifest.inputs
            ]
            began = self._clock()
            made = [Row(Track(self.pool.allocate()), 0, steps, inputs, _ignore) for _ in range(rows)]
            tick = Tick(made, [steps] * rows)
            outputs, states = self.engine.run(self._feeds(tick))
            for spec, output in zip(self.manifest.outputs, outputs, strict=True):
                unpack(output, spec, tick.lengths)
            slots = np.array([row.track.slot for row in made], np.intp)
            self.pool.scatter(slots, np.arange(rows), states)
            for row in made:
                self.pool.free(row.track.slot)
            self._scheduler.pace.learn(rows, steps, self._clock() - began)

    def start(self) -> None:
        """Begin to take rows."""
        self.show()
        # Not made before: a thread that has not started holds this runner, and in a circle.
        name = f"engine-{self.name}-{self.version}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Be the one of its name and version that metrics show."""
        labels = (self.name, str(self.version))
        self._metrics.row_by_row.labels(*labels).set(self.manifest.rows_per_run == 1)
        self._metrics.show(*labels, self._queue_length)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows, all or none. Each one's ``on_end`` is called once, later, on the event loop.

        Raises:
            Full: if they would pass the limit.
        """
        with self._wake:
            if self._stopping:
                raise Draining("the model is being stopped")
            self._scheduler.submit(rows, self._clock())
        # Not at once: the chunks of one message come one by one, and should run in one tick.
        if not self._notifying:
            self._notifying = True
            self._loop.call_soon(self._notify)

    def _notify(self) -> None:
        self._notifying = False
        with self._wake:
            self._wake.notify()

    def cancel(self, row: Row) -> bool:
        """Give a row up.

        Returns:
            True if it has ended by this, and ``on_end`` will not be called; False if it will be, or was.
        """
        with self._wake:
            ended = self._scheduler.cancel(row)
        if ended:
            self._release(row)
        return ended

    async def stop(self, timeout_s: float) -> bool:
        """Refuse what waits, finish the tick that runs, and end the thread.

        Returns:
            False if the run did not end in time: it cannot be stopped from outside, and goes on.
        """
        with self._wake:
            self._stopping = True
            refused = self._scheduler.clear(Draining("the server is stopping"))
            self._wake.notify()
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
        self._run_ticks()
        # A run that outlasted the wait in stop may outlast the loop too.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set)

    def _run_ticks(self) -> None:
        while True:
            with self._wake:
                tick, refused = self._scheduler.cut(self._clock())
                while not tick and not refused:
                    if self._stopping:
                        return
                    self._wake.wait()
                    tick, refused = self._scheduler.cut(self._clock())
            ended = refused
            if tick is not None:
                began = self._clock()
                going_on: list[Row] = []
                try:
                    self._run(tick, began, going_on)
                except Exception:
                    # Nothing in _run is expected to raise; were this thread to die of it, every later row would wait
                    # for ever.
                    log.exception("tick failed", model=self.name, version=self.version)
                    self._refuse(
                        [row for row in tick.rows if row.phase is Phase.RUNNING], EngineFailed("the tick failed")
                    )
                seconds, useful = self._clock() - began, sum(tick.lengths)
                self._scheduler.pace.learn(len(tick.rows), tick.steps, seconds)
                self._tick_seconds.observe(seconds)
                self._tick_rows.observe(len(tick.rows))
                self._padding.inc(len(tick.rows) * tick.steps - useful)
                # Not by their phase: one that waits again may have been taken out since, by somebody who was told so.
                waiting = set(map(id, going_on))
                ended = refused + [row for row in tick.rows if id(row) not in waiting]
            for row in ended:
                self._release(row)
            if ended:
                self._loop.call_soon_threadsafe(self._deliver, ended)

    def _release(self, row: Row) -> None:
        """Give back the slot in which a row that has ended kept its states between its slices."""
        if row.scratch is not None and row.scratch != row.track.slot:
            self.pool.free(row.scratch)
        row.scratch = None

    def _run(self, tick: Tick, cut_at: float, going_on: list[Row]) -> None:
        """Run a tick, and add those of its rows that have steps left to ``going_on``."""
        try:
            began = self._clock()
            feeds = self._feeds(tick)
            packed = self._clock()
            outputs, states = self.engine.run(feeds)
            ran = self._clock()
            unpacked = [
                unpack(output, spec, tick.lengths) for output, spec in zip(outputs, self.manifest.outputs, strict=True)
            ]
            # Before anything moves: nothing may fail after that.
            spare = self._spare_slots(tick)
        except Exception as error:
            if len(tick.rows) > 1:
                # One row may be to blame. Nothing has moved, so each half can run again without the other.
                for half in tick.halves():
                    self._run(half, cut_at, going_on)
                return
            log.error("run failed", model=self.name, version=self.version, error=repr(error))
            self._refuse(tick.rows, EngineFailed("the model failed on this input; the state has not moved"))
            return
        with self._wake:
            sealed = self._scheduler.seal(tick, self._clock())
        for index in sealed.applied:
            row = tick.rows[index]
            last = [rows_of_output[index] for rows_of_output in unpacked]
            row.outputs = self._join([*row.parts, last]) if row.parts else last
            if row.scratch is not None:
                # What its track had is given back when the row is released.
                row.track.slot, row.scratch = row.scratch, row.track.slot
        for index in sealed.advanced:
            row = tick.rows[index]
            row.parts.append([rows_of_output[index] for rows_of_output in unpacked])
            if row.scratch is None:
                row.scratch = spare.pop()
        for slot in spare:
            self.pool.free(slot)
        kept = sorted(sealed.applied + sealed.advanced)
        if kept:
            slots = [
                row.track.slot if row.phase is Phase.APPLIED else row.scratch
                for row in (tick.rows[index] for index in kept)
            ]
            self.pool.scatter(np.array(slots, np.intp), np.array(kept, np.intp), states)
        if sealed.advanced:
            with self._wake:
                going_on += self._scheduler.resume(tick, sealed)
        self.statistics.run(
            rows=len(tick.rows),
            applied=len(sealed.applied),
            waited_s=sum(cut_at - row.queued_at for row in tick.rows),
            input_s=packed - began,
            infer_s=ran - packed,
            output_s=self._clock() - ran,
            now_s=self._calendar(),
        )

    def _spare_slots(self, tick: Tick) -> list[int]:
        """Take a slot for each row that has steps left after a tick and nowhere to keep its states till then."""
        slots: list[int] = []
        try:
            for row, length in zip(tick.rows, tick.lengths, strict=True):
                if row.scratch is None and row.left > length:
                    slots.append(self.pool.allocate())
        except Exception:
            for slot in slots:
                self.pool.free(slot)
            raise
        return slots

    def _join(self, parts: Sequence[Sequence[Array]]) -> list[Array]:
        """The outputs of a row from those of its slices."""
        return [
            parts[-1][index] if spec.time_axis is None else np.concatenate([part[index] for part in parts])
            for index, spec in enumerate(self.manifest.outputs)
        ]

    def _refuse(self, rows: Sequence[Row], error: ConveyorError) -> None:
        with self._wake:
            self._scheduler.fail(rows, error)

    def _feeds(self, tick: Tick) -> dict[str, Array]:
        rows, lengths = tick.rows, tick.lengths
        feeds = {
            spec.name: pack(
                [row.inputs[index][row.done : row.done + length] for row, length in zip(rows, lengths, strict=True)],
                spec,
                tick.steps,
            )
            for index, spec in enumerate(self.manifest.inputs)
        }
        if self.manifest.lengths is not None:
            feeds[self.manifest.lengths] = np.array(lengths, self.manifest.lengths_dtype)
        slots = np.array([row.track.slot if row.scratch is None else row.scratch for row in rows], np.intp)
        for state, array in zip(self.manifest.states, self.pool.gather(slots), strict=True):
            feeds[state.input] = array
        return feeds

    def _deliver(self, rows: Sequence[Row]) -> None:
        steps = applied = 0
        for row in rows:
            if row.phase is Phase.APPLIED:
                steps += row.steps
                applied += 1
            try:
                row.tell()
            except Exception:
                # A caller that cannot take its result must not cost the others theirs.
                log.exception("a result was not taken", model=self.name, version=self.version)
        self._steps.inc(steps)
        self._applied.inc(applied)
        self._refused.inc(len(rows) - applied)


def _ignore(row: Row) -> None:
    pass
