"""A tick under way: what was taken for it, what its run gave, and when. Must not know who waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.graphs.workspace import Workspace
from service.states.device import Mark
from service.ticks.scheduler import Tick

Array = NDArray[np.generic]


@dataclass(slots=True)
class Flight:
    """A tick that has been started.

    Attributes:
        tick: it, or a part of it.
        cut_at: when it was cut.
        began: since when there was something to do. What is done between ticks is a part of what they take.
        packing: when filling its arrays began.
        packed: when that was done.
        spare: slots for the rows that need one.
        workspace: its arrays; None where there were none to be had.
        slots: where those of its rows are that it goes on from.
        gathered: whether its states are on their way.
        error: why it did not start.
        mark: when its run is over; None where ``run`` does all of it.
        watched: whether somebody waits for that.
        over: whether they have waited for it, and it was reached or the device has failed.
        ran: when its run was over, and its results were there.
        widths: how many rows each of its blocks had then.
        outputs: once finished, for each output of the model, those of each block.
        states: once finished, those after the run, as the pool takes them.
    """

    tick: Tick
    cut_at: float
    began: float
    packing: float
    packed: float
    spare: list[int] = field(default_factory=list)
    workspace: Workspace | None = None
    slots: NDArray[np.intp] | None = None
    gathered: bool = False
    error: Exception | None = None
    mark: Mark | None = None
    watched: bool = False
    over: bool = False
    ran: float = 0.0
    widths: Sequence[int] = ()
    outputs: Sequence[list[Array]] = ()
    states: Any = None

    @property
    def done(self) -> bool:
        """Whether it can be ended without waiting."""
        return self.over or self.error is not None or self.mark is None or self.mark.done

    def release(self) -> None:
        """Give its arrays back, once; their memory is then another's."""
        workspace, self.workspace = self.workspace, None
        if workspace is not None:
            workspace.release()
