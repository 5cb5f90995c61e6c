"""One model version at work: its queue, its state slots, its engine, and the thread in which ticks run.

Owns the two hand-overs of each tick: blocks of rows go from the event loop to the engine's thread, and come back
together when their tick has ended. Must not know grpc, or what a session is.

Between the hand-overs a tick is: cut the queue, gather the states, run the graph, seal the blocks, scatter the states
of those that were applied. Whatever fails before the seal leaves every state as it was.

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
from itertools import accumulate
from queue import SimpleQueue
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from service.errors import ConveyorError, Draining, EngineFailed, Full
from service.graphs.graph import Graph, StatePool
from service.graphs.placement import Choice
from service.graphs.workspace import Results
from service.metrics import Metrics
from service.states.device import out_of_memory
from service.ticks.admission import Limits
from service.ticks.flight import Flight
from service.ticks.pace import Pace
from service.ticks.packing import pack, unpack
from service.ticks.row import Block, Phase, Row, Track
from service.ticks.scheduler import Scheduler, Sealed, Tick
from service.ticks.statistics import Statistics

Array = NDArray[np.generic]
log = structlog.get_logger()

_TURNS = 8
"""Of the event loop, for which an idle engine lets chunks come together as long as each brings more."""


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
        choice: the device that runs it, and why.
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
        self.pool: StatePool = engine.pool(slots, limits.tick_rows, lambda way, size: copies[way].inc(size))
        self.engine = engine
        self.statistics = Statistics()
        self.choice = Choice("cpu", "")
        self.users = 0
        self._scheduler = Scheduler(limits, pace)
        self._clock = clock
        self._calendar = calendar
        self._metrics = metrics
        # Kept, because the metrics know by it whose queue they show. A circle through this runner would hold the memory
        # of one that has been stopped until the collector comes by.
        scheduler = self._scheduler
        self._queue_length = lambda: scheduler.queued
        self._loop = loop
        # Guards the scheduler, and with it the phase of every block and the position of every track.
        self._wake = threading.Condition()
        self._stopping = False
        self._tick_rows_limit = limits.tick_rows
        self._flights: deque[Flight] = deque()
        self._ended_at = float("-inf")
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
        self._padding = metrics.padding.labels(*labels)
        self._tick_rows = metrics.tick_rows.labels(*labels)
        self._tick_seconds = metrics.tick_seconds.labels(*labels)
        self._applied = metrics.rows.labels(*labels, "applied")
        self._refused = metrics.rows.labels(*labels, "refused")

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
            inputs = [
                np.zeros((rows, steps, *(size or 1 for size in spec.tail)), spec.dtype) for spec in self.manifest.inputs
            ]
            began = self._clock()
            slots = [self.pool.allocate() for _ in range(rows)]
            made = [Row(Track(slot), 0) for slot in slots]
            flight = self._start(Tick([Block(made, steps, inputs, _ignore)], [steps]), began)
            try:
                _, states = self._wait(flight)
            except Exception:
                self._give_up(flight)
                raise
            self.pool.scatter(np.array(slots, np.intp), np.arange(rows), states)
            self._release_arrays(flight)
            for slot in slots:
                self.pool.free(slot)
            self._scheduler.pace.learn(rows, steps, self._clock() - began)

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
            Full: if they would pass the limit.
        """
        with self._wake:
            if self._stopping:
                raise Draining("the model is being stopped")
            self._scheduler.submit(blocks, self._clock())
        # Not at once: what has come already, in the same message or another, should run in the same tick.
        self._came = True
        if not self._notifying:
            self._notifying = True
            self._turns = 0
            self._loop.call_soon(self._notify)

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
            self._release(block)
        return ended

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
            self._release(block)
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
            self._flights.append(self._start(tick, began))
        if self._flights and (self.pool.in_flight == 1 or not (tick or ended)):
            ended = ended + self._end_tick(self._flights.popleft())
        self._read_states([block for block in ended if block.with_states and block.phase is Phase.APPLIED])
        for block in ended:
            self._release(block)
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
        return self._flights[0].done or queued >= min(self._flights[-1].tick.rows, self._tick_rows_limit)

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

    def _end_tick(self, flight: Flight) -> list[Block]:
        """Wait for a tick, and make everything follow from it; the blocks that have ended by it."""
        tick = flight.tick
        # With those that are split off meanwhile.
        blocks = list(tick.blocks)
        rows, cells = tick.rows, tick.cells
        computed = rows if flight.workspace is None else flight.workspace.rows
        going_on: list[Block] = []
        whole = False
        try:
            whole = self._end(flight, blocks, going_on)
        except Exception:
            # Nothing in _end is expected to raise; were this thread to die of it, every later row would wait for ever.
            log.exception("tick failed", model=self.name, version=self.version)
            self._refuse([block for block in blocks if block.phase is Phase.RUNNING], EngineFailed("the tick failed"))
        # What the tick before it took is not counted twice.
        ended_at = self._clock()
        seconds = ended_at - max(flight.began, self._ended_at)
        self._ended_at = ended_at
        if whole:
            # What failed, or ran in parts, says nothing of what others like it will take.
            with self._wake:
                self._scheduler.pace.learn(rows, tick.steps, seconds)
        self._tick_seconds.observe(seconds)
        self._tick_rows.observe(rows)
        self._padding.inc(computed * tick.steps - cells)
        # Not by their phase: one that waits again may have been taken out since, by somebody who was told so.
        waiting = set(map(id, going_on))
        return [block for block in blocks if id(block) not in waiting]

    def _read_states(self, blocks: Sequence[Block]) -> None:
        """Copy out the states that sequences of a batch have ended in, while nobody but this thread waits for them."""
        slots = [row.track.slot for block in blocks for row in block.rows]
        if not slots:
            return
        try:
            states = iter(self.pool.read_many(slots))
        except Exception as error:
            log.error("states not read", model=self.name, version=self.version, error=repr(error))
            for block in blocks:
                block.error = EngineFailed("the states of the sequence could not be read")
            return
        for block in blocks:
            block.states = [next(states) for _ in block.rows]

    def _release(self, block: Block) -> None:
        """Give back the slots in which a block that has ended kept its states between its slices."""
        if block.scratch is not None:
            for row, slot in zip(block.rows, block.scratch, strict=True):
                if slot != row.track.slot:
                    self.pool.free(slot)
            block.scratch = None

    def _end(self, flight: Flight, blocks: list[Block], going_on: list[Block]) -> bool:
        """End a tick.

        Args:
            flight: it, or a part of it.
            blocks: blocks that are split off are added to them.
            going_on: blocks that have steps left are added to them.

        Returns:
            Whether it ran as a whole.
        """
        tick = flight.tick
        try:
            outputs, states = self._wait(flight)
            ran = self._clock()
            widths = [len(block.rows) for block in tick.blocks]
            unpacked = [
                list(unpack(output, spec, widths, tick.lengths))
                for output, spec in zip(outputs, self.manifest.outputs, strict=True)
            ]
            # Before anything moves: nothing may fail after that.
            self._join(tick, unpacked)
        except Exception as error:
            self._give_up(flight)
            for part in self._parts(tick, error, blocks):
                self._end(self._start(part, flight.began, flight.cut_at), blocks, going_on)
            return False
        try:
            applied = self._keep(tick, widths, unpacked, states, flight.spare, blocks, going_on)
        finally:
            self._release_arrays(flight)
        self.statistics.run(
            rows=sum(widths),
            applied=applied,
            waited_s=sum(
                (flight.cut_at - block.queued_at) * width for block, width in zip(tick.blocks, widths, strict=True)
            ),
            input_s=flight.packed - flight.packing,
            infer_s=ran - flight.packed,
            output_s=self._clock() - ran,
            now_s=self._calendar(),
        )
        return True

    def _parts(self, tick: Tick, error: Exception, blocks: list[Block]) -> list[Tick]:
        """Say what is to be run again of a tick that failed, and refuse the rest.

        Args:
            tick: of which nothing has moved.
            error: why it failed.
            blocks: blocks that are split off are added to them.
        """
        if out_of_memory(error):
            log.error("no memory for a tick", model=self.name, version=self.version, rows=tick.rows, error=repr(error))
            return self._without_newest(tick, blocks)
        if tick.rows > 1:
            # One row may be to blame: each half can run again without the other.
            with self._wake:
                halves = self._scheduler.halve(tick)
            if len(tick.blocks) == 1:
                blocks += halves[1].blocks
            return list(halves)
        if not isinstance(error, ConveyorError):
            log.error("run failed", model=self.name, version=self.version, error=repr(error))
            error = EngineFailed("the model failed on this input; the state has not moved")
        self._refuse(tick.blocks, error)
        return []

    def _without_newest(self, tick: Tick, blocks: list[Block]) -> list[Tick]:
        """Refuse the newer half of a tick's rows, and return the older one."""
        full = Full("the device has no memory for so many rows at once; the state has not moved, try again later")
        rows = [row for block in tick.blocks for row in block.rows]
        order = self.pool.by_age([row.track.slot for row in rows])
        newest = {rows[index] for index in order[len(rows) // 2 :]}
        kept: list[Block] = []
        lengths: list[int] = []
        with self._wake:
            for block, length in zip(tick.blocks, tick.lengths, strict=True):
                places = [n for n, row in enumerate(block.rows) if row in newest]
                refused = block
                if len(places) < len(block.rows):
                    kept.append(block)
                    lengths.append(length)
                    if not places:
                        continue
                    refused = block.split(places)
                    blocks.append(refused)
                self._scheduler.fail([refused], full)
        return [Tick(kept, lengths)] if kept else []

    def _give_up(self, flight: Flight) -> None:
        """Give back what a tick had taken that came to nothing."""
        self.pool.free_many(np.array(flight.spare, np.intp))
        if flight.workspace is not None and flight.gathered:
            self.pool.abandon(flight.workspace.states)
        self._release_arrays(flight)

    @staticmethod
    def _release_arrays(flight: Flight) -> None:
        workspace, flight.workspace = flight.workspace, None
        if workspace is not None:
            workspace.release()

    def _keep(
        self,
        tick: Tick,
        widths: Sequence[int],
        outputs: Sequence[Sequence[Array]],
        states: Any,
        spare: list[int],
        blocks: list[Block],
        going_on: list[Block],
    ) -> int:
        """Make everything follow a run that succeeded.

        Args:
            tick: that ran.
            widths: how many rows each of its blocks had.
            outputs: for each output of the model, those of each block.
            states: after the run.
            spare: slots for the rows that need one.
            blocks: as for ``_end``.
            going_on: as for ``_end``.

        Returns:
            How many rows were applied.
        """
        with self._wake:
            sealed = self._scheduler.seal(tick, self._clock())
        blocks += sealed.gone
        applied = 0
        for index in sealed.applied:
            block = tick.blocks[index]
            applied += len(block.rows)
            block.outputs = _of_block(outputs, index, sealed.kept.get(index))
            block.inputs = block.parts = []
            if block.scratch is not None:
                # What the tracks had is given back when the block is released.
                for n, row in enumerate(block.rows):
                    row.track.slot, block.scratch[n] = block.scratch[n], row.track.slot
        for index in sealed.advanced:
            block = tick.blocks[index]
            block.parts.append(_of_block(outputs, index, sealed.kept.get(index)))
            if block.scratch is None:
                block.scratch = [spare.pop() for _ in block.rows]
        if spare:
            self.pool.free_many(np.array(spare, np.intp))
        self._scatter(tick, sealed, widths, states)
        if sealed.advanced:
            with self._wake:
                going_on += self._scheduler.resume(tick, sealed)
        return applied

    def _start(self, tick: Tick, began: float, cut_at: float | None = None) -> Flight:
        """Start a run on the blocks of a tick. What fails is told when its end is waited for."""
        now = self._clock()
        flight = Flight(tick, now if cut_at is None else cut_at, began, packing=now, packed=now)
        try:
            flight.spare = self._spare_slots(tick)
            self._pack(flight)
            flight.packed = self._clock()
            if flight.workspace is not None:
                flight.mark = flight.workspace.start()
        except Exception as error:
            flight.error = error
        return flight

    def _wait(self, flight: Flight) -> Results:
        """Return the outputs of a tick's run, and the states after it."""
        if flight.error is not None:
            raise flight.error
        assert flight.workspace is not None
        return flight.workspace.run()

    def _pack(self, flight: Flight) -> None:
        """Fill the arrays of a tick."""
        tick = flight.tick
        blocks, lengths = tick.blocks, tick.lengths
        workspace = flight.workspace = self.engine.workspace(tick.rows, tick.steps)
        for index, (spec, room) in enumerate(zip(self.manifest.inputs, workspace.inputs, strict=True)):
            parts = [
                block.inputs[index]
                if length == block.steps
                else block.inputs[index][:, block.done : block.done + length]
                for block, length in zip(blocks, lengths, strict=True)
            ]
            workspace.inputs[index] = pack(parts, lengths, spec, room)
        if workspace.lengths is not None:
            workspace.lengths[:] = np.repeat(lengths, [len(block.rows) for block in blocks])
        slots = [
            slot
            for block in blocks
            for slot in (block.scratch if block.scratch is not None else [row.track.slot for row in block.rows])
        ]
        self.pool.gather(np.array(slots, np.intp), workspace.states)
        flight.gathered = True

    def _spare_slots(self, tick: Tick) -> list[int]:
        """Take a slot for each row that has steps left after a tick and nowhere to keep its states till then."""
        count = sum(
            len(block.rows)
            for block, length in zip(tick.blocks, tick.lengths, strict=True)
            if block.scratch is None and block.left > length
        )
        return self.pool.allocate_many(count).tolist() if count else []

    def _scatter(self, tick: Tick, sealed: Sealed, widths: Sequence[int], states: Any) -> None:
        """Keep the states of the rows that were applied or go on."""
        slots: list[int] = []
        rows: list[int] = []
        offsets = [0, *accumulate(widths)]
        for index in sorted(sealed.applied + sealed.advanced):
            block, offset = tick.blocks[index], offsets[index]
            if block.phase is Phase.APPLIED:
                slots += [row.track.slot for row in block.rows]
            else:
                slots += block.scratch or ()
            kept = sealed.kept.get(index)
            rows += range(offset, offset + widths[index]) if kept is None else [offset + n for n in kept]
        if rows:
            self.pool.scatter(np.array(slots, np.intp), np.array(rows, np.intp), states)
        else:
            self.pool.abandon(states)

    def _join(self, tick: Tick, outputs: Sequence[list[Array]]) -> None:
        """Put the outputs of its earlier slices before those of the last one, of each block that ends with a tick."""
        for index, (block, length) in enumerate(zip(tick.blocks, tick.lengths, strict=True)):
            if not block.parts or block.left > length:
                continue
            for n, (spec, arrays) in enumerate(zip(self.manifest.outputs, outputs, strict=True)):
                if spec.time_axis is not None:
                    arrays[index] = np.concatenate([*(part[n] for part in block.parts), arrays[index]], axis=1)

    def _refuse(self, blocks: Sequence[Block], error: ConveyorError) -> None:
        with self._wake:
            self._scheduler.fail(blocks, error)

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


def _of_block(outputs: Sequence[Sequence[Array]], index: int, kept: list[int] | None) -> list[Array]:
    """The outputs of one block, of the rows of it that are left."""
    arrays = [blocks[index] for blocks in outputs]
    return arrays if kept is None else [array[kept] for array in arrays]


def _draining() -> Draining:
    return Draining("the server is stopping")


def _ignore(block: Block) -> None:
    pass
