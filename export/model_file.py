"""A model made into its files, and a file held against what it was made from.

Owns which files there are, and the order of the work: read the module and run it, choose the lowerings, trace,
quantise, describe, verify. What fails verification does not leave here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from torch import nn

from export.data import check_sequences
from export.describe import Precision, check_manifest, describe, put_manifest, read_manifest
from export.errors import ExportError, VerificationFailed
from export.graph import build_graph
from export.lowerings import choose_lowerings, why_not_on_cuda
from export.module import read_module, verify_module
from export.quantize import check_quantizable, quantize
from export.restore import restore, stored_precision
from export.runtime import Graph
from export.stored import stored_size
from export.verify import AGAINST_CPU, Verification, check_bound, judge
from export.versions import Beside, file_for_cpu
from models.spec import ModelSpec
from models.weights import Array, digest
from service.errors import LoadError
from service.graphs.onnx_file import check_seal, seal
from service.graphs.placement import Device
from service.manifest import Manifest, Parity, ParityRow

MAX_ERROR: dict[Precision, float] = {"float32": 2e-6, "float16": 5e-3, "int8": 5e-2}
"""What the largest error must stay within, where the caller names no bound.

float32 is a promise. The others bound a loss that is accepted: some times what random data of standard deviation 1
measured for LSTMs and GRUs of 64 to 512 units in up to two layers (float16 up to 1e-3, int8 up to 3e-2).
"""

MAX_BYTES = 2**31 - 2**20
"""The weights that fit into one file: a protobuf message ends at 2 GiB."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ModelFile:
    """A verified model, ready to be written.

    Attributes:
        content: the .onnx file's bytes.
        manifest: what stands in its metadata.
        baseline: the same model in float32, to measure the gain of another precision against.
        notes: choices made on the user's behalf, one sentence each.
    """

    content: bytes
    manifest: Manifest
    baseline: bytes
    notes: tuple[str, ...]


def make_model_files(
    model: nn.Module,
    lowering: Literal["auto", "operator", "scan"] = "auto",
    precisions: Sequence[Precision] = ("float32",),
    devices: Sequence[Device] = ("cpu", "cuda"),
    data: Mapping[str, Array] | None = None,
    max_error: float | None = None,
    progress: Progress = lambda _: None,
) -> tuple[ModelFile, dict[Beside, ModelFile]]:
    """Make a model's files: its own, and those that lie beside it.

    Args:
        model: a ``SequenceModel``, or a torch.nn.LSTM, GRU or RNN.
        lowering: the form of every recurrence; "auto" for the one that a device runs best.
        precisions: the first is that of the model's own file, each other has a file beside it.
        devices: what is to run it. With both there is a file for CUDA, of the first precision, where that takes
            another form of a layer than the CPU; int8 is for the CPU alone.
        data: sequences to verify with beside the random ones: ``x[N, T, I]`` (or ids ``x[N, T]``) and ``lengths[N]``.
        max_error: what the largest error must stay within; None for ``MAX_ERROR``.
        progress: told what is being done.

    Raises:
        ExportError: the model, the data or a precision cannot be exported so.
        VerificationFailed: the module or a graph is not within the bound of the reference.
    """
    of = devices[0] if len(devices) == 1 else "cpu"
    first, *rest = [make_model_file(model, lowering, each, data, max_error, progress, of) for each in precisions]
    spec, _ = read_module(model)
    if "cuda" in devices:
        rest = [_with_note(each, spec) for each in rest]
    others: dict[Beside, ModelFile] = dict(zip(precisions[1:], rest, strict=True))
    forms = [choose_lowerings(spec, lowering, device)[0] for device in devices]
    if precisions[0] != "int8" and any(form != forms[0] for form in forms):
        try:
            made = make_model_file(model, lowering, precisions[0], data, max_error, progress, "cuda", first)
        except VerificationFailed as failed:
            says = f"in the form for CUDA, which --devices cpu does without, {failed}"
            raise VerificationFailed(says, failed.parity) from failed
        others["cuda"] = made
    if "cuda" in devices and "cuda" not in others:
        first = _with_note(first, spec)
    return first, others


def _with_note(made: ModelFile, spec: ModelSpec) -> ModelFile:
    """The same file, which has none for CUDA beside it; its user is told where CUDA will not run it."""
    lowerings = [layer.lowering for layer in made.manifest.layers]
    reason = why_not_on_cuda(spec.layers, lowerings, made.manifest.precision)
    return made if reason is None else replace(made, notes=(*made.notes, f"CUDA will not run this file: {reason}"))


