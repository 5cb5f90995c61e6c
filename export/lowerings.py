"""In which form each layer is written, for the device that is to run it.

Owns that choice and what the user is told of it. Must not know how a form is written; where onnxruntime runs a node
``service.graphs.placement`` says, for the exporter as for the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir

from export.recurrence import write_operator
from export.scan import Ops
from export.stored import Lowering, stored_layer
from models.layouts import array_shapes
from models.spec import Layer, ModelSpec
from service.graphs.placement import RECURRENT, Device, place
from service.manifest import Precision


def choose_lowerings(
    spec: ModelSpec, lowering: Literal["auto", "operator", "scan"], device: Device = "cpu"
) -> tuple[list[Lowering], tuple[str, ...]]:
    """The form of each layer, and what to tell the user of it.

    The CPU's RNN operator gives a row other last bits in one batch or cut than in another (up to 1e-6 measured, half of
    the bound); LSTM, GRU and Scan do not. So for the CPU "auto" takes Scan for an ``rnn``, and the operator for every
    other cell. For CUDA it takes the operator where cuDNN runs it, and Scan elsewhere.
    """
    if lowering != "auto":
        return [lowering] * len(spec.layers), ()
    reasons = [_why_no_operator(layer, device) for layer in spec.layers]
    lowerings: list[Lowering] = ["operator" if reason is None else "scan" for reason in reasons]
    return lowerings, tuple(_notes(spec.layers, reasons, device))


def why_not_on_cuda(layers: Sequence[Layer], lowerings: Sequence[Lowering], precision: Precision) -> str | None:
    """Why CUDA would not run a file of these layers; None where it should."""
    if precision == "int8":
        return "int8 is for the CPU alone"
    for number, (layer, lowering) in enumerate(zip(layers, lowerings, strict=True), start=1):
        if lowering == "operator" and (reason := why_not_cudnn(layer)) is not None:
            return f"layer {number} ({layer.cell}) is an operator there: {reason}; Scan would run"
    return None


def _why_no_operator(layer: Layer, device: Device) -> str | None:
    if device == "cuda":
        return why_not_cudnn(layer)
    return (
        "onnxruntime's RNN operator gives a row other last bits alone than in a batch" if layer.cell == "rnn" else None
    )


def _notes(layers: Sequence[Layer], reasons: Sequence[str | None], device: Device) -> list[str]:
    where = " for CUDA" if device == "cuda" else ""
    return [
        f"layer {number} ({layer.cell}) is lowered to Scan{where}: {reason}"
        for number, (layer, reason) in enumerate(zip(layers, reasons, strict=True), start=1)
        if reason is not None
    ]


def why_not_cudnn(layer: Layer) -> str | None:
    """Why cuDNN does not run a layer's operator; None where it does."""
    op = Ops()
    arrays = array_shapes(stored_layer(layer, "operator"), "onnx")
    weights = [ir.val(name) for name in "WRBP" if name in arrays]
    state = tuple(ir.val(name) for name in ("h0", "c0")[: 1 + layer.has_cell_state])
    write_operator(op, "", layer, weights, ir.val("x"), ir.val("lengths"), state)
    node = next(node for node in op.tape.nodes if node.op_type in RECURRENT)
    inputs = [(value.name or "") if value is not None else "" for value in node.inputs]
    return place(node.op_type, {name: attribute.value for name, attribute in node.attributes.items()}, inputs).reason
