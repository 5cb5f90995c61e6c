"""The channel to one server: its options, the key, and unary calls that are made again while the server cannot be had.

Must not know sessions or tensors.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from conveyor.errors import ConnectionLost, ConveyorError, InvalidRequest, TimedOut, Unavailable, from_rpc
from conveyor.outage import Outage
from conveyor.v1 import conveyor_pb2_grpc as pb_grpc

_KEY = "conveyor-key"

_TARGET = re.compile(r"(\[[^\[\]/]+\]|[^\[\]:/\s]+):[0-9]+|(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):.+")
"""host:port, or a name in one of gRPC's own forms. Without a port gRPC would try 443, and say nothing of it."""

_LONGEST_S = 1e9
"""No timeout is longer; the wire counts them in microseconds."""


@dataclass(frozen=True)
class Backoff:
    """How long to wait before trying again: exponential, bounded, with jitter so that clients do not return as one.

    Attributes:
        initial_s: upper bound of the first delay.
        factor: by which the bound grows.
        limit_s: which the bound never exceeds.
    """

    initial_s: float = 0.05
    factor: float = 2.0
    limit_s: float = 1.0

    def delay_s(self, attempt: int) -> float:
        """The delay after the given number of failed attempts before this one."""
        bound = min(self.limit_s, self.initial_s * self.factor ** min(attempt, 64))
        return random.uniform(bound / 2, bound)


