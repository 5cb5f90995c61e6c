"""The int8 form of a graph: its LSTM operators as onnxruntime's DynamicQuantizeLSTM.

Owns what can be quantised, and how. Must not know the manifest.

Kernels become int8, one scale for each gate row; activations are quantised while the model runs, with one scale for a
whole tensor. So the rows of one batch share a scale, and each one's result depends, within the loss, on the others'.
Embedding and head stay float32: they are a small part of the work.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from export.errors import ExportError
from export.stored import Lowering
from models.spec import ModelSpec
from service.graphs.placement import Device


def check_quantizable(spec: ModelSpec, lowerings: list[Lowering], device: Device = "cpu") -> None:
    """See whether onnxruntime has an int8 form of every layer.

    Raises:
        ExportError: it has not; with the layer and the reason.
    """
    if device == "cuda":
        raise ExportError("int8 is for the CPU: CUDA has no kernel for DynamicQuantizeLSTM")
    for number, (layer, lowering) in enumerate(zip(spec.layers, lowerings, strict=True), start=1):
        if not layer.has_cell_state:
            raise ExportError(f"layer {number} is a {layer.cell}: onnxruntime has an int8 form of LSTM operators alone")
        if lowering != "operator":
            raise ExportError(f"layer {number} is lowered to Scan: int8 needs the LSTM operator (--lowering operator)")


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with int8 kernels in its LSTM operators."""
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        root.setLevel(logging.ERROR)  # it recommends a preparation that these graphs do not need
        try:
            quantize_dynamic(model, path, op_types_to_quantize=["LSTM"], per_channel=True, weight_type=QuantType.QInt8)
        finally:
            root.setLevel(level)
        return onnx.load(path)
