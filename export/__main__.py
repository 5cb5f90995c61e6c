"""The command line: export a model, from torch or from weights; verify a file, or look into one.

``python -m export --help`` tells all, and each command's own page the rest.

Owns output and exit codes: 0 done, 1 verification failed, 2 it could not be done as asked, 3 the user has to decide.
Must not know how anything is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from export.arguments import export_parser, from_weights_parser, inspect_parser, verify_parser
from export.errors import ExportError, VerificationFailed

if TYPE_CHECKING:
    from torch import nn

    from export.model_file import ModelFile
    from models.spec import ModelSpec
    from models.weights import Array, Weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    named = given[0] if given and given[0] in COMMANDS else None
    make_parser, command = COMMANDS.get(named or "", (export_parser, export))
    parser = make_parser()
    options = parser.parse_args(given[1:] if named else given)
    console = Console()
    try:
        return command(options, console) or 0
    except VerificationFailed as failed:
        from export.show import parity_table, printable

        if failed.parity is not None:
            console.print(parity_table(failed.parity))
        console.print(printable(str(failed), length=4_000), style="bold red", highlight=False, markup=False)
        return 1
    except ExportError as error:
        from export.show import printable

        print(f"{parser.prog}: {printable(' '.join(str(error).split()), length=4_000)}", file=sys.stderr)
        return 2


def export(options: argparse.Namespace, console: Console) -> None:
    """Export a model, and print what was verified."""

    def load(data: Mapping[str, Array] | None) -> nn.Module:
        from export.named import load_named, load_weights

        model = load_named(options.model)
        if options.weights is not None:
            model = load_weights(model, options.weights)
        if data is not None and "y" in data:
            from export.module import read_module

            hint = "other weights may be meant; and what stands behind the head, a softmax say, is not part of it"
            _compare(*read_module(model), data, options, console, hint)
        return model

    _make(load, options, console)


def from_weights(options: argparse.Namespace, console: Console) -> None:
    """Export a model that is read from a spec and arrays, and print what was verified."""
    compared = False

    def load(data: Mapping[str, Array] | None) -> nn.Module:
        nonlocal compared
        from export.weights.model import read_model
        from models.fused import SequenceModel

        spec, weights = read_model(options.spec)
        if data is not None and "y" in data:
            from export.weights.given_outputs import NOT_IN_ARRAYS

            _compare(spec, weights, data, options, console, NOT_IN_ARRAYS)
            compared = True
        return SequenceModel.from_weights(spec, weights)

    _make(load, options, console)
    if not compared:
        console.print("not compared with what the model gives where it comes from: give --data with x and y to do so")


def _compare(
    spec: ModelSpec, weights: Weights, data: Weights, options: argparse.Namespace, console: Console, hint: str
) -> None:
    """Hold the outputs that are given with the data against the model's, and print how near they are."""
    from export.weights.given_outputs import check_outputs

    exact = {name: array.astype("float64") for name, array in weights.items()}
    error = check_outputs(spec, exact, data, options.max_error, hint)
    console.print(f"the outputs given with the data are the model's, within {error:.1e}", highlight=False)


def _make(
    load: Callable[[Mapping[str, Array] | None], nn.Module], options: argparse.Namespace, console: Console
) -> None:
    """Export what is loaded: to a place that is seen to be free before."""
    if options.repository is not None and options.name is None:
        raise ExportError("--repository needs --name")
    if options.output is not None and (options.name is not None or options.version is not None):
        raise ExportError("--name and --version go with --repository, not with --output")
    if options.output is not None and len(options.precision) > 1:
        raise ExportError("--output is one model file: give one --precision, or --repository for several")
    with console.status("importing") as status:
        from export.versions import check_file, choose_version, file_beside, write_files, write_version

        if options.output is None:
            version = choose_version(options.repository, options.name, options.version, options.overwrite)
        else:
            check_file(options.output, options.overwrite)
        data = _load_data(options.data)
        model = load(data)

        from export.model_file import make_model_files

        first, others = make_model_files(
            model, options.lowering, options.precision, options.devices, data, options.max_error, status.update
        )
        status.update("writing")
        contents = {what: made.content for what, made in others.items()}
        if options.output is None:
            path = write_version(options.repository, options.name, version, first.content, options.overwrite, contents)
        else:
            path = write_files(options.output, first.content, contents)
    _print_made(first, path, console)
    for what, made in others.items():
        _print_made(made, file_beside(path, what), console)


def verify(options: argparse.Namespace, console: Console) -> None:
    """Verify a file, and the one for CUDA beside it, and print what was compared."""
    with console.status("importing"):
        from export.model_file import verify_file
        from export.show import parity_table, print_written
        from export.versions import file_beside, file_for_cpu

        data = _load_data(options.data)
    if data is not None and "y" in data:
        console.print("y in the data is not compared here: give it with the export", highlight=False)
    for_cuda = file_beside(options.file, "cuda")
    for file in (options.file, for_cuda) if for_cuda.is_file() else (options.file,):
        with console.status("verifying") as status:
            parity = verify_file(file, data, options.max_error, status.update)
        console.print(parity_table(parity))
        print_written(file, console, "verified")
    if (own := file_for_cpu(options.file)) is not None and not own.is_file():
        console.print(f"it was not held against {own.name}, which is not beside it", highlight=False, markup=False)


def inspect(options: argparse.Namespace, console: Console) -> int:
    """Look into a file, and print what is found."""
    with console.status("importing"):
        from export.inspect.command import inspect as look_into

    return 0 if look_into(options.file, options.write, console) else 3


Command = Callable[[argparse.Namespace, Console], int | None]

COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Command]] = {
    "from-weights": (from_weights_parser, from_weights),
    "inspect": (inspect_parser, inspect),
    "verify": (verify_parser, verify),
}
"""What the first argument can name; anything else is a model to export."""


def _load_data(path: Path | None) -> dict[str, Array] | None:
    if path is None:
        return None
    from models.checkpoint import load_arrays

    try:
        return load_arrays(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"data: {error}") from error


def _print_made(made: ModelFile, path: Path, console: Console) -> None:
    from export.show import cost_table, layer_line, parity_table, plain, print_written

    parity, precision = made.manifest.parity, made.manifest.precision
    assert parity is not None
    console.print(parity_table(parity))
    if precision != "float32":
        with console.status("measuring the gain"):
            before, after = _measures(made.baseline), _measures(made.content)
        console.print(cost_table(precision, before, after, parity.max_error))
    for number, layer in enumerate(made.manifest.layers, start=1):
        console.print(layer_line(number, layer), highlight=False)
    for note in made.notes:
        console.print(f"[yellow]note[/] {plain(note)}", highlight=False)
    print_written(path, console)


def _measures(content: bytes) -> dict[str, float]:
    from export.speed import steps_per_s

    speeds = {f"steps/s, {N} row{'s'[: N - 1]} a run": steps_per_s(content, N) for N in (1, 64)}
    return {"file, bytes": len(content), **speeds}


if __name__ == "__main__":
    sys.exit(main())