@dataclass(frozen=True)
class Settings:
    """What a client was told about its connection.

    Attributes:
        target: address of the server, "host:port", or a name in one of gRPC's own forms, such as "unix:/path".
        key: secret of the caller's choosing; sessions opened with it exist only for calls that carry it.
        timeout_s: for each call that does not say its own.
        reconnect_timeout_s: how long a server that cannot be reached, drains or loads is tried again.
        max_message_bytes: largest message, either way.
        credentials: for TLS; None for plain text.
        options: gRPC channel arguments beside, or instead of, the ones set here.
        backoff: between attempts.
        clock: monotonic seconds.
        sleep: waits for seconds.
    """

    target: str
    key: str | None = None
    timeout_s: float = 60.0
    reconnect_timeout_s: float = 30.0
    max_message_bytes: int = 64 * 2**20
    credentials: grpc.ChannelCredentials | None = None
    options: Sequence[tuple[str, Any]] = ()
    backoff: Backoff = Backoff()
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key):
            raise InvalidRequest("a key must be printable ASCII and not empty")
        if not _TARGET.fullmatch(self.target):
            raise InvalidRequest(
                f"target is {self.target!r}; expected 'host:port', or a name in one of gRPC's own forms, such as "
                "'unix:/path' or 'dns:///host:port'"
            )
        self.timeout(self.timeout_s)
        if not (self.reconnect_timeout_s >= 0 and self.max_message_bytes > 0):
            raise InvalidRequest("max_message_bytes must be positive, and reconnect_timeout_s not negative")

    def timeout(self, timeout_s: float | None) -> float:
        """The timeout of a call in seconds: the one given for it, or the client's own.

        Raises:
            InvalidRequest: it is not positive, or endless.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if not 0 < timeout_s <= _LONGEST_S:
            raise InvalidRequest(f"timeout_s is {timeout_s}; expected more than 0 and up to {_LONGEST_S:g} seconds")
        return timeout_s

    def pause_s(self, attempt: int, since: float) -> float:
        """How long to wait before a server is tried again: the last attempt comes when the reconnect timeout is over.

        Args:
            attempt: how many have failed before the latest one.
            since: when it was first found not to be in service, on the client's clock.

        Returns:
            Seconds; 0 if it has been tried for long enough.
        """
        left_s = since + self.reconnect_timeout_s - self.clock()
        return max(0.0, min(self.backoff.delay_s(attempt), left_s))


class Connection:
    """A channel, bound to the event loop in which it was made.

    Attributes:
        settings: what the client was told.
        closed: whether it was closed; nothing can be called any more.
        max_message_bytes: largest message that may be sent: the client's limit, or the server's, once it is known.
        outage: whoever waits for the server says so there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.max_message_bytes = settings.max_message_bytes
        self.closed = False
        self.outage = Outage(settings.target, settings.reconnect_timeout_s, settings.clock)
        options = {
            "grpc.max_send_message_length": settings.max_message_bytes,
            "grpc.max_receive_message_length": settings.max_message_bytes,
            # A peer that vanished without a word is noticed after 40 s while calls are open.
            "grpc.keepalive_time_ms": 30_000,
            "grpc.keepalive_timeout_ms": 10_000,
            "grpc.http2.max_pings_without_data": 0,
            # gRPC pauses between its own attempts too, up to a fifth longer than said here; an attempt of ours during
            # such a pause fails unseen. What a server that is back waits for is one pause of each kind at most.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 300,
            # How long one attempt may take, whatever its name says.
            "grpc.min_reconnect_backoff_ms": 5_000,
            # A connection of one's own: what another client in this process does to its own is not felt here.
            "grpc.use_local_subchannel_pool": 1,
            **dict(settings.options),
        }
        arguments = list(options.items())
        if settings.credentials is None:
            self._channel = grpc.aio.insecure_channel(settings.target, options=arguments)
        else:
            self._channel = grpc.aio.secure_channel(settings.target, settings.credentials, options=arguments)
        self._stub: Any = pb_grpc.ConveyorServiceStub(self._channel)
        self._metadata = ((_KEY, settings.key),) if settings.key is not None else ()

    async def call(
        self,
        method: str,
        request: Any,
        *,
        deadline: float | None = None,
        after_loss: Callable[[ConveyorError], ConveyorError | None] = lambda error: error,
    ) -> Any:
        """Makes a unary call that may be sent twice without harm.

        Args:
            method: name of the call.
            request: its message.
            deadline: for all attempts together, as ``deadline`` gives it; the client's own timeout from now if None.
            after_loss: what the error of an attempt means once the reply to an earlier one was lost: the error to
                raise, or None if it shows that the earlier one succeeded.

        Returns:
            The response; None where ``after_loss`` said so.

        Raises:
            ConveyorError: as the server says, or ConnectionLost or TimedOut where it says nothing.
            InvalidRequest: the request is larger than a message may be; nothing was sent.
        """
        settings = self.settings
        self.check_open()
        if (size_bytes := request.ByteSize()) > self.max_message_bytes:
            raise InvalidRequest(
                f"a request of {size_bytes} bytes does not fit into a message of {self.max_message_bytes}"
            )
        started = settings.clock()
        deadline = self.deadline() if deadline is None else deadline
        attempt = 0
        lost = False
        waiting = object()
        try:
            while True:
                self.check_open()
                error: ConveyorError
                try:
                    left_s = deadline - settings.clock()
                    response = await getattr(self._stub, method)(request, timeout=left_s, metadata=self._metadata)
                except grpc.aio.AioRpcError as rpc_error:
                    error = from_rpc(rpc_error)
                except asyncio.CancelledError:
                    # Closing a channel cancels its calls, which is not the same as cancelling whoever waits for them.
                    task = asyncio.current_task()
                    if self.closed and task is not None and not task.cancelling():
                        raise ConnectionLost("the client was closed during the call") from None
                    raise
                else:
                    self.outage.end(waiting)
                    return response
                if not isinstance(error, Unavailable | TimedOut):
                    self.outage.end(waiting)
                if lost:
                    told = after_loss(error)
                    if told is None:
                        return None
                    error = told
                lost |= isinstance(error, ConnectionLost)
                delay_s = settings.pause_s(attempt, started)
                # An attempt that began at the deadline could not be answered any more.
                if not (isinstance(error, Unavailable) and delay_s and settings.clock() + delay_s < deadline):
                    raise self.given_up(error, started)
                self.outage.begin(waiting, error)
                await settings.sleep(delay_s)
                attempt += 1
        finally:
            self.outage.leave(waiting)

    def deadline(self, timeout_s: float | None = None) -> float:
        """When a call that begins now has to be over, on the client's clock.

        Args:
            timeout_s: of the call; the client's own if None.

        Raises:
            InvalidRequest: it is not positive, or endless.
        """
        return self.settings.clock() + self.settings.timeout(timeout_s)

    def given_up(self, error: ConveyorError, since: float) -> ConveyorError:
        """The error of a last attempt, which says of a connection to where it was tried and since when."""
        if not isinstance(error, ConnectionLost):
            return error
        tried_s = self.settings.clock() - since
        return ConnectionLost(f"{self.settings.target} could not be reached for {tried_s:.1f} s: {error}")

    def check_open(self) -> None:
        """Raises InvalidRequest once the connection has been closed."""
        if self.closed:
            raise InvalidRequest("the client has been closed")

    def stream(self) -> Any:
        """Opens the bidirectional stream."""
        return self._stub.Stream(metadata=self._metadata)

    async def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        self.closed = True
        await self._channel.close()
