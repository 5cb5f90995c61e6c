"""Sessions across a restart: which go on, which are lost, and what becomes of their file.

Owns the file from the end of one process to the beginning of the next. Must not know its format, nor grpc.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from service.chunks import runner_of
from service.errors import ConveyorError, SessionLost
from service.operations import Operations
from service.stores.file import Saved, load, save

log = structlog.get_logger()


class Restart:
    """The sessions file of one server.

    Args:
        path: the file; None where sessions end with the server.
        operations: through which sessions go on.
        clock: tells the time, in seconds.
    """

    def __init__(self, path: Path | None, operations: Operations, clock: Callable[[], float]) -> None:
        self._path = path
        self._operations = operations
        self._clock = clock

    async def read(self) -> list[Saved]:
        """Read the sessions of the last drain, if there are any.

        Raises:
            OSError: if none could be written at the end; better now than then.
        """
        path = self._path
        if path is None:
            return []
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
            raise OSError(f"sessions cannot be kept in {path}: expected a file in a folder that can be written to")
        if not path.exists():
            return []
        try:
            return await asyncio.to_thread(load, path)
        except (OSError, ValueError) as error:
            log.error("sessions not restored", reason=str(error), kept_as=str(_set_aside(path)))
            return []

    def restore(self, saved: list[Saved]) -> None:
        """Go on with sessions; note those as lost whose model is not served any more.

        Their file is used up by this: its states are the past from then on.
        """
        if not saved or self._path is None:
            return
        operations = self._operations
        # In the order of their use, as the table has them; where there is room for some only, for those used last.
        oldest_first = sorted(saved, key=lambda one: one.idle_s, reverse=True)
        excess = max(0, len(saved) - operations.sessions.limit)
        lost: set[str] = set()
        restored = 0
        for index, one in enumerate(oldest_first):
            try:
                if index < excess:
                    raise SessionLost("there are more sessions than this server holds")
                runner = operations.repository.find_for_session(one.model, one.version)
                if runner.digest != one.digest:
                    raise SessionLost(f"the file of model {one.model!r}, version {one.version}, has changed")
                operations.resume(
                    one.owner, one.identity, runner, one.states, one.position, one.epoch, one.idle_s, one.last
                )
                restored += 1
            except ConveyorError as error:
                operations.sessions.lose(one.owner, one.identity)
                lost.add(str(error))
        if lost:
            # Whoever started the server with the wrong models still has the states.
            kept_as = str(_set_aside(self._path))
            count = len(saved) - restored
            log.warning("sessions restored", count=restored, lost=count, reasons=sorted(lost)[:8], kept_as=kept_as)
        else:
            self._path.unlink()
            log.info("sessions restored", count=restored)

    async def save(self) -> None:
        """Write every session that is at rest. Nothing may move a session any more."""
        if self._path is None:
            if count := len(self._operations.sessions):
                log.warning("sessions end with the server", count=count, kept_with="--sessions-file")
            return
        sessions = list(self._at_rest())
        try:
            count = await asyncio.to_thread(save, self._path, sessions)
        except OSError as error:
            log.error("sessions not saved", count=len(sessions), reason=str(error))
            return
        log.info("sessions saved", count=count)

    def _at_rest(self) -> Iterator[Saved]:
        now = self._clock()
        for session in self._operations.sessions:
            if session.at_rest:
                runner = runner_of(session)
                yield Saved(
                    owner=session.owner,
                    identity=session.identity,
                    model=runner.name,
                    version=runner.version,
                    digest=runner.digest,
                    position=session.position,
                    epoch=session.epoch,
                    idle_s=now - session.used_at,
                    states=runner.pool.read(session.track.slot),
                    last=session.last,
                )


def _set_aside(path: Path) -> Path:
    """Move a file out of the way of the next one, and return where it is."""
    aside = path.with_name(path.name + ".not-restored")
    os.replace(path, aside)
    return aside
