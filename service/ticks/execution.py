"""A tick on its way through graph and pool: packed, run, cut up again, and the states that it leaves behind.

Owns what a tick takes for that, and where the states of its rows are between its slices. Nothing moves before ``keep``,
which is handed what the scheduler has decided; a tick that fails before is given up, and every state is as it was. Must
not know the queue, locks or threads, or who waits for a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from service.graphs.graph import Graph, StatePool
from service.ticks.flight import Flight
from service.ticks.packing import pack, unpack
from service.ticks.row import Block, Phase, Row, Track
from service.ticks.scheduler import Sealed, Tick

Array = NDArray[np.generic]


class Execution:
    """Takes the ticks of one model through its graph. All but ``release`` is for one thread at a time.

    Attributes:
        engine: the loaded graph.
        pool: the state slots.

    Args:
        clock: tells the time, in seconds.
    """

    def __init__(self, engine: Graph, pool: StatePool, clock: Callable[[], float]) -> None:
        self.engine = engine
        self.pool = pool
        self._manifest = engine.manifest
        self._clock = clock

    def warm_up(self, rows: int, steps: int) -> float:
        """Run the graph once on zeros, on states that nobody uses.

        Returns:
            How long that took, in seconds.

        Raises:
            Exception: whatever the engine raises.
        """
        inputs = [
            np.zeros((rows, steps, *(size or 1 for size in spec.tail)), spec.dtype) for spec in self._manifest.inputs
        ]
        began = self._clock()
        slots = [self.pool.allocate() for _ in range(rows)]
        block = Block([Row(Track(slot), 0) for slot in slots], steps, inputs, _ignore)
        flight = self.start(Tick([block], [steps]), began)
        try:
            self._wait(flight)
        except Exception:
            self.give_up(flight)
            raise
        self.pool.scatter(np.array(slots, np.intp), np.arange(rows), flight.states)
        flight.release()
        for slot in slots:
            self.pool.free(slot)
        return self._clock() - began

    def start(self, tick: Tick, began: float, cut_at: float | None = None) -> Flight:
        """Start a run on the blocks of a tick. What fails is told when it is to be finished.

        Args:
            tick: it, or a part of one that has failed.
            began: since when there was something to do.
            cut_at: when it was cut; None for now.
        """
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

    def finish(self, flight: Flight) -> None:
        """Wait for a tick's run, and make ready all that is to be kept of it: nothing may fail after that.

        Raises:
            Exception: whatever it failed of, now or when it was started; it is to be given up then.
        """
        packed = self._wait(flight)
        flight.ran = self._clock()
        tick = flight.tick
        flight.widths = [len(block.rows) for block in tick.blocks]
        flight.outputs = [
            unpack(output, spec, flight.widths, tick.lengths)
            for output, spec in zip(packed, self._manifest.outputs, strict=True)
        ]
        self._join(tick, flight.outputs)

    def give_up(self, flight: Flight) -> None:
        """Give back what a tick had taken that came to nothing."""
        self.pool.free_many(np.array(flight.spare, np.intp))
        moves = flight.workspace.states if flight.workspace is not None and flight.gathered else None
        # What its run has begun may write there until then.
        flight.release()
        if moves is not None:
            self.pool.abandon(moves)

    def keep(self, flight: Flight, sealed: Sealed) -> int:
        """Make blocks and states follow a run that was finished. Its arrays are still to be released.

        Args:
            flight: the tick.
            sealed: which of its blocks have ended well, and which have steps left.

        Returns:
            How many rows were applied.
        """
        tick, outputs, spare = flight.tick, flight.outputs, flight.spare
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
        self._scatter(flight, sealed)
        return applied

    def read_states(self, blocks: Sequence[Block]) -> None:
        """Copy out the states that the rows of blocks have ended in.

        Raises:
            Exception: whatever the device raises; no block has states then.
        """
        slots = [row.track.slot for block in blocks for row in block.rows]
        if not slots:
            return
        states = iter(self.pool.read_many(slots))
        for block in blocks:
            block.states = [next(states) for _ in block.rows]

    def release(self, block: Block) -> None:
        """Give back the slots in which a block that has ended kept its states between its slices. For any thread."""
        if block.scratch is not None:
            for row, slot in zip(block.rows, block.scratch, strict=True):
                if slot != row.track.slot:
                    self.pool.free(slot)
            block.scratch = None

    def _spare_slots(self, tick: Tick) -> list[int]:
        """Take a slot for each row that has steps left after a tick and nowhere to keep its states till then."""
        count = sum(
            len(block.rows)
            for block, length in zip(tick.blocks, tick.lengths, strict=True)
            if block.scratch is None and block.left > length
        )
        return self.pool.reserve_many(count).tolist() if count else []

    def _pack(self, flight: Flight) -> None:
        """Fill the arrays of a tick."""
        tick = flight.tick
        blocks, lengths = tick.blocks, tick.lengths
        workspace = flight.workspace = self.engine.workspace(tick.rows, tick.steps)
        for index, (spec, room) in enumerate(zip(self._manifest.inputs, workspace.inputs, strict=True)):
            parts = [
                block.inputs[index]
                if length == block.steps
                else block.inputs[index][:, block.done : block.done + length]
                for block, length in zip(blocks, lengths, strict=True)
            ]
            workspace.inputs[index] = pack(parts, lengths, spec, room)
        if workspace.lengths is not None:
            workspace.lengths[:] = np.repeat(lengths, [len(block.rows) for block in blocks])
        if len(blocks) < tick.rows:
            flight.slots = np.concatenate([np.asarray(block.slots, np.intp) for block in blocks])
        else:
            flight.slots = np.array([block.slots[0] for block in blocks], np.intp)
        self.pool.gather(flight.slots, workspace.states)
        flight.gathered = True

    @staticmethod
    def _wait(flight: Flight) -> Sequence[Array]:
        """Return the outputs of a tick's run, in the graph's axes, and note the states after it."""
        if flight.error is not None:
            raise flight.error
        assert flight.workspace is not None
        outputs, flight.states = flight.workspace.run()
        return outputs

    def _join(self, tick: Tick, outputs: Sequence[list[Array]]) -> None:
        """Put the outputs of its earlier slices before those of the last one, of each block that ends with a tick."""
        for index, (block, length) in enumerate(zip(tick.blocks, tick.lengths, strict=True)):
            if not block.parts or block.left > length:
                continue
            for n, (spec, arrays) in enumerate(zip(self._manifest.outputs, outputs, strict=True)):
                if spec.time_axis is not None:
                    arrays[index] = np.concatenate([*(part[n] for part in block.parts), arrays[index]], axis=1)

    def _scatter(self, flight: Flight, sealed: Sealed) -> None:
        """Keep the states of the rows that were applied or go on."""
        if len(sealed.applied) == len(flight.tick.blocks) and not sealed.kept and flight.slots is not None:
            # Mostly: all of them, each where it was.
            self.pool.scatter(flight.slots, np.arange(len(flight.slots)), flight.states)
            return
        slots: list[int] = []
        rows: list[int] = []
        offsets = [0, *accumulate(flight.widths)]
        for index in sorted(sealed.applied + sealed.advanced):
            block, offset = flight.tick.blocks[index], offsets[index]
            # Of what was applied its slices' own have become the tracks' by now.
            slots += [row.track.slot for row in block.rows] if block.phase is Phase.APPLIED else block.scratch or ()
            kept = sealed.kept.get(index)
            rows += range(offset, offset + flight.widths[index]) if kept is None else [offset + n for n in kept]
        if rows:
            self.pool.scatter(np.array(slots, np.intp), np.array(rows, np.intp), flight.states)
        else:
            self.pool.abandon(flight.states)


def _of_block(outputs: Sequence[Sequence[Array]], index: int, kept: list[int] | None) -> list[Array]:
    """The outputs of one block, of the rows of it that are left."""
    arrays = [blocks[index] for blocks in outputs]
    return arrays if kept is None else [array[kept] for array in arrays]


def _ignore(block: Block) -> None:
    pass
