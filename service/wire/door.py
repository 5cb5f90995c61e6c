"""What the doors have in common: who calls, how many may, which reader goes with a model, which streams are open.

Must not know any door's messages, nor scheduling.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import grpc

from service.errors import Full
from service.manifest import Manifest
from service.operations import Operations
from service.settings import Settings
from service.ticks.runner import Runner
from service.wire.codec import Codec
from service.wire.flow import Flow
from service.wire.malformed import Malformed
from service.wire.status import abort

_KEY = "conveyor-key"
_LARGE_BYTES = 256 * 1024
"""What is smaller is read and written in about the time that it takes to hand it to a thread."""
_THREADS = 2

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Self = TypeVar("Self", bound="Door")
Result = TypeVar("Result")
Request = TypeVar("Request")
Response = TypeVar("Response")


class Places:
    """The places for calls, over all doors.

    Args:
        limit: how many there are.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            Full: if all are taken.
        """
        if self._taken >= self._limit:
            raise Full(f"{self._taken} calls are under way, which is the limit; try again later")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Door:
    """One gRPC service.

    Attributes:
        NAME: the service's full name.
        ONE_STEP: whether models that take one step a run are shown without a time axis.

    Args:
        operations: what is asked.
        settings: all of them.
        places: for calls.
        clock: tells the time, in seconds.
    """

    NAME: ClassVar[str]
    ONE_STEP: ClassVar[bool] = False

    def __init__(self, operations: Operations, settings: Settings, places: Places, clock: Callable[[], float]) -> None:
        self.operations = operations
        self.settings = settings
        self.places = places
        self.clock = clock
        self._codecs: WeakKeyDictionary[Runner, Codec] = WeakKeyDictionary()
        self._streams: set[Flow[Any, Any, Any]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"large-messages-{self.NAME}")

    def codec_of(self, runner: Runner) -> Codec:
        """The reader of a model's tensors, made once."""
        codec = self._codecs.get(runner)
        if codec is None:
            codec = self._codecs[runner] = self.codec(runner.manifest)
        return codec

    def codec(self, manifest: Manifest) -> Codec:
        """The reader of a model's tensors."""
        settings = self.settings
        return Codec(
            manifest,
            max_steps=settings.max_steps,
            max_batch=settings.max_batch,
            max_bytes=settings.max_message_bytes,
            finite=settings.non_finite == "reject",
            one_step=self.ONE_STEP and manifest.steps_per_run == 1,
        )

    async def aside(self, size: int, work: Callable[[], Result]) -> Result:
        """Do work on what was sent or will be: where it is large, in a thread, so that nobody else is held up.

        When whoever waits has gone, what was begun is done for nobody, and what was not is not begun.

        Args:
            size: in bytes.
            work: touches nothing that may change meanwhile.

        Raises:
            Exception: whatever the work raises.
        """
        if size < _LARGE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Have a drain wait for what goes on within, which ends with a reply."""
        self.operations.intake.count_in(1)
        try:
            yield
        finally:
            self.operations.intake.count_out(1)

    @contextmanager
    def counting(self, runner: Runner) -> Iterator[None]:
        """Count what goes on within as one request for a model."""
        began, succeeded = self.clock(), False
        try:
            yield
            succeeded = True
        finally:
            runner.statistics.request(succeeded, self.clock() - began)

    @asynccontextmanager
    async def streaming(self, stream: Flow[Any, Any, Any], context: Context) -> AsyncIterator[None]:
        """Hold a place and be one of the streams that a drain ends."""
        try:
            with self.places.one():
                self._streams.add(stream)
                try:
                    yield
                finally:
                    self._streams.discard(stream)
        except Full as error:
            await abort(context, error)

    def end_streams(self) -> None:
        """Have every stream answer what it has accepted, and end."""
        for stream in self._streams:
            stream.end()

    def close(self) -> None:
        """End the threads, once no call goes on."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def told_always(
    method: Callable[[Self, Request, Context], Awaitable[Response]],
) -> Callable[[Self, Request, Context], Coroutine[Any, Any, Response]]:
    """Turn what a method of a door raises into the call's status."""

    @functools.wraps(method)
    async def call(self: Self, request: Request, context: Context) -> Response:
        try:
            if isinstance(request, Malformed):
                raise request.error
            return await method(self, request, context)
        except Exception as error:
            del request  # for the same reason for which ``abort`` lets go of the error's frames
            await abort(context, error)

    return call


def told(
    method: Callable[[Self, Request, Context], Awaitable[Response]],
) -> Callable[[Self, Request, Context], Coroutine[Any, Any, Response]]:
    """The same, for a call that needs a place."""

    @functools.wraps(method)
    async def call(self: Self, request: Request, context: Context) -> Response:
        with self.places.one():
            return await method(self, request, context)

    return told_always(call)


def owner(context: Context) -> bytes:
    """Return the digest of the key that a call carries; empty for none."""
    for key, value in context.invocation_metadata() or ():
        if key == _KEY:
            secret = value if isinstance(value, bytes) else value.encode()
            return hashlib.sha256(secret).digest()
    return b""


def caller(context: Context) -> Hashable:
    """Return that among which a model's time is shared out: a key's owner; without one, a connection."""
    return owner(context) or context.peer()
