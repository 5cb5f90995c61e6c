"""Ticks of one step that run as captured graphs: tried out, held against plain ones, and kept where they are quicker.

Owns the graph of one step that is captured, and the workspaces that it was captured with. What is captured in a thread
is known there alone. Must not know sessions, or what a tick is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

from service.engines.capture_trial import BEFORE_CAPTURE, compare, difference_of, race
from service.engines.engine import run_options
from service.engines.lane import Lane
from service.engines.resident_graph import Options, ResidentGraph
from service.engines.resident_workspace import ResidentWorkspace
from service.graphs.capture import TOLERANCES, Choice, Trial, buckets, worst_of
from service.graphs.workspace import Results
from service.manifest import Manifest
from service.states.device import Device, all_done
from service.states.resident_pool import ResidentPool

Rehearsal = Callable[[], Results]
"""A tick that can be run again and again."""


class Captures:
    """The captured graphs of a model.

    Args:
        start: gives the graph of one step, in a session of its own each time.
        manifest: of the model.
        device: where it runs.
    """

    def __init__(self, start: Callable[[], ResidentGraph], manifest: Manifest, device: Device) -> None:
        self._start: Callable[[], ResidentGraph] | None = start
        self._manifest = manifest
        self._device = device
        self._choice = Choice()
        self._kept: dict[tuple[Lane, int], ResidentWorkspace] = {}
        self._rehearses = True
        self._rehearsed: ResidentGraph | None = None
        self._numbers = count()

    def workspace(self, lane: Lane, rows: int, release: Callable[[Lane], None]) -> ResidentWorkspace | None:
        """Return the arrays of a tick of one step, in the memory of a lane; None where it runs plainly.

        Args:
            lane: whose memory it may have.
            rows: of the tick.
            release: called with the lane when the tick has ended.
        """
        room = self._choice.rows(rows)
        if room is None:
            return None
        captured = self._kept[lane, room]
        captured.begin(rows, lambda: release(lane))
        return captured

    def settle_in(self, lanes: Sequence[Lane], tick_rows: int, pool: ResidentPool) -> str:
        """Capture ticks of one step, hold them against plain ones, and use them where they are quicker.

        On states that nobody uses, and in the thread that runs the ticks.

        Args:
            lanes: the memory of ticks.
            tick_rows: most rows of one.
            pool: of the graph.

        Returns:
            What has come of it, for people; empty where that has been done before.
        """
        start, self._start = self._start, None
        if start is None:
            return ""
        # A session takes memory of it when it is started, maybe while another model is captured.
        self._device.enter()
        try:
            graph = start()
            trials = [self._try(graph, lanes, pool, rows) for rows in buckets(tick_rows) if 2 * rows <= pool.limit]
        except Exception as error:
            # Without it the model runs as well as it did before.
            self._kept.clear()
            self._give_up()
            return f"ticks of one step are not captured: {error}"
        self._choice = Choice(trials, TOLERANCES[self._manifest.precision])
        self._kept = {at: one for at, one in self._kept.items() if at[1] in self._choice.graphs}
        refused = "".join(f"; not for {trial}" for trial in trials if trial.rows not in self._choice.graphs)
        return f"ticks of one step are captured with room for {sorted(self._choice.graphs)} rows{refused}"

    def rehearse(self, rows: int, plain: Rehearsal, tie: Callable[[ResidentGraph], Rehearsal]) -> Rehearsal:
        """Return a tick of one step as ticks of so many rows will run: captured, where that is as right and quicker.

        In the thread that rehearses it. The graph for that goes when rehearsals are over.

        Args:
            rows: of the tick.
            plain: it, as it runs plainly.
            tie: gives it, as another graph runs it, with memory of its own.
        """
        if not self._rehearses or self._start is None or rows not in buckets(rows):
            return plain
        self._device.enter()
        try:
            self._rehearsed = self._rehearsed or self._start()
            captured = tie(self._numbered(self._rehearsed))
            for _ in range(BEFORE_CAPTURE):
                captured()
            worst = difference_of(plain()[0], captured()[0])
            trial = race(rows, plain, captured, worst)
        except Exception:
            # What is wrong with it is told when they settle in.
            self.end_rehearsals()
            self._give_up()
            return plain
        return captured if Choice([trial], TOLERANCES[self._manifest.precision]) else plain

    def end_rehearsals(self) -> None:
        """Let go of what was started for them."""
        self._rehearses, self._rehearsed = False, None

    def _try(self, graph: ResidentGraph, lanes: Sequence[Lane], pool: ResidentPool, rows: int) -> Trial:
        """Capture a number of rows in the memory of each lane, and hold them against plain runs there."""
        trials = []
        for lane in lanes:
            self._kept[lane, rows] = captured = lane.own(self._numbered(graph), rows)
            plain = lane.workspace(rows, 1, lambda lane: None)
            trials.append(compare(pool, self._manifest.inputs, plain, captured))
        return worst_of(trials)

    def _numbered(self, graph: ResidentGraph) -> ResidentGraph:
        """The graph, to be captured anew."""
        # None of its runs waits: what kernels had copied from the host is freed then, and the captured graph reads it
        # again in each run.
        waits = self._device.runs.address is None
        return replace(graph, options=Options(run_options(waits, graph_id=next(self._numbers))))

    def _give_up(self) -> None:
        """Have the device go on after a failure, and wait for what had begun: ticks are to have its memory."""
        self._device.end_capture()
        # If it has failed, they will say so.
        with suppress(Exception):
            all_done(self._device).wait()
