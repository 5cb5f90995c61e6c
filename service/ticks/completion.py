"""The end of a tick: what has run is sealed, kept and counted; what has failed runs again in parts, or is refused.

Owns the order of things there, and what is tried again of a tick that failed. Nothing moves before the seal: whatever
fails until then leaves every state as it was. Must not know who cut the tick, what thread this is, or who is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from service.errors import ConveyorError, EngineFailed, Full
from service.metrics import Metrics
from service.states.device import out_of_memory
from service.ticks.execution import Execution
from service.ticks.flight import Flight
from service.ticks.row import Block, Phase
from service.ticks.scheduler import Scheduler, Tick
from service.ticks.statistics import Statistics

log = structlog.get_logger()


class Completion:
    """Ends the ticks of one model version, in the order in which they began. For one thread at a time.

    Attributes:
        statistics: what has been done.

    Args:
        name: of the model.
        version: of it.
        scheduler: whose ticks they are.
        lock: guards the scheduler.
        execution: where they have been started.
        clock: tells the time, in seconds.
        calendar: tells the time, in seconds since 1970.
    """

    def __init__(
        self,
        name: str,
        version: int,
        scheduler: Scheduler,
        lock: threading.Condition,
        execution: Execution,
        metrics: Metrics,
        clock: Callable[[], float],
        calendar: Callable[[], float],
    ) -> None:
        self.statistics = Statistics()
        self._name = name
        self._version = version
        self._scheduler = scheduler
        self._lock = lock
        self._execution = execution
        self._clock = clock
        self._calendar = calendar
        self._ended_at = float("-inf")
        labels = (name, str(version))
        self._padding = metrics.padding.labels(*labels)
        self._tick_rows = metrics.tick_rows.labels(*labels)
        self._tick_seconds = metrics.tick_seconds.labels(*labels)

    def complete(self, flight: Flight) -> list[Block]:
        """Wait for a tick, and make everything follow from it.

        Returns:
            The blocks that have ended by it, each with what its rows are to be told.
        """
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
            log.exception("tick failed", model=self._name, version=self._version)
            self._refuse([block for block in blocks if block.phase is Phase.RUNNING], EngineFailed("the tick failed"))
        # What the tick before it took is not counted twice.
        ended_at = self._clock()
        seconds = ended_at - max(flight.began, self._ended_at)
        self._ended_at = ended_at
        if whole:
            # What failed, or ran in parts, says nothing of what others like it will take.
            with self._lock:
                self._scheduler.pace.learn(rows, tick.steps, seconds)
        self._tick_seconds.observe(seconds)
        self._tick_rows.observe(rows)
        self._padding.inc(computed * tick.steps - cells)
        # Not by their phase: one that waits again may have been taken out since, by somebody who was told so.
        waiting = set(map(id, going_on))
        ended = [block for block in blocks if id(block) not in waiting]
        self._read_states([block for block in ended if block.with_states and block.phase is Phase.APPLIED])
        return ended

    def _end(self, flight: Flight, blocks: list[Block], going_on: list[Block]) -> bool:
        """End a tick.

        Args:
            flight: it, or a part of it.
            blocks: blocks that are split off are added to them.
            going_on: blocks that have steps left are added to them.

        Returns:
            Whether it ran as a whole.
        """
        tick, execution = flight.tick, self._execution
        try:
            execution.finish(flight)
        except Exception as error:
            execution.give_up(flight)
            for part in self._parts(tick, error, blocks):
                self._end(execution.start(part, flight.began, flight.cut_at), blocks, going_on)
            return False
        try:
            with self._lock:
                sealed = self._scheduler.seal(tick, self._clock())
            blocks += sealed.gone
            applied = execution.keep(flight, sealed)
            if sealed.advanced:
                with self._lock:
                    going_on += self._scheduler.resume(tick, sealed)
        finally:
            flight.release()
        self.statistics.run(
            rows=sum(flight.widths),
            applied=applied,
            waited_s=sum(
                (flight.cut_at - block.queued_at) * width
                for block, width in zip(tick.blocks, flight.widths, strict=True)
            ),
            input_s=flight.packed - flight.packing,
            infer_s=flight.ran - flight.packed,
            output_s=self._clock() - flight.ran,
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
            log.error(
                "no memory for a tick", model=self._name, version=self._version, rows=tick.rows, error=repr(error)
            )
            return self._without_newest(tick, blocks)
        if tick.rows > 1:
            # One row may be to blame: each half can run again without the other.
            with self._lock:
                halves = self._scheduler.halve(tick)
            if len(tick.blocks) == 1:
                blocks += halves[1].blocks
            return list(halves)
        if not isinstance(error, ConveyorError):
            log.error("run failed", model=self._name, version=self._version, error=repr(error))
            error = EngineFailed("the model failed on this input; the state has not moved")
        self._refuse(tick.blocks, error)
        return []

    def _without_newest(self, tick: Tick, blocks: list[Block]) -> list[Tick]:
        """Refuse the newer half of a tick's rows, and return the older one."""
        full = Full("the device has no memory for so many rows at once; the state has not moved, try again later")
        rows = [row for block in tick.blocks for row in block.rows]
        order = self._execution.pool.by_age([row.track.slot for row in rows])
        newest = {rows[index] for index in order[len(rows) // 2 :]}
        kept: list[Block] = []
        lengths: list[int] = []
        with self._lock:
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

    def _refuse(self, blocks: Sequence[Block], error: ConveyorError) -> None:
        with self._lock:
            self._scheduler.fail(blocks, error)

    def _read_states(self, blocks: Sequence[Block]) -> None:
        """Copy out the states that sequences of a batch have ended in, while nobody but this thread waits for them."""
        try:
            self._execution.read_states(blocks)
        except Exception as error:
            log.error("states not read", model=self._name, version=self._version, error=repr(error))
            for block in blocks:
                block.error = EngineFailed("the states of the sequence could not be read")
