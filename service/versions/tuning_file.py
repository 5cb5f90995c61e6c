"""What was measured of a model, kept in a file beside it for the next start.

Owns the file's form, and which machine and which model a measurement is good for. The file may have been written by
anybody: what is wrong in it is told and passed over. Must not know graphs, or what follows from a measurement.
"""

from __future__ import annotations

import os
import platform
import secrets
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.versions.tuning import Measurement

NAME = "tuning.json"
"""The file's name: DIR/NAME/VERSION/tuning.json, or the same below a folder of its own."""

_MAX_BYTES = 1 << 20
_MOST_MACHINES = 8
"""A repository may be shared by machines of several kinds; of those the newest are kept."""

Text = Annotated[str, Field(max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subject(_Part):
    """What was measured, and where: another one is measured anew.

    Attributes:
        digest: of the model's file.
        row_by_row: whether rows run one by one.
        provider: the onnxruntime execution provider.
        onnxruntime: its version.
        cpu: as it calls itself.
        cores: that this process may use.
        gpu: what runs it apart from the CPU, and in what form; empty where nothing does.
        counts: of threads that were to be looked at.
    """

    digest: Text
    row_by_row: bool
    provider: Text
    onnxruntime: Text
    cpu: Text
    cores: int
    counts: Annotated[tuple[int, ...], Field(max_length=64)]
    gpu: Text = ""


class _Record(_Part):
    subject: Subject
    measured: Annotated[tuple[Measurement, ...], Field(min_length=1, max_length=4096)]

    @model_validator(mode="after")
    def _was_to_be_measured(self) -> Self:
        if others := {one.threads for one in self.measured} - set(self.subject.counts):
            raise ValueError(f"measured with {min(others)} threads; there were to be {list(self.subject.counts)}")
        return self


class _Content(_Part):
    format: Literal[1] = 1
    records: Annotated[tuple[_Record, ...], Field(max_length=_MOST_MACHINES)] = ()


class Unusable(Exception):
    """The file cannot be read or written; the text says why."""


def read(path: Path, subject: Subject) -> tuple[Measurement, ...]:
    """Return what was measured of a subject; nothing where that was not done.

    Raises:
        Unusable: if the file is there and does not hold what it should.
    """
    return next((one.measured for one in _records(path) if one.subject == subject), ())


def write(path: Path, subject: Subject, measured: tuple[Measurement, ...]) -> None:
    """Keep what was measured, in one step; of other machines what is there stays.

    Raises:
        Unusable: if it cannot be written.
    """
    try:
        others = tuple(one for one in _records(path) if one.subject != subject)
    except Unusable:
        others = ()
    records = (_Record(subject=subject, measured=measured), *others)[:_MOST_MACHINES]
    whole = path.with_name(f".{NAME}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            whole.write_text(_Content(records=records).model_dump_json(indent=1) + "\n")
            whole.replace(path)
        finally:
            whole.unlink(missing_ok=True)
    except OSError as error:
        raise Unusable(f"{error.strerror}") from error


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            name = next(names, "")
    except OSError:
        name = ""
    return (name or platform.processor() or platform.machine())[:256]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _records(path: Path) -> tuple[_Record, ...]:
    try:
        if path.exists() and not path.is_file():
            raise Unusable("it is no file")
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise Unusable(f"{error.strerror}") from error
    if len(text) > _MAX_BYTES:
        raise Unusable(f"it is larger than {_MAX_BYTES} bytes")
    try:
        return _Content.model_validate_json(text).records
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise Unusable(f"{place + ': ' if place else ''}{wrong['msg']}") from error
