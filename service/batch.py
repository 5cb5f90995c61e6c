"""The rows of one batch on their way: each holds a state slot from when it is added until it ends.

Owns that a batch ends as a whole: when one row comes to nothing, or whoever waits has gone, the rest is given up. Must
not know grpc or sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.errors import ConveyorError
from service.ticks.row import USUAL, Block, Row, Track
from service.ticks.runner import Runner

Array = NDArray[np.generic]


class Batch:
    """The rows of one batch on their way. Each holds a slot from when it is added until it ends.

    Args:
        runner: that runs them.
        with_states: whether somebody wants the states that they end in, as their blocks then have them.
    """

    def __init__(self, runner: Runner, with_states: bool) -> None:
        self.blocks: list[Block] = []
        self._runner = runner
        self._with_states = with_states
        self._ended = 0
        self._failed: ConveyorError | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(
        self,
        states: Sequence[Array] | None,
        inputs: Sequence[Array],
        deadline: float | None,
        priority: int = USUAL,
        caller: Hashable = None,
    ) -> None:
        """Add a row, to be submitted with the others.

        Args:
            states: to begin from, each without the batch axis; None for the initial ones.
            inputs: of the row, one array [T, ...] an input of the model.
            deadline: on the clock; None for none.
            priority: 1 first, 2 as usual, 3 last.
            caller: among whom the model's time is shared out.

        Raises:
            Full: if there is no slot.
        """
        slot = self._runner.pool.allocate(states)
        inputs = [array[np.newaxis] for array in inputs]
        row = Row(Track(slot), 0)
        block = Block([row], inputs[0].shape[1], inputs, self._on_end, deadline, priority, caller, batch=True)
        block.with_states = self._with_states
        # Nobody needs the states that it begins from, should it come to nothing halfway.
        block.scratch = [slot]
        self.blocks.append(block)

    def free(self) -> None:
        """Give the slots of rows back that were not submitted."""
        for block in self.blocks:
            self._free(block)
            block.let_go()
        self.blocks.clear()

    async def end(self) -> None:
        """Wait until every row has ended.

        Raises:
            ConveyorError: that of the first row that came to nothing.
        """
        try:
            await self._done
        except asyncio.CancelledError:
            self._give_up()
            raise
        if self._failed is not None:
            raise self._failed

    def _on_end(self, block: Block) -> None:
        self._free(block)
        self._ended += 1
        if block.error is not None and self._failed is None:
            # The batch has failed as a whole: the rest of it would be computed for nobody.
            self._failed = block.error
            self._give_up()
        if self._ended == len(self.blocks) and not self._done.done():
            self._done.set_result(None)

    def _free(self, block: Block) -> None:
        self._runner.pool.free(block.rows[0].track.slot)

    def _give_up(self) -> None:
        for block in self._runner.cancel([block.rows[0] for block in self.blocks]):
            block.tell()
