"""What an operator can set, and where it is read: flag, then environment, then file, then default.

Owns every setting with its default and its sentence of help; the only reader of argv and the environment. Must not know
grpc or onnxruntime.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=threading.TIMEOUT_MAX)]
Milliseconds = Annotated[float, Field(gt=0)]

_PREFIX = "CONVEYOR_"

_HELP = """\
Serve recurrent models over gRPC: whole batches, and streaming sessions that keep their state between calls.

  python -m service --repository models/                       serve what is in models/NAME/VERSION/model.onnx
  python -m service --repository models/ --port 0              pick a free port; the log's "ready" line names it
  python -m service --repository models/ --model-control poll  serve new versions as they are put there
  CONVEYOR_PORT=9000 python -m service --config server.toml    settings from the environment and a file
  python -m service tune --repository models/                  measure the models and print what that leads to

Each setting is a flag, an environment variable (CONVEYOR_ and the name in capitals, as CONVEYOR_MAX_SESSIONS) or a line
in the --config file (max_sessions = 1000). A flag wins over the environment, that over the file, that over the default.
SIGTERM drains: no new work, what was accepted is finished, then the server stops. A second signal, half a second or
more after the first, stops it at once."""

_HELP_TUNE = """\
Measure the models of a repository on this machine: what a run takes with so many rows, steps and threads, and how the
server will run them because of that. What was measured is kept beside the model, or in --cache-dir, for the server to
find: do this while the machine has nothing else to do.

  python -m service tune --repository models/               every model, the versions that would be served
  python -m service tune --repository models/ --model lstm  one of them

The settings are the server's; only those of models and of compute matter here."""


