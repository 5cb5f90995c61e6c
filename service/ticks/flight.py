"""A tick under way: what was taken for it, and when. Must not know who waits for it, or what its arrays hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.graphs.workspace import Workspace
from service.states.device import Mark
from service.ticks.scheduler import Tick


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
        gathered: whether its states are on their way.
        error: why it did not start.
        mark: when its run is over; None where ``run`` does all of it.
        watched: whether somebody waits for that.
        over: whether they have waited for it, and it was reached or the device has failed.
    """

    tick: Tick
    cut_at: float
    began: float
    packing: float
    packed: float
    spare: list[int] = field(default_factory=list)
    workspace: Workspace | None = None
    gathered: bool = False
    error: Exception | None = None
    mark: Mark | None = None
    watched: bool = False
    over: bool = False

    @property
    def done(self) -> bool:
        """Whether it can be ended without waiting."""
        return self.over or self.error is not None or self.mark is None or self.mark.done
