"""Structured logs on standard error: one JSON object a line, or columns for people. Must not know what is logged."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO, cast

import structlog


def _in_reading_order(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Put what a reader looks for first in front."""
    return {name: event.pop(name) for name in ("timestamp", "level", "event")} | dict(event)


class _Forgiving:
    """Standard error, whose other end may be gone: a line that cannot be written must not stop a drain."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._file.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def configure_logs(level: str, form: str) -> None:
    """Send structured logs to standard error: one JSON object a line, or columns for people."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    # No local variables in tracebacks: they hold what clients sent.
    renderers: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _in_reading_order,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Forgiving(sys.stderr))),
        cache_logger_on_first_use=True,
    )