class Settings(BaseModel):
    """All settings of one server."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    repository: Path = Path("repository")
    """Folder of models: NAME/VERSION/model.onnx, VERSION a positive integer."""
    latest_versions: Positive = 1
    """How many versions of each model to serve: the newest that load. A model's own model.yaml goes before this."""
    model_control: Literal["fixed", "poll", "explicit"] = "fixed"
    """Which models are served. fixed: those that are in the folder at the start; poll: the folder is watched, and what
    comes, changes or goes there does so here; explicit: those that clients ask to load."""
    poll_interval_s: Seconds = 15.0
    """Seconds between two looks at the folder. A change counts when two of them see the same."""
    load_models: tuple[str, ...] = ()
    """With explicit control, the models to load at the start, with commas between them; * for all. Of those that are
    named, at least one has to load, or the server does not start."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8500
    """Port for gRPC; 0 picks a free one."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port for Prometheus metrics over HTTP, on the same address; 0 picks a free one; left out, there are none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run. cuda: a model that CUDA does not run whole is not served; auto: each where it runs quicker, and
    the log says which that is and why. A model's own model.yaml goes before this."""
    fallback: Literal["refuse", "allow"] = "refuse"
    """What to do where cuda was asked for and does not run a model: refuse to load it, or allow the CPU to run it,
    which the log, the model's metadata and the metrics tell. A model's own model.yaml goes before this."""
    gpu_id: Annotated[int, Field(ge=0, le=255)] = 0
    """Which CUDA device, counted from 0."""
    gpu_memory_limit_bytes: Positive | None = None
    """Most memory of the device that onnxruntime takes for the weights and the runs of one model; left out, what there
    is. States, inputs and outputs of ticks, and what CUDA's libraries take for themselves come on top of it."""
    arena_extend: Literal["same", "double"] = "double"
    """By how much that memory grows: same: by what is asked for; double: to twice as much, which asks the device less
    often."""
    tf32: Literal["off", "on"] = "off"
    """Whether CUDA may multiply in TF32, with 10 bits behind the point instead of 23. How far results are from those
    without it is measured when a model is loaded. A model's own model.yaml goes before this."""
    cuda_graphs: Literal["off", "on"] = "off"
    """Whether ticks of one step may run as captured CUDA graphs, where that is measured to be quicker. They are
    captured before the model serves, which loads it a second time, each time with half of its memory limit."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads inside one run of a model; 0 takes as many as pay by what is measured when it is loaded, or 1 where
    nothing is. A model's own model.yaml goes before this, and before the lengths of ticks."""
    tune_s: Annotated[float, Field(ge=0, le=3600)] = 0.4
    """Most seconds that a model is measured for when it is loaded, unless that was done before; 0 for not at all."""
    cache_dir: Path | None = None
    """Folder for what was measured, as NAME/VERSION/tuning.json; left out, beside the model."""

    max_message_bytes: Positive = 64 * 1024 * 1024
    """Largest message taken in, and largest reply that is built."""
    max_steps: Positive = 4096
    """Most steps in one chunk, and in one sequence of a batch."""
    max_batch: Positive = 1024
    """Most sequences in one batch."""
    max_sessions: Positive = 100_000
    """Most sessions open at once. On CUDA it bounds the states on the device: memory for so many is taken when a model
    is loaded."""
    max_queued_rows: Positive = 8192
    """Most chunks and batch rows waiting for one model; over it, new ones are refused at once. As many steps, of all
    sequences together, may wait for earlier ones of theirs."""
    max_queued_bytes: Positive = 1024 * 1024 * 1024
    """Most bytes of input waiting for one model, and of requests waiting for earlier ones of their sequences."""
    max_queued_s: Seconds = 60.0
    """Most seconds of work waiting for one model, by what its runs have taken so far."""
    max_reply_bytes: Positive = 1024 * 1024 * 1024
    """Most bytes that the newest replies of all sessions hold together; over it, chunks are refused."""
    max_calls: Positive = 10_000
    """Most calls under way at once, health checks not counted; a stream is one call however long it lives."""
    max_stream_chunks: Positive = 4096
    """Most chunks of one stream that are not answered yet; over it, or with a message's worth of results unread, the
    stream is not read until some are."""
    max_tick_rows: Positive | None = None
    """Most chunks and batch rows in one run of a model; left out, 512, or fewer where more gain nothing by what is
    measured."""
    max_tick_steps: Positive = 8192
    """Most steps in one run of a model, padding counted, unless one row alone has more."""
    max_model_bytes: Positive = 4 * 1024 * 1024 * 1024
    """Largest model that is loaded: its file and what that names beside it."""
    load_timeout_s: Seconds = 300.0
    """Seconds that loading a model may take; one that takes longer, or whose run never ends, is left out."""
    short_tick_ms: Milliseconds = 2.0
    """Milliseconds that one run of a model should take while many single steps come, or any chunks beside batches: what
    is longer runs in slices."""
    long_tick_ms: Milliseconds = 50.0
    """The same while there are only batches, or chunks of several steps; the more single steps come beside these, the
    less."""
    max_queue_delay_us: Annotated[int, Field(ge=0)] = 0
    """Microseconds that rows may wait for others to fill their tick. By default they do not: a tick takes what has come
    while the one before ran."""
    non_finite: Literal["reject", "accept"] = "reject"
    """What to do with NaN and infinity in inputs and states. Accepted, they may come out as finite numbers."""

    sessions_file: Path | None = None
    """File in which open sessions outlive a restart: written after a drain, read and removed at start. Model versions
    that they need are served beside the newest."""
    idle_timeout_s: Seconds = 600.0
    """Seconds without a chunk after which a session expires."""
    drain_timeout_s: Seconds = 25.0
    """Seconds that accepted work may take after SIGTERM before it is cancelled."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important events to log."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """How to log; auto is console on a terminal and json elsewhere."""
    config: Path | None = None
    """A TOML file with settings."""

    @property
    def for_cuda(self) -> list[str]:
        """The flags of settings that CUDA alone heeds, where they are not left as they are."""
        names = ("gpu_id", "gpu_memory_limit_bytes", "arena_extend", "tf32", "cuda_graphs")
        return [_flag(name) for name in names if getattr(self, name) != Settings.model_fields[name].default]

    @field_validator("tf32", "cuda_graphs", mode="before")
    @classmethod
    def _switch(cls, given: Any) -> Any:
        """Take a switch as any place spells it: a flag, the environment, TOML, model.yaml."""
        return {"true": "on", "1": "on", "false": "off", "0": "off"}.get(str(given).lower(), given)

    @field_validator("load_models", mode="before")
    @classmethod
    def _between_commas(cls, given: Any, info: ValidationInfo) -> Any:
        names = given.split(",") if isinstance(given, str) else given
        if names and info.data.get("model_control", "explicit") != "explicit":
            raise ValueError("models are loaded by name with --model-control explicit alone")
        return tuple(name.strip() for name in names) if isinstance(given, str) else given


_GROUPS = {
    "repository": "models",
    "host": "network",
    "device": "compute",
    "max_message_bytes": "limits",
    "sessions_file": "sessions",
    "log_level": "logs",
    "config": "settings file",
}
"""The first setting of each group of the help page."""
_UNITS = {"_bytes": "bytes", "_s": "seconds", "_ms": "milliseconds", "_us": "microseconds"}
_NO_OTHER: Mapping[str, Any] = MappingProxyType({})


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read the settings of a server.

    Args:
        argv: the flags, without the program's name.
        environ: the environment.

    Raises:
        SystemExit: with status 0 after --help, with status 2 and a line on standard error for each setting that is
        wrong.
    """
    parser = _parser("python -m service", "[--repository DIR] [--port PORT] [flags]", _HELP)
    return _read(parser, _flags(parser, argv), environ)


