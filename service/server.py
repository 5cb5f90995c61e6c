"""The life of a server: load, warm, be ready, follow the repository, drain, stop.

Owns the gRPC server, its health, and the order of start and end. Must not know tensors.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import time
from collections.abc import Awaitable, Callable

import grpc
import prometheus_client
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.errors import LoadError
from service.metrics import Metrics
from service.operations import Operations
from service.repository import Repository
from service.restart import Restart
from service.sequences import Sequences
from service.settings import Settings
from service.wire.conveyor import ConveyorServicer
from service.wire.door import Places
from service.wire.inference import InferenceServicer
from service.wire.messages import Messages

log = structlog.get_logger()

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """One server, in the event loop that it is made in.

    Attributes:
        port: where it listens, once started.
        metrics_port: where metrics are, once started; None for nowhere.
        metrics: what it counts.

    Args:
        settings: all of them.
        clock: tells the time, in seconds; for expiry and deadlines.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._health = health.aio.HealthServicer()
        # Not a method: in a circle, what gRPC holds would be freed by the collector, at a time when it may not be.
        self.repository = Repository(settings, self.metrics, clock, functools.partial(_tell, self._health))
        self.operations = Operations(
            self.repository,
            settings.max_sessions,
            settings.max_reply_bytes,
            settings.idle_timeout_s,
            self.metrics,
            clock,
        )
        self._restart = Restart(settings.sessions_file, self.operations, clock)
        self.port = 0
        self.metrics_port: int | None = None
        self.sequences = Sequences(self.operations, settings.max_queued_rows, settings.max_queued_bytes, clock)
        self.metrics.waiting_steps.set_function(functools.partial(getattr, self.sequences, "waiting"))
        places = Places(settings.max_calls)
        self._servicers = (
            ConveyorServicer(self.operations, settings, places, clock),
            InferenceServicer(self.operations, self.sequences, settings, places, clock),
        )
        self._grpc = grpc.aio.server(
            interceptors=[Messages(servicer.NAME) for servicer in self._servicers],
            options=[
                # Two servers on one port would share its calls, and sessions with them.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # A client that vanished without a word is noticed, and what it had queued is dropped.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # Clients that keep an idle connection alive are welcome.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        self._routines: list[asyncio.Task[None]] = []
        self._exporter: tuple[object, object] | None = None

    async def start(self) -> None:
        """Listen, load and warm the models, then be ready. Calls that come while models load are told so.

        Raises:
            LoadError: if the repository cannot be read.
            OSError: if the address or port cannot be had.
        """
        for servicer in self._servicers:
            servicer.register(self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            (*(servicer.NAME for servicer in self._servicers), health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc
        )
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        await self._health.set("", _NOT_SERVING)
        try:
            self.port = self._grpc.add_insecure_port(f"{host}:{self.settings.port}")
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {host}:{self.settings.port}: the port is taken, or the address is not this machine's"
            ) from error
        await self._grpc.start()
        if self.settings.metrics_port is not None:
            try:
                http, thread = prometheus_client.start_http_server(
                    self.settings.metrics_port, self.settings.host, self.metrics.registry
                )
            except OSError as error:
                raise OSError(f"cannot serve metrics on {host}:{self.settings.metrics_port}: {error}") from error
            self._exporter = http, thread
            self.metrics_port = http.server_port
        saved = await self._restart.read()
        await self.repository.load(needed={(one.model, one.version) for one in saved})
        self._restart.restore(saved)
        self.operations.intake.ready = True
        # What was loaded for sessions that are not there after all.
        await self.repository.free()
        for name in {entry.name for entry in self.repository.index()}:
            await _tell(self._health, name, self.repository.ready(name))
        await self._health.set("", _SERVING)
        devices = {runner.choice.device for runner in self.repository}
        if devices == {"cpu"} and self.settings.for_cuda:
            log.info("settings without effect: the CPU runs all models", settings=self.settings.for_cuda)
        self._routines.append(asyncio.create_task(_again(min(5.0, self.settings.idle_timeout_s / 4), self._sweep)))
        if self.settings.model_control == "poll":
            self._routines.append(asyncio.create_task(_again(self.settings.poll_interval_s, self.repository.poll)))

    async def drain(self) -> None:
        """Stop being ready, refuse new work, finish what was accepted, answer it, and end the streams."""
        self.operations.intake.draining = True
        self.repository.close()
        await self._health.enter_graceful_shutdown()
        log.info("draining", sessions=len(self.operations.sessions), timeout_s=self.settings.drain_timeout_s)
        try:
            await asyncio.wait_for(self.operations.intake.rest(), self.settings.drain_timeout_s)
        except TimeoutError:
            log.warning("drain timed out; what is left is cancelled")
        for servicer in self._servicers:
            servicer.end_streams()

    async def stop(self, grace_s: float = 2.0) -> bool:
        """End every call and free everything.

        Args:
            grace_s: seconds that calls have to end by themselves, and then runs of models.

        Returns:
            False if a run of a model did not end: its thread goes on, and keeps the process alive unless it is exited.
        """
        for routine in self._routines:
            routine.cancel()
        await asyncio.gather(*self._routines, return_exceptions=True)
        self.repository.close()
        await self._grpc.stop(grace_s)
        for servicer in self._servicers:
            servicer.close()
        # Even at once, a thread that has nothing to do is given the moment that it takes to end.
        whole = await self.repository.stop(max(grace_s, 0.5))
        if self.operations.intake.draining:
            # The last thing of all: nothing can move a session any more.
            await self._restart.save()
        if self._exporter is not None:
            http, _ = self._exporter
            http.shutdown()  # type: ignore[attr-defined]
            http.server_close()  # type: ignore[attr-defined]
        log.info("stopped") if whole else log.error("stopped while a model was running")
        return whole

    async def _sweep(self) -> None:
        """Expire sessions also while nobody calls, and free models whose last session has ended."""
        if count := self.operations.expire():
            log.info("sessions expired", count=count, open=len(self.operations.sessions))
        await self.repository.free()


async def _again(pause_s: float, routine: Callable[[], Awaitable[None]]) -> None:
    """Do something every so often, also after it has failed."""
    while True:
        await asyncio.sleep(pause_s)
        try:
            await routine()
        except Exception:
            log.exception("failed, and will be tried again", routine=routine.__name__)


async def _tell(servicer: health.aio.HealthServicer, model: str, ready: bool) -> None:
    """Tell who asks for a model's health."""
    await servicer.set(model, _SERVING if ready else _NOT_SERVING)


async def serve(settings: Settings) -> int:
    """Run a server until SIGTERM or SIGINT.

    Returns:
        The process's exit status. Where a run of a model did not end the process has to be exited without waiting for
        its thread.
    """
    began = time.perf_counter()
    server = Server(settings)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    start = asyncio.create_task(server.start())
    first = asyncio.create_task(signals.get())
    await asyncio.wait({start, first}, return_when=asyncio.FIRST_COMPLETED)
    if not start.done() and not server.operations.intake.ready:
        # Nothing is served yet, and what an earlier process left is as it was.
        log.info("signal", name=first.result().name)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await server.stop(0)
        return 0
    try:
        await start
    except (LoadError, OSError) as error:
        first.cancel()
        log.error("not started", reason=str(error))
        await server.stop(0)
        return 1
    log.info(
        "ready",
        host=settings.host,
        port=server.port,
        metrics_port=server.metrics_port,
        models=server.repository.names(),
        seconds=round(time.perf_counter() - began, 3),
    )
    log.info("signal", name=(await first).name)
    drain = asyncio.create_task(server.drain())
    second = asyncio.create_task(_second(signals))
    await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
    second.cancel()
    if not drain.done():
        log.warning("second signal: stopping at once")
        drain.cancel()
        await server.stop(0)
        return 1
    drain.result()
    return 0 if await server.stop() else 1


async def _second(signals: asyncio.Queue[signal.Signals]) -> None:
    """Wait for a signal that means it: a process group and its leader often get the same one twice in a row."""
    await asyncio.sleep(0.5)
    while not signals.empty():
        signals.get_nowait()
    await signals.get()
