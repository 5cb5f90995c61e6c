"""The command line: export a model, or verify a file again. ``python -m export --help`` tells all.

Owns arguments, output and exit codes: 0 done, 1 verification failed, 2 it could not be done as asked. Must not know how
anything is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from export.errors import ExportError, VerificationFailed

if TYPE_CHECKING:
    from export.model_file import ModelFile
    from models.weights import Array

DESCRIPTION = """\
Make an ONNX file that Conveyor can serve out of a recurrent model in torch, and verify that it computes the same.

The model is named as package.module:callable. The callable takes no arguments and returns a models.fused.SequenceModel
or a torch.nn.LSTM, GRU or RNN; a module that exists already may be named as well.
"""

EXAMPLES = """\
commands:
  python -m export MODEL ...
      export, with the arguments above
  python -m export verify FILE [--data FILE.npz] [--max-error E]
      verify an exported file again, from the file alone

examples:
  python -m export my_package.my_module:build_model --repository models-dir --name digits
  python -m export my_package.my_module:build_model --weights best.safetensors --output digits.onnx
  python -m export verify models-dir/digits/1/model.onnx --data held-out.npz

Verification is part of the export: the graph runs in onnxruntime on the CPU and is held against a NumPy reference in
float64, with random data and with yours; whole against cut into chunks; alone against in a batch. So is the module
itself, in torch. Outputs and final states must agree within 2e-6 (relative, where the reference is greater than 1);
where they do not, nothing is written.

exit codes: 0 done; 1 verification failed; 2 it could not be done as asked
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    named = given[0] if given and given[0] in COMMANDS else None
    make_parser, command = COMMANDS[named] if named else (export_parser, export)
    parser = make_parser()
    options = parser.parse_args(given[1:] if named else given)
    console = Console()
    try:
        command(options, console)
    except VerificationFailed as failed:
        if failed.parity is not None:
            from export.show import parity_table

            console.print(parity_table(failed.parity))
        console.print(str(failed), style="bold red", highlight=False, markup=False)
        return 1
    except ExportError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def export_parser() -> argparse.ArgumentParser:
    """The arguments of an export."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="package.module:callable")
    where = parser.add_argument_group("where to")
    place = where.add_mutually_exclusive_group(required=True)
    place.add_argument("--repository", type=Path, metavar="DIR", help="write DIR/NAME/VERSION/model.onnx")
    place.add_argument("--output", type=Path, metavar="FILE", help="write one .onnx file")
    where.add_argument("--name", help="the model's name in the repository")
    where.add_argument("--version", type=int, metavar="N", help="its version (default: the one after the last)")
    where.add_argument("--overwrite", action="store_true", help="replace a version or a file that is there")
    how = parser.add_argument_group("what")
    how.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors, .npz or .pt: weights for the model")
    how.add_argument(
        "--lowering",
        choices=("auto", "operator", "scan"),
        default="auto",
        help="recurrences as ONNX's LSTM, GRU and RNN operators, or as Scan (default: auto, the best on the CPU)",
    )
    how.add_argument(
        "--precision",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="float16 makes inputs, outputs and states float16 too; int8 is for LSTMs (default: float32)",
    )
    _add_verification(parser, "float32 2e-6, float16 5e-3, int8 5e-2")
    return parser


def verify_parser() -> argparse.ArgumentParser:
    """The arguments of a verification."""
    parser = argparse.ArgumentParser(
        prog="python -m export verify",
        description="Verify an exported file again, by itself: its manifest against what it holds, its weights against "
        "their sha256, its graph against the reference.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="an .onnx file that was exported here")
    _add_verification(parser, "its precision's, or what the file was exported with where that is tighter")
    return parser


def _add_verification(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("verification")
    data = "sequences to verify with: arrays x[N, T, I] (or token ids x[N, T]) and lengths[N]"
    group.add_argument("--data", type=Path, metavar="FILE.npz", help=data)
    group.add_argument("--max-error", type=float, metavar="E", help=f"the largest error allowed (default: {default})")


def export(options: argparse.Namespace, console: Console) -> None:
    """Export a model, and print what was verified."""
    if options.repository is not None and options.name is None:
        raise ExportError("--repository needs --name")
    if options.output is not None and (options.name is not None or options.version is not None):
        raise ExportError("--name and --version go with --repository, not with --output")
    with console.status("importing") as status:
        from export.model_file import make_model_file
        from export.named import load_named, load_weights
        from export.versions import check_file, choose_version, write_file, write_version

        if options.output is None:
            version = choose_version(options.repository, options.name, options.version, options.overwrite)
        else:
            check_file(options.output, options.overwrite)
        model = load_named(options.model)
        if options.weights is not None:
            model = load_weights(model, options.weights)
        made = make_model_file(
            model, options.lowering, options.precision, _load_data(options.data), options.max_error, status.update
        )
        status.update("writing")
        if options.output is None:
            path = write_version(options.repository, options.name, version, made.content, options.overwrite)
        else:
            path = write_file(options.output, made.content)
    _print_made(made, path, console)


def verify(options: argparse.Namespace, console: Console) -> None:
    """Verify a file, and print what was compared."""
    with console.status("importing") as status:
        from export.model_file import verify_file
        from export.show import parity_table

        parity = verify_file(options.file, _load_data(options.data), options.max_error, status.update)
    console.print(parity_table(parity))
    console.print(f"[green]verified[/] {options.file}", highlight=False)


COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace, Console], None]]] = {
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
    from export.show import cost_table, layer_line, parity_table

    parity, precision = made.manifest.parity, made.manifest.precision
    assert parity is not None
    console.print(parity_table(parity))
    if precision != "float32":
        with console.status("measuring the gain"):
            before, after = _measures(made.baseline), _measures(made.content)
        console.print(cost_table(precision, before, after, max(max(row.outputs, row.states) for row in parity.rows)))
    for number, layer in enumerate(made.manifest.layers, start=1):
        console.print(layer_line(number, layer), highlight=False)
    for note in made.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    console.print(f"[green]written[/] {path}", highlight=False, soft_wrap=True)


def _measures(content: bytes) -> dict[str, float]:
    from export.speed import steps_per_s

    speeds = {f"steps/s, {N} row{'s'[: N - 1]} a run": steps_per_s(content, N) for N in (1, 64)}
    return {"file, bytes": len(content), **speeds}


if __name__ == "__main__":
    sys.exit(main())