def load_tune(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Settings, str | None]:
    """Read what ``python -m service tune`` is to do: the settings, and the model, or None for every one.

    Raises:
        SystemExit: as for ``load``.
    """
    defaults = {"tune_s": 5.0, "log_level": "warning"}
    parser = _parser("python -m service tune", "[--repository DIR] [--model NAME] [flags]", _HELP_TUNE, defaults)
    parser.add_argument("--model", metavar="NAME", help="the model to measure; every one where it is left out")
    flags = _flags(parser, argv)
    model = flags.pop("model")
    settings = _read(parser, flags, environ, defaults)
    if not settings.tune_s:
        if flags["tune_s"] is not None:
            parser.error("--tune-s: in 0 seconds nothing is measured; expected more")
        # A server that is told to measure nothing is a reason to measure beforehand.
        settings = settings.model_copy(update={"tune_s": defaults["tune_s"]})
    return settings, model


def _flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What the flags say; of those that there are not, the ones that may be meant are told."""
    given, unknown = parser.parse_known_args(argv)
    flags = vars(given)
    if unknown:
        lines = []
        for word in unknown:
            name = word.partition("=")[0]
            if name.startswith("--"):
                close = difflib.get_close_matches(name, map(_flag, flags), 1)
                lines.append(f"{name}: no such flag" + (f"; did you mean {close[0]}?" if close else ""))
        parser.error("\n  ".join(lines) or f"unrecognized arguments: {' '.join(unknown)}")
    return flags


def _read(
    parser: argparse.ArgumentParser,
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    defaults: Mapping[str, Any] = _NO_OTHER,
) -> Settings:
    flags = {name: value for name, value in given.items() if value is not None}
    variables = {
        name: environ[_PREFIX + name.upper()] for name in Settings.model_fields if environ.get(_PREFIX + name.upper())
    }
    for name in environ.keys() - {_PREFIX + name.upper() for name in Settings.model_fields}:
        if name.startswith(_PREFIX):
            meant = _meant(name.removeprefix(_PREFIX).lower(), lambda close: _PREFIX + close.upper())
            print(f"{parser.prog}: warning: there is no setting {name}{meant}", file=sys.stderr)
    path = flags.get("config", variables.get("config"))
    in_file: dict[str, Any] = {}
    if path is not None:
        try:
            in_file = tomllib.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            parser.error(f"settings file {path}: {error}")
    # The name under which a wrong value was given is the one its owner will look for.
    origins = (
        {name: f"settings file {path}: {name}" for name in in_file}
        | {name: _PREFIX + name.upper() for name in variables}
        | {name: _flag(name) for name in flags}
    )
    try:
        return Settings(**{**defaults, **in_file, **variables, **flags})
    except ValidationError as error:
        lines = [
            f"{origins[str(wrong['loc'][0])]}: "
            + (f"no such setting{_meant(str(wrong['loc'][0]))}" if wrong["type"] == "extra_forbidden" else _told(wrong))
            for wrong in error.errors()
        ]
        parser.error("\n  ".join(lines))


def _told(wrong: ErrorDetails) -> str:
    """What was expected of a setting, and what was given."""
    name, said = str(wrong["loc"][0]), wrong["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
    if wrong["type"].startswith(("int", "float")):
        number = "a whole number" if wrong["type"].startswith("int") else "a number"
        said = f"expected {number}{unit and f' of {unit}'}"
    elif wrong["type"].startswith(("greater", "less")):
        said = said.replace("expected", f"expected {unit or 'a number'}")
    return f"{said}, got {wrong['input']!r}"


def _meant(name: str, spelt: Callable[[str], str] = str) -> str:
    """The setting that an unknown one may be a slip of."""
    close = difflib.get_close_matches(name, Settings.model_fields, 1)
    return f"; did you mean {spelt(close[0])}?" if close else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser(
    command: str, usage: str, description: str, defaults: Mapping[str, Any] = _NO_OTHER
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command,
        usage=f"{command} {usage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("models")
    for name, field in Settings.model_fields.items():
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        words = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
        metavar = "|".join(words) if words else _METAVARS.get(name, "N")
        default = defaults.get(name, field.default)
        shown = "" if default in (None, ()) else f" [{default:g}]" if isinstance(default, float) else f" [{default}]"
        group.add_argument(_flag(name), metavar=metavar, default=None, help=f"{field.description}{shown}")
    return parser


_METAVARS = {
    "repository": "DIR",
    "poll_interval_s": "SECONDS",
    "load_models": "NAME,...",
    "host": "ADDRESS",
    "port": "PORT",
    "metrics_port": "PORT",
    "load_timeout_s": "SECONDS",
    "idle_timeout_s": "SECONDS",
    "drain_timeout_s": "SECONDS",
    "max_queued_s": "SECONDS",
    "short_tick_ms": "MS",
    "long_tick_ms": "MS",
    "max_queue_delay_us": "US",
    "max_message_bytes": "BYTES",
    "max_queued_bytes": "BYTES",
    "gpu_memory_limit_bytes": "BYTES",
    "max_reply_bytes": "BYTES",
    "max_model_bytes": "BYTES",
    "config": "FILE",
    "sessions_file": "FILE",
    "cache_dir": "DIR",
    "tune_s": "SECONDS",
}
