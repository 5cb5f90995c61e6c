"""A whole model as one ONNX graph: the time-major module that is traced, and the trace.

Owns axes and names of the graph's inputs and outputs. Must not know how a recurrence is written, nor verify anything.

The graph takes ``x[T, N, I]`` (or token ids ``x[T, N]``), ``lengths[N]`` and the states of ``export.signature``, and
gives ``y[T, N, O]`` (or ``y[N, O]`` where the head is on the last valid step) and the states after the last step. T and
N are free.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Literal

import numpy as np
import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from torch import Tensor, nn

from export.recurrence import OPERATORS, TRANSLATIONS, layer_to_json, recurrence
from export.signature import state_tensors
from export.stored import Lowering, stored_weights
from models.spec import ModelSpec
from models.weights import Weights

OPSET = 20


class TimeMajorModel(nn.Module):
    """The model with time first, its recurrences ready to be lowered.

    Its buffers bear the names that the file's initializers get.

    Args:
        spec: what the model is made of.
        weights: its canonical weights.
        lowerings: the form of each layer.
        dtype: of weights, vectors and states.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, lowerings: Sequence[Lowering], dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.lowerings = lowerings
        self.names = []
        for name, array in stored_weights(spec, weights, lowerings).items():
            self.names.append(name)
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(last, torch.from_numpy(np.ascontiguousarray(array)).to(dtype))

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """The graph, from its inputs to its outputs."""
        y = x if self.spec.vocabulary_size is None else self.get_buffer("embedding")[x]
        after = []
        valid = None
        if "scan" in self.lowerings:
            # Once for all layers, from the graph's own input.
            steps = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
            valid = steps.reshape(-1, 1, 1) < lengths.unsqueeze(1)
        for index, before in enumerate(self._by_layer(states)):
            here = f"layers.{index}."
            weights = [self.get_buffer(name) for name in self.names if name.startswith(here)]
            layer = layer_to_json(self.spec.layers[index])
            y, *final = recurrence(y, lengths, valid, before, weights, here, layer, self.lowerings[index])
            after.append(final)
        if self.spec.head_on == "last":
            last = (lengths.long() - 1).clamp(min=0)
            y = y.gather(0, last[None, :, None].expand(1, -1, y.shape[2]))
        if self.spec.head_size is not None:
            y = nn.functional.linear(y, self.get_buffer("head.W"), self.get_buffer("head.b"))
        if self.spec.head_on == "last":
            y = y.squeeze(0)  # after the head: of a matrix it would be a Gemm, whose weights quantising transposes
        return y, *self._by_tensor(after)

    def _by_layer(self, states: Sequence[Tensor]) -> list[list[Tensor]]:
        """The graph's state tensors as each layer takes them: h, or h and c, ``[D, N, H]``."""
        layers = self.spec.layers
        if self.spec.uniform and len(layers) == 1:
            return [list(states)]
        if self.spec.uniform:
            return [list(p) for p in zip(*(torch.split(s, layers[0].directions) for s in states), strict=True)]
        rest = iter(states)
        by_layer = []
        for layer in layers:
            directions = [[next(rest) for _ in range(1 + layer.has_cell_state)] for _ in range(layer.directions)]
            by_layer.append([torch.stack(parts) for parts in zip(*directions, strict=True)])
        return by_layer

    def _by_tensor(self, after: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The other way round."""
        if self.spec.uniform:
            return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*after, strict=True)]
        return [part[d] for parts in after for d in range(parts[0].shape[0]) for part in parts]


def build_graph(
    spec: ModelSpec, weights: Weights, lowerings: Sequence[Lowering], dtype: Literal["float32", "float16"] = "float32"
) -> onnx.ModelProto:
    """Trace a model with torch's exporter and lower its recurrences.

    Args:
        spec: what the model is made of.
        weights: its canonical weights, of any float dtype; they are rounded to ``dtype``.
        lowerings: the form of each layer.
        dtype: of weights, vectors and states in the graph.

    Returns:
        The graph, without a manifest; every weight inside.
    """
    kind = {"float32": torch.float32, "float16": torch.float16}[dtype]
    model = TimeMajorModel(spec, weights, lowerings, kind).eval()
    tensors = state_tensors(spec)
    T, N = 3, 2  # any sizes that differ from 1 and from each other: the axes are free in the graph
    vectors = torch.zeros(T, N, spec.layers[0].input_size, dtype=kind)
    x = vectors if spec.vocabulary_size is None else torch.zeros(T, N, dtype=torch.int64)
    states = tuple(
        torch.zeros([N if size is None else size for size in tensor.shape], dtype=kind) for tensor in tensors
    )
    time, batch = torch.export.Dim("T"), torch.export.Dim("N")
    with _quiet():
        program = torch.onnx.export(
            model,
            (x, torch.full((N,), T, dtype=torch.int32), *states),
            dynamo=True,
            opset_version=OPSET,
            input_names=["x", "lengths", *(tensor.input for tensor in tensors)],
            output_names=["y", *(tensor.output for tensor in tensors)],
            dynamic_shapes=({0: time, 1: batch}, {0: batch}, tuple({tensor.batch_axis: batch} for tensor in tensors)),
            custom_translation_table=TRANSLATIONS,
            # Its optimiser folds and merges initializers that are equal, and with them their names.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    # Only what torch wrote round the model is tidied: weights keep their names, by which they are found in the file.
    names = set(model.names)
    optimizer.fold_constants_ir(
        program.model, should_fold=lambda node: False if any(v and v.name in names for v in node.inputs) else None
    )
    optimizer.remove_unused_nodes(program.model)
    ClearMetadataAndDocStringPass()(program.model)  # stack traces of this machine
    for node in program.model.graph:
        if node.op_type in OPERATORS.values() and node.inputs[1] is not None:
            # By the layer, as its weights: torch names it after its own trace.
            node.name = f"{node.inputs[1].name}".removesuffix("W") + node.op_type
    proto: onnx.ModelProto = program.model_proto
    proto.producer_name, proto.producer_version = "conveyor", ""
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks from the user: they are about itself, and what it wrote is verified."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
