"""Rows that come together as one block again and again, of which nothing is kept one by one as long as they do.

Owns when a track and a row have what is their own, and when the cohort has it for all of them. Once anybody needs one
of them by itself the cohort is over: everything is spelled out, and each goes on as though it had never been. Whoever
shares it between threads holds the lock of its scheduler around ``spell_out``. Must not know what a session is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.ticks.row import PAST, Block, Phase, Row


class Cohort:
    """Rows of different tracks, at rest when it is made.

    Attributes:
        slots: where their states live, [N].
        positions: how many steps each has had, as far as it has been told, [N].
        block: the one under way, until its end has been told.
        over: whether everything has been spelled out.

    Args:
        rows: one a track.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.slots: NDArray[np.intp] = np.array([row.track.slot for row in rows], np.intp)
        self.positions: NDArray[np.int64] = np.array([row.track.position for row in rows], np.int64)
        self.block: Block | None = None
        self.over = False

    def spell_out(self) -> None:
        """Give each row and track what is its own, and be over."""
        if self.over:
            return
        self.over = True
        block = self.block
        waiting = block is not None and block.phase in (Phase.QUEUED, Phase.RUNNING)
        moved = block.steps if block is not None and block.phase is Phase.APPLIED else 0
        for row, position in zip(self.rows, self.positions.tolist(), strict=True):
            row.position = position
            row.block = block or PAST
            row.track.position = position + moved
            row.track.waiting = [block] if waiting and block is not None else []
        if block is not None:
            block.cohort = None
        self.to_each()

    def to_each(self) -> None:
        """Give each what is its own beside its row and its track."""
