"""A graph whose states stay on a device, as its runs are asked for: its session, and what there is to know of it.

Must not know where the tensors of a tick lie, sessions, or what onnxruntime is beyond a session that runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from service.manifest import Manifest
from service.states.device import Device

Array = NDArray[Any]

_RUNS_UNTIL_ONE_WAITS = 64


class Options:
    """Options of runs that go on in their stream, and now and then of one that waits.

    What a kernel has copied from the host, as a recurrent operator does with the lengths in each run, onnxruntime frees
    at the end of a run that waits, and never otherwise.

    Args:
        usual: onnxruntime's options of most runs.
        waiting: those of one that waits; None where each does.
    """

    def __init__(self, usual: Any, waiting: Any = None) -> None:
        self._usual = usual
        self._waiting = waiting
        self._runs = 0

    def next(self) -> Any:
        """The options of the next run."""
        self._runs += 1
        wait = self._waiting is not None and self._runs % _RUNS_UNTIL_ONE_WAITS == 0
        return self._waiting if wait else self._usual

    def interrupt(self) -> None:
        """End the run that is under way, from another thread; it raises, and so does every later one."""
        for options in (self._usual, self._waiting):
            if options is not None:
                options.terminate = True


@dataclass(frozen=True, slots=True)
class ResidentGraph:
    """A session whose graph has its states in pools, and what there is to know for tying it to memory.

    Attributes:
        manifest: of the graph that it was before.
        session: the onnxruntime session.
        options: of its runs.
        device: where it runs.
        constants: by the graph's inputs.
        on_host: the inputs that it reads in this machine's memory.
        lengths: its input for the rows' lengths; None if it has none.
    """

    manifest: Manifest
    session: Any
    options: Options
    device: Device
    constants: Mapping[str, Array]
    on_host: frozenset[str]
    lengths: str | None

    @property
    def stepped(self) -> bool:
        """Whether a run takes one step, so that a tick is as many runs."""
        return self.manifest.steps_per_run == 1
