"""``python -m service tune``: every model measured on this machine, and what was found, for people.

Owns what is printed. Must not know how anything is measured, or what follows from it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from service.errors import LoadError
from service.graphs.description import Description
from service.settings import Settings
from service.versions.folder import Found, ModelFolder, overlooked, scan, wanted
from service.versions.loading import Loaded
from service.versions.tuner import tuned
from service.versions.tuning import Tuning


def tune(settings: Settings, model: str | None) -> int:
    """Measure the versions that would be served, and print a table of each.

    Args:
        settings: of the server.
        model: its name; None for every one.

    Returns:
        The exit status: 0, or 1 if a model was not measured, or there was none.
    """
    failed = False
    try:
        there = scan(settings.repository)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    if not there or (model is not None and model not in there):
        print(_why_nothing(settings.repository, model, there), file=sys.stderr)
        return 1
    for name, folder in there.items() if model is None else [(model, there[model])]:
        try:
            versions = _versions(folder, settings)
        except LoadError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for found in versions:
            try:
                loaded, tuning = tuned(found.path, settings, anew=True)
            except LoadError as error:
                failed = True
                print(f"{found.name} {found.version}: {error}", file=sys.stderr)
                continue
            print(f"{found.name} {found.version}: {_told(loaded)}")
            print("\n".join(_table(tuning)))
            print(_chosen(loaded.description, tuning, settings), end="\n\n", flush=True)
    return int(failed)


def _why_nothing(repository: Path, model: str | None, there: Collection[str]) -> str:
    """Which models there are, or what looks like one and is none."""
    what = f"{repository} has no model{'' if model is None else f' {model!r}'}"
    if there:
        return f"{what}; there are: {', '.join(there)}"
    return "\n".join([f"{what}; expected DIR/NAME/VERSION/model.onnx", *overlooked(repository)])


def _versions(folder: ModelFolder, settings: Settings) -> Sequence[Found]:
    """The versions that would be served."""
    if folder.trouble:
        raise LoadError(folder.trouble)
    candidates, count, _ = wanted(folder, settings.latest_versions)
    if not candidates:
        raise LoadError("it has no version that would be served")
    return candidates[:count]


def _told(loaded: Loaded) -> str:
    manifest = loaded.graph.manifest
    parity = "" if manifest.parity is None else f", largest error {manifest.parity.max_error:.1e}"
    return f"{loaded.choice.file}, {manifest.precision}{parity}, {loaded.provider}"


def _table(tuning: Tuning) -> Iterator[str]:
    """One line for each size, one pair of columns for each thread count."""
    measured = {(one.rows, one.steps, one.threads): one for one in tuning.measured}
    counts = sorted({threads for *_, threads in measured})
    yield "  rows steps" + "".join(f"{f'{count} thread' + 's' * (count > 1):>26}" for count in counts)
    yield "            " + "   steps/s  CPU us a step".rjust(25) * len(counts)
    for rows, steps in sorted({(rows, steps) for rows, steps, _ in measured}, key=lambda size: (size[1], size[0])):
        line = f"{rows:>6}{steps:>6}"
        for count in counts:
            one = measured.get((rows, steps, count))
            line += f"{one.steps_per_s:>12,.0f}{one.cpu_us_per_step:>14,.2f}" if one else " " * 26
        yield line


def _chosen(said: Description, tuning: Tuning, settings: Settings) -> str:
    short_ms = said.short_tick_ms or settings.short_tick_ms
    steps = tuning.pace.steps_within(64, short_ms * 1e-3, settings.max_tick_steps // 64)
    rows = said.max_tick_rows or settings.max_tick_rows or tuning.tick_rows
    return (
        f"chosen: {tuning.threads} thread{'s' * (tuning.threads > 1)}; at most {rows} rows a tick; "
        f"of 64 rows {steps} step{'s' * (steps > 1)} a tick of {short_ms:g} ms"
    )
