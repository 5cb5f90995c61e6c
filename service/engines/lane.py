"""The memory of one tick under way at a time, on a device, and the workspaces that lie in it.

Owns how large it is and how long it is kept. Must not know what happens in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from service.engines.resident_graph import ResidentGraph
from service.engines.resident_workspace import ResidentWorkspace
from service.engines.tick_memory import Area, bytes_of, layouts
from service.states.device import Buffer

_KEPT_BYTES = 64 << 20
"""Larger memory than this is not kept from one tick to the next."""
_MOST_SHAPES = 128


class Lane:
    """The memory of one tick under way at a time. Ticks of all sizes lie in the same, as far as it is kept.

    Args:
        graph: that runs.
        pools: the buffers that its states live in.
    """

    def __init__(self, graph: ResidentGraph, pools: Sequence[Buffer]) -> None:
        self._graph = graph
        self._pools = pools
        self._areas = [Area(graph.device, 0) for _ in range(2)]
        self._kept: OrderedDict[tuple[int, int], ResidentWorkspace] = OrderedDict()

    def workspace(self, rows: int, steps: int, release: Callable[[Lane], None]) -> ResidentWorkspace:
        """Return the arrays of a tick; nobody may ask for others before it is released.

        Args:
            rows: side by side.
            steps: size of the time axis.
            release: called with this lane when the tick has ended.

        Raises:
            MemoryError: if the device has no memory for it.
        """
        kept = self._kept.get((rows, steps))
        if kept is None:
            kept = self._make(rows, steps)
        else:
            self._kept.move_to_end((rows, steps))
        kept.begin(rows, lambda: release(self))
        return kept

    def own(self, graph: ResidentGraph, rows: int) -> ResidentWorkspace:
        """Return arrays for runs of one step that no other tick has, and that stay where they are: to be captured.

        Args:
            graph: that runs, on the same pools.
            rows: side by side; ticks may have fewer.
        """
        areas = [Area(graph.device, bytes_of(layout)) for layout in layouts(graph, rows, 1)]
        return ResidentWorkspace(graph, self._pools, rows, 1, areas)

    def _make(self, rows: int, steps: int) -> ResidentWorkspace:
        device = self._graph.device
        wanted = [bytes_of(layout) for layout in layouts(self._graph, rows, steps)]
        if max(wanted) > _KEPT_BYTES:
            areas = [Area(device, size) for size in wanted]
            return ResidentWorkspace(self._graph, self._pools, rows, steps, areas)
        if any(size > area.size for size, area in zip(wanted, self._areas, strict=True)):
            # Those that are kept lie in the old memory, and hold it.
            self._kept.clear()
            self._areas = [
                area if size <= area.size else Area(device, 1 << (size - 1).bit_length())
                for size, area in zip(wanted, self._areas, strict=True)
            ]
        made = ResidentWorkspace(self._graph, self._pools, rows, steps, self._areas)
        self._kept[rows, steps] = made
        if len(self._kept) > _MOST_SHAPES:
            self._kept.popitem(last=False)
        return made
