"""What a client knows of a model: its signature. Must not know channels or sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from conveyor.errors import ProtocolError
from conveyor.tensors import DTYPES
from conveyor.v1 import conveyor_pb2 as pb


@dataclass(frozen=True)
class TensorSpec:
    """One tensor in a model's signature.

    Attributes:
        name: as it stands in requests and replies.
        dtype: of its elements.
        shape: size of each axis as in ``infer``: batch first, then time where there is time; None where any size goes.
        axes: name of each axis: "batch", "time", or what the axis holds.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What the server says of one of its models.

    Attributes:
        name: of the model.
        version: a positive integer.
        inputs: the sequences that go in.
        outputs: what comes out; one without a time axis holds the value at the last valid step.
        states: what is carried from step to step.
        streamable: whether sessions can be opened.
        cells: the recurrent cell of each layer.
        precision: of the weights: "float32", "float16" or "int8".
        max_steps: largest number of steps that one sequence or chunk may have.
        max_batch: largest number of sequences that one ``infer`` may hold.
        max_message_bytes: largest message that the server takes; 0 where it does not say.
        device: that runs it: "cpu" or "cuda"; empty where the server does not say.
        fallback: whether CUDA was asked for, and the CPU runs it all the same.
        tf32: whether products round their factors to TF32.
        tf32_difference: how far outputs and states were from those without TF32 when it was loaded.
    """

    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    streamable: bool
    cells: tuple[str, ...]
    precision: str
    max_steps: int
    max_batch: int
    max_message_bytes: int
    device: str = ""
    fallback: bool = False
    tf32: bool = False
    tf32_difference: float = 0.0


def decode_model(message: pb.Model) -> Model:
    """Reads a model's description.

    Raises:
        ProtocolError: it names an element type that does not exist, or not every axis.
    """
    return Model(
        name=message.name,
        version=message.version,
        inputs=tuple(map(_decode_spec, message.inputs)),
        outputs=tuple(map(_decode_spec, message.outputs)),
        states=tuple(map(_decode_spec, message.states)),
        streamable=message.streamable,
        cells=tuple(message.cells),
        precision=message.precision,
        max_steps=message.max_steps,
        max_batch=message.max_batch,
        max_message_bytes=message.max_message_bytes,
        device=message.device,
        fallback=message.fallback,
        tf32=message.tf32,
        tf32_difference=message.tf32_difference,
    )


def _decode_spec(message: pb.TensorSpec) -> TensorSpec:
    dtype = DTYPES.get(message.data_type)
    if dtype is None:
        raise ProtocolError(f"tensor {message.name!r} has element type {message.data_type}, which does not exist")
    if len(message.shape) != len(message.axes):
        raise ProtocolError(f"tensor {message.name!r} has {len(message.shape)} sizes for {len(message.axes)} axes")
    shape = tuple(None if size < 0 else size for size in message.shape)
    return TensorSpec(message.name, dtype, shape, tuple(message.axes))
