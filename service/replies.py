"""The replies that are kept for chunks that are sent again: how many bytes they hold, and those of ended sequences.

Owns the account of them. Those of live sessions stand in the sessions and are only counted here; those of sequences
that have ended are held here, and make room for the others, the oldest first. Must not know what tensors hold. Lives on
the event loop's thread; the time is handed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import Full
from service.manifest import Manifest
from service.session import Reply

_REMEMBERED = 65_536


@dataclass(frozen=True, slots=True)
class Ended:
    """What is kept of a sequence that was ended.

    Attributes:
        reply: its last.
        epoch: its own.
        version: of the model that it was on.
        manifest: of that version.
        at: when it ended.
    """

    reply: Reply
    epoch: int
    version: int
    manifest: Manifest
    at: float

    @property
    def position(self) -> int:
        """How many steps had been applied."""
        return self.reply.position + self.reply.steps


class Replies:
    """The account.

    Args:
        limit_bytes: most bytes that all replies hold together.
        idle_timeout_s: seconds for which an ended sequence is remembered.
        clock: tells the time, in seconds.
    """

    def __init__(self, limit_bytes: int, idle_timeout_s: float, clock: Callable[[], float]) -> None:
        self._limit_bytes = limit_bytes
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        # What live sessions keep, and what the chunks under way will leave to be kept.
        self._live_bytes = 0
        self._ended_bytes = 0
        self._ended: OrderedDict[tuple[bytes, str], Ended] = OrderedDict()

    @property
    def held(self) -> int:
        """Bytes of all replies, and of those to come."""
        return self._live_bytes + self._ended_bytes

    def reserve(self, size: int, former: int) -> None:
        """Hold room for the replies of chunks.

        Args:
            size: bytes of them.
            former: bytes of those whose places they will take.

        Raises:
            Full: if there is none.
        """
        if self._live_bytes + size - former > self._limit_bytes:
            raise Full(
                f"the replies that sessions keep hold {self._live_bytes} bytes, and {size} more would pass the "
                f"limit of {self._limit_bytes}; close sessions, or step with fewer steps at a time"
            )
        self._live_bytes += size
        self._make_room()

    def replace(self, before: int, after: int, reserved: int = 0) -> None:
        """Count that sessions keep other replies now, in bytes, and give back what was reserved for them."""
        self._live_bytes += after - before - reserved

    def keep(self, key: tuple[bytes, str], ended: Ended) -> None:
        """Keep what is left of a sequence, by its owner and id."""
        self.forget(key)
        self._ended[key] = ended
        self._ended_bytes += ended.reply.size
        self.expire()
        self._make_room()

    def ended(self, key: tuple[bytes, str]) -> Ended | None:
        """Return what is kept of an ended sequence, if anything is."""
        self.expire()
        return self._ended.get(key)

    def forget(self, key: tuple[bytes, str]) -> None:
        """Let go of an ended sequence."""
        ended = self._ended.pop(key, None)
        if ended is not None:
            self._ended_bytes -= ended.reply.size

    def expire(self) -> None:
        """Let go of the sequences that ended too long ago."""
        past = self._clock() - self._idle_timeout_s
        while self._ended and next(iter(self._ended.values())).at <= past:
            self.forget(next(iter(self._ended)))

    def _make_room(self) -> None:
        while self._ended and (len(self._ended) > _REMEMBERED or self.held > self._limit_bytes):
            self.forget(next(iter(self._ended)))
