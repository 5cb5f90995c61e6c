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
from service.row import USUAL, Row, Track
from service.runner import Runner

Array = NDArray[np.generic]


class Batch:
    """The rows of one batch on their way. Each holds a slot from when it is added until it ends."""

    def __init__(self, runner: Runner) -> None:
        self.rows: list[Row] = []
        self.states: dict[Track, list[Array]] = {}
        self._runner = runner
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
        track = Track(self._runner.pool.allocate(states))
        row = Row(track, 0, len(inputs[0]), inputs, self._on_end, deadline, priority, caller, batch=True)
        # Nobody needs the states that it begins from, should it come to nothing halfway.
        row.scratch = track.slot
        self.rows.append(row)

    def free(self) -> None:
        """Give the slots of rows back that were not submitted."""
        for row in self.rows:
            self._runner.pool.free(row.track.slot)

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

    def _on_end(self, row: Row) -> None:
        if row.error is None:
            self.states[row.track] = self._runner.pool.read(row.track.slot)
        self._runner.pool.free(row.track.slot)
        self._ended += 1
        if row.error is not None and self._failed is None:
            # The batch has failed as a whole: the rest of it would be computed for nobody.
            self._failed = row.error
            self._give_up()
        if self._ended == len(self.rows) and not self._done.done():
            self._done.set_result(None)

    def _give_up(self) -> None:
        for row in self.rows:
            if self._runner.cancel(row):
                row.tell()
