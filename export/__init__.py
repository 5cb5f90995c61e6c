"""From a torch module, or arrays from elsewhere, to a verified ONNX file that says what it is; and into other files.

Owns the way from ``models`` to a file that the server can load, and what a file from elsewhere needs to be loaded. Must
not know the server beyond what describes and reads a model's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export.errors import ExportError, VerificationFailed

if TYPE_CHECKING:
    from torch import nn

    from export.describe import Precision
    from export.model_file import Progress
    from models.weights import Array

__all__ = ["ExportError", "VerificationFailed", "export_model"]


def export_model(
    model: nn.Module,
    repository: str | Path,
    name: str,
    version: int | None = None,
    overwrite: bool = False,
    lowering: Literal["auto", "operator", "scan"] = "auto",
    precision: Precision | Sequence[Precision] = "float32",
    devices: Sequence[Literal["cpu", "cuda"]] = ("cpu", "cuda"),
    data: Mapping[str, Array] | None = None,
    max_error: float | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Export a model into a repository: ``REPOSITORY/NAME/VERSION/model.onnx``.

    Args:
        model: a ``models.fused.SequenceModel``, or a torch.nn.LSTM, GRU or RNN.
        repository: the folder of models.
        name: the model's name.
        version: a positive integer; None for the one after the last.
        overwrite: whether a version that is there may be replaced.
        lowering: the form of every recurrence, on every device; "auto" for the one that a device runs best.
        precision: of the weights in the file. Of several the first is that of model.onnx, and each other has a file
            beside it, as ``model.int8.onnx``.
        devices: what is to run it. With both there is a ``model.cuda.onnx`` beside model.onnx where CUDA takes another
            form of a layer than the CPU; of the first precision, unless that is int8. With one model.onnx is for it.
        data: sequences to verify with beside the random ones: ``x[N, T, I]`` (or ids ``x[N, T]``) and ``lengths[N]``.
        max_error: what the graph's largest error must stay within, above 0 and up to 1; None for 2e-6, with float16
            5e-3, with int8 5e-2.
        progress: told what is being done.

    Returns:
        The path of model.onnx.

    Raises:
        ExportError: it cannot be exported so; nothing is written.
        VerificationFailed: the module is not within 2e-6 of the reference, or the graph not within its bound; nothing
            is written.
    """
    # torch takes seconds to import, and this package's command line has things to say without it.
    from export.model_file import make_model_files
    from export.versions import choose_version, write_version

    repository = Path(repository)
    version = choose_version(repository, name, version, overwrite)
    precisions: Sequence[Precision] = [precision] if isinstance(precision, str) else precision
    first, others = make_model_files(model, lowering, precisions, devices, data, max_error, progress)
    progress("writing")
    contents = {what: other.content for what, other in others.items()}
    return write_version(repository, name, version, first.content, overwrite, contents)
