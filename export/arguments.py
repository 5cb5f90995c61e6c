"""The command line's arguments, and the pages that ``--help`` prints.

Owns what can be said on the command line. Must not know what comes of it; imports nothing that takes time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

DESCRIPTION = """\
Make ONNX files that Conveyor can serve out of recurrent models, and verify that they compute the same.

  python -m export MODEL ...                   from a model in torch, with the arguments below
  python -m export from-weights SPEC.yaml ...  from arrays of Keras, torch, NumPy or others: the spec says which is what
  python -m export verify FILE ...             verify an exported file again, from the file alone
  python -m export inspect FILE ...            look into any .onnx file: what it holds, the model.yaml that it needs

Each has a page of its own, with --help; this one is MODEL's. MODEL is named as package.module:callable. The callable
takes no arguments and returns a models.fused.SequenceModel or a torch.nn.LSTM, GRU or RNN; a module that exists already
may be named as well.
"""

EXAMPLES = """\
examples:
  python -m export my_package.my_module:build_model --repository models-dir --name digits
  python -m export my_package.my_module:build_model --weights best.safetensors --output digits.onnx
  python -m export from-weights digits.yaml --repository models-dir --name digits --data held-out.npz
  python -m export verify models-dir/digits/1/model.onnx --data held-out.npz
  python -m export inspect somebody-elses.onnx

Verification is part of the export: the graph runs in onnxruntime on the CPU and is held against a NumPy reference in
float64, with random data and with yours; whole against cut into chunks; alone against in a batch. So is the module
itself, in torch. Outputs and final states must agree within 2e-6 (relative, where the reference is greater than 1);
where they do not, nothing is written.

exit codes: 0 done; 1 verification failed; 2 it could not be done as asked
"""

PRECISIONS = ("float32", "float16", "int8")
DEVICES = ("cpu", "cuda")
BOUNDS = "float32 2e-6, float16 5e-3, int8 5e-2"
OUTPUTS = "; and y[N, T, O], what the model gave for x where it comes from, to be compared"

FROM_WEIGHTS = """\
Make an ONNX file that Conveyor can serve out of arrays from elsewhere, and verify it as every export is.

SPEC.yaml says of which cells the model is, and which array of which file is what. Nothing in a file is ever executed.
What no array tells is whether it was read as it was meant: matrices transposed, gates in another order. Give what the
model computes where it comes from, as x and y in --data, and it is compared.

three specs, the last with most of what can be said:

"""

FROM_WEIGHTS_END = """
examples:
  python -m export from-weights digits.yaml --repository models-dir --name digits
  python -m export from-weights digits.yaml --output digits.onnx --data what-keras-gave.npz

exit codes: 0 done; 1 verification failed; 2 it could not be done as asked
"""


def export_parser() -> argparse.ArgumentParser:
    """The arguments of an export."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="package.module:callable")
    _add_place(parser)
    how = _add_form(parser)
    how.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights for the model: .safetensors, .npz, .h5, .pt or .ckpt"
    )
    _add_verification(parser, BOUNDS + "; of y 1e-5", OUTPUTS)
    return parser


def from_weights_parser() -> argparse.ArgumentParser:
    """The arguments of an export from weights."""
    example = (Path(__file__).parent / "weights/example.yaml").read_text("utf-8")
    parser = argparse.ArgumentParser(
        prog="python -m export from-weights",
        description=FROM_WEIGHTS + indent(example, "  "),
        epilog=FROM_WEIGHTS_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", type=Path, metavar="SPEC.yaml", help="what the model is made of; files beside it")
    _add_place(parser)
    _add_form(parser)
    _add_verification(parser, BOUNDS + "; of y 1e-5", OUTPUTS)
    return parser


def verify_parser() -> argparse.ArgumentParser:
    """The arguments of a verification."""
    parser = argparse.ArgumentParser(
        prog="python -m export verify",
        description="Verify an exported file again, by itself: its manifest against what it holds, its weights against "
        "their sha256, its graph against the reference. A file for CUDA, FILE.cuda.onnx, is verified with the one that "
        "it lies beside, and held against it.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="an .onnx file that was exported here")
    _add_verification(parser, "its precision's, or what the file was exported with where that is tighter")
    return parser


def inspect_parser() -> argparse.ArgumentParser:
    """The arguments of an inspection."""
    parser = argparse.ArgumentParser(
        prog="python -m export inspect",
        description="Look into an .onnx file from anywhere: inputs and outputs, recurrent nodes and where onnxruntime "
        "would run them, sizes that are baked in; and propose the model.yaml that it needs to be served. What the "
        "graph does not tell for certain is left for you to decide.",
        epilog="exit codes: 0 done; 2 it could not be done as asked; 3 the proposal needs your decision, or the server "
        "would refuse the file",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="an .onnx file")
    write = "write the proposal: NAME/model.yaml of NAME/VERSION/FILE; what is there and describes no graph stays"
    parser.add_argument("--write", action="store_true", help=write)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where to")
    place = where.add_mutually_exclusive_group(required=True)
    place.add_argument("--repository", type=Path, metavar="DIR", help="write DIR/NAME/VERSION/model.onnx")
    place.add_argument("--output", type=Path, metavar="FILE.onnx", help="write FILE.onnx")
    where.add_argument("--name", help="the model's name in the repository")
    where.add_argument("--version", type=int, metavar="N", help="its version (default: the one after the last)")
    where.add_argument("--overwrite", action="store_true", help="replace a version or a file that is there")


def _add_form(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    how = parser.add_argument_group("what")
    how.add_argument(
        "--lowering",
        choices=("auto", "operator", "scan"),
        default="auto",
        help="recurrences as ONNX's LSTM, GRU and RNN operators, or as Scan, on every device (default: auto, what the "
        "device runs best)",
    )
    how.add_argument(
        "--devices",
        type=_one_or_more(DEVICES),
        default=DEVICES,
        metavar="D[,D]",
        help="what is to run the model: cpu, cuda. With both, a file for CUDA lies beside model.onnx, as "
        "model.cuda.onnx (or FILE.cuda.onnx), where CUDA takes another form of a layer than the CPU. It has the first "
        "precision, and there is none for int8, which is for the CPU alone. With one device model.onnx is in the form "
        "for it. All are verified on the CPU (default: cpu,cuda)",
    )
    how.add_argument(
        "--precision",
        type=_one_or_more(PRECISIONS),
        default=("float32",),
        metavar="P[,P...]",
        help="float32, float16 or int8; float16 makes inputs, outputs and states float16 too; int8 is for LSTMs. Of "
        "several the first is that of model.onnx, and each other has a file beside it, as model.int8.onnx, which "
        "precision: int8 in model.yaml has served (default: float32)",
    )
    return how


def _one_or_more(choices: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Read one word or several, with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        named = tuple(text.split(","))
        for one in named:
            if one not in choices:
                raise argparse.ArgumentTypeError(f"{one!r} is none of {', '.join(choices)}")
            if named.count(one) > 1:
                raise argparse.ArgumentTypeError(f"{one} stands twice")
        return named

    return read


def _add_verification(parser: argparse.ArgumentParser, default: str, more: str = "") -> None:
    group = parser.add_argument_group("verification")
    data = "sequences to verify with: arrays x[N, T, I] (or token ids x[N, T]) and lengths[N]"
    group.add_argument("--data", type=Path, metavar="FILE.npz", help=data + more)
    group.add_argument("--max-error", type=float, metavar="E", help=f"the largest error allowed (default: {default})")