def make_model_file(
    model: nn.Module,
    lowering: Literal["auto", "operator", "scan"] = "auto",
    precision: Precision = "float32",
    data: Mapping[str, Array] | None = None,
    max_error: float | None = None,
    progress: Progress = lambda _: None,
    device: Device = "cpu",
    beside: ModelFile | None = None,
) -> ModelFile:
    """Trace, lower and verify a model. Whatever the device, it is verified on the CPU.

    Args:
        model: a ``SequenceModel``, or a torch.nn.LSTM, GRU or RNN.
        lowering: the form of every recurrence; "auto" for the one that the device runs best.
        precision: of the weights in the file.
        data: sequences to verify with beside the random ones: ``x[N, T, I]`` (or ids ``x[N, T]``) and ``lengths[N]``.
        max_error: what the largest error must stay within; None for ``MAX_ERROR``.
        progress: told what is being done.
        device: what is to run the file.
        beside: the same model for the CPU, which it is held against too.

    Raises:
        ExportError: the model, the data or the precision cannot be exported so.
        VerificationFailed: the module or the graph is not within the bound of the reference.
    """
    bound = MAX_ERROR[precision] if max_error is None else max_error
    check_bound(bound)
    spec, weights = read_module(model)
    lowerings, notes = choose_lowerings(spec, lowering, device)
    if (size := 4 * stored_size(spec, lowerings)) > MAX_BYTES:
        raise ExportError(f"the weights take {size} bytes in float32, one .onnx file holds {MAX_BYTES}")
    if precision == "int8":
        check_quantizable(spec, lowerings, device)
    sequences = None if data is None else check_sequences(data, spec)

    progress("running the module")
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    module = verify_module(model, spec, exact, min(bound, MAX_ERROR["float32"]))
    judge([module])

    progress("tracing")
    graph = baseline = build_graph(spec, weights, lowerings)
    if precision == "float16":
        graph = build_graph(spec, weights, lowerings, "float16")
    elif precision == "int8":
        progress("quantising")
        graph = quantize(graph)

    manifest = describe(spec, weights, lowerings, precision)
    found, stored = restore(graph, manifest)
    manifest = manifest.model_copy(update={"weights_digest": digest(stored)})
    check_manifest(manifest, found, stored, stored_precision(graph))
    verification = Verification(Graph(graph.SerializeToString(), manifest, spec), spec, exact, bound)
    on_cpu = None if beside is None else Graph(beside.content, beside.manifest, spec)
    parity = judge([module, *_run(verification, sequences, progress, on_cpu)])
    manifest = manifest.model_copy(update={"parity": parity})
    put_manifest(graph, manifest)
    put_manifest(baseline, manifest)  # so that the files' sizes compare
    return ModelFile(seal(graph.SerializeToString()), manifest, seal(baseline.SerializeToString()), notes)


def verify_file(
    path: Path,
    data: Mapping[str, Array] | None = None,
    max_error: float | None = None,
    progress: Progress = lambda _: None,
) -> Parity:
    """Repeat the verification of a file, from the file alone.

    The reference gets the weights as the file holds them, found by their names, which are those of the export by their
    digest; for float16 and int8 that leaves out the loss of rounding them. A file for CUDA is held against the one for
    the CPU too, where that lies beside it.

    Args:
        path: the .onnx file.
        data: sequences to verify with beside the random ones.
        max_error: what the largest error must stay within; None for ``MAX_ERROR``, or the bound that the file was
            exported with where that is tighter.
        progress: told what is being done.

    Raises:
        ExportError: the file is not one that was exported here, or what its manifest tells of is not in it.
        VerificationFailed: the manifest does not fit the graph, the weights are others than those that were exported,
            or the graph is not within the bound.
    """
    content, model = _read(path)
    manifest = read_manifest(model)
    bound = _bound(manifest) if max_error is None else max_error
    check_bound(bound)
    spec, weights = restore(model, manifest)
    sequences = None if data is None else check_sequences(data, spec)
    check_manifest(manifest, spec, weights, stored_precision(model))
    beside = file_for_cpu(path)
    on_cpu = None if beside is None or not beside.is_file() else _same_model(beside, manifest, spec)
    verification = Verification(Graph(content, manifest, spec), spec, weights, bound)
    parity = judge([*_run(verification, sequences, progress, on_cpu)])
    try:
        # Last: what was found above tells more.
        check_seal(path)
    except LoadError as error:
        raise VerificationFailed(str(error), parity) from error
    return parity


def _same_model(path: Path, manifest: Manifest, spec: ModelSpec) -> Graph:
    """The graph in a file that has to hold the same model as this manifest's.

    Raises:
        VerificationFailed: it holds other weights, or has another precision.
    """
    content, model = _read(path)
    other = read_manifest(model)
    for what in ("precision", "weights_digest"):
        if (theirs := getattr(other, what)) != (ours := getattr(manifest, what)):
            raise VerificationFailed(f"{path.name}, beside it, is not the same model: {what} is {theirs}, here {ours}")
    return Graph(content, other, spec)


def _read(path: Path) -> tuple[bytes, onnx.ModelProto]:
    try:
        content = path.read_bytes()
        return content, onnx.load_from_string(content)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    except DecodeError as error:
        raise ExportError(f"{path} is not an ONNX file: {error}") from error


def _bound(manifest: Manifest) -> float:
    """What a file is held to where the user names no bound: never more than its precision's own."""
    usual = MAX_ERROR[manifest.precision]
    if manifest.parity is None:
        return usual
    bounds = [row.bound for row in manifest.parity.rows if row.case != AGAINST_CPU]
    if not bounds:
        raise ExportError("the file's manifest records a verification in which nothing was compared")
    for bound in bounds:
        check_bound(bound)
    return min(usual, max(bounds))


def _run(
    verification: Verification, sequences: tuple[Array, Array] | None, progress: Progress, on_cpu: Graph | None
) -> Iterator[ParityRow]:
    for row in verification.rows(sequences, on_cpu):
        progress(f"verifying: {row.case}, batch {row.batch}, {row.steps} steps")
        yield row
