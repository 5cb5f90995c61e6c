"""Every metric, declared once, its unit in its name. Must not know anything else of the server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

# When each counter was made is of no use to anybody, and as long as the rest.
disable_created_metrics()  # type: ignore[no-untyped-call]

_POWERS_OF_TWO = tuple(float(2**power) for power in range(14))
_TICK_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The metrics of one server, in a registry of their own, so that several servers can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "version")
        self.steps = Counter("conveyor_steps", "Steps applied.", labels, registry=self.registry)
        self.padding = Counter(
            "conveyor_padding_steps",
            "Steps computed and thrown away: rows shorter than their tick, rows that only fill it up.",
            labels,
            registry=self.registry,
        )
        self.tick_rows = Histogram(
            "conveyor_tick_rows", "Rows in one run of a model.", labels, buckets=_POWERS_OF_TWO, registry=self.registry
        )
        self.tick_seconds = Histogram(
            "conveyor_tick_seconds",
            "Time of one run of a model with gathering and scattering.",
            labels,
            buckets=_TICK_SECONDS,
            registry=self.registry,
        )
        self.rows = Counter(
            "conveyor_rows",
            "Chunks and batch rows by what became of them.",
            (*labels, "outcome"),
            registry=self.registry,
        )
        self.queued_rows = Gauge(
            "conveyor_queued_rows", "Chunks and batch rows waiting.", labels, registry=self.registry
        )
        self.row_by_row = Gauge(
            "conveyor_row_by_row", "1 where a model runs on one row at a time.", labels, registry=self.registry
        )
        self.device = Gauge(
            "conveyor_model_info",
            "1 for the device and the precision that a model runs in.",
            (*labels, "device", "precision"),
            registry=self.registry,
        )
        self.fallback = Gauge(
            "conveyor_model_fallback",
            "1 where CUDA was asked for and the CPU runs a model.",
            labels,
            registry=self.registry,
        )
        self.state_copies = Counter(
            "conveyor_state_copy_bytes",
            "Bytes of states copied to the device (up) and from it (down); none while sessions step.",
            (*labels, "direction"),
            registry=self.registry,
        )
        self.replays = Counter(
            "conveyor_replayed_chunks", "Chunks answered with a stored reply.", registry=self.registry
        )
        self.waiting_steps = Gauge(
            "conveyor_waiting_steps", "Steps waiting for earlier ones of their sequences.", registry=self.registry
        )
        self.sessions = Gauge("conveyor_sessions", "Sessions open.", registry=self.registry)
        self.expired = Counter("conveyor_expired_sessions", "Sessions ended for being idle.", registry=self.registry)
        self._queues: dict[tuple[str, str], Callable[[], int]] = {}
        self._devices: dict[tuple[str, str], tuple[str, str]] = {}

    def show(self, model: str, version: str, queued: Callable[[], int]) -> None:
        """Show the queue of a model version, until it is hidden or another shows itself in its place.

        Args:
            model: name of it.
            version: of it.
            queued: tells how many rows wait.
        """
        self._queues[model, version] = queued
        self.queued_rows.labels(model, version).set_function(queued)

    def tell_device(self, model: str, version: str, device: str, precision: str, fallback: bool) -> None:
        """Tell how a model version runs now, in place of how it ran before.

        Args:
            model: name of it.
            version: of it.
            device: that runs it.
            precision: that it runs in.
            fallback: whether another device was asked for.
        """
        self._forget_device(model, version)
        self._devices[model, version] = device, precision
        self.device.labels(model, version, device, precision).set(1)
        self.fallback.labels(model, version).set(fallback)

    def hide(self, model: str, version: str, queued: Callable[[], int]) -> None:
        """Let go of a queue, unless another has taken its place. What was counted stays, for the next scrape to see."""
        if self._queues.get((model, version)) is queued:
            del self._queues[model, version]
            self.queued_rows.remove(model, version)

    def forget(self, model: str, version: int) -> None:
        """Drop the series of a model version that has been freed."""
        labels = (model, str(version))
        of_versions = (
            self.steps,
            self.padding,
            self.tick_rows,
            self.tick_seconds,
            self.queued_rows,
            self.row_by_row,
            self.fallback,
        )
        for metric in of_versions:
            metric.remove(*labels)
        self._forget_device(*labels)
        for outcome in ("applied", "refused", "turned_away"):
            self.rows.remove(*labels, outcome)
        for direction in ("up", "down"):
            self.state_copies.remove(*labels, direction)

    def _forget_device(self, model: str, version: str) -> None:
        if (told := self._devices.pop((model, version), None)) is not None:
            self.device.remove(model, version, *told)
