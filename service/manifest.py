"""What a model file says of itself: the contract between whoever writes an .onnx file and the server that runs it.

Owns the pydantic models and their place in the file (one entry of the ONNX metadata). Must not know grpc, onnxruntime
or torch. Axes are the graph's own; the wire puts batch first and time second whatever stands here.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

METADATA_KEY = "conveyor.manifest"
"""The key under which the manifest's JSON stands in the ONNX file's metadata."""

DType = Literal["float32", "float16", "float64", "int64", "int32", "int8", "bool"]
Precision = Literal["float32", "float16", "int8"]
_ITEM_BYTES = {"float32": 4, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
RESERVED = frozenset(
    ["sequence_ids", "sequence_start", "sequence_end", "sequence_positions", "sequence_epochs", "sequence_lengths"]
)
"""Names of tensors that mean something else in a request of the Open Inference Protocol."""
Size = Annotated[int, Field(ge=1)] | None
"""The size of an axis; None where the graph takes any."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Part):
    """A sequence that goes into the graph, or a tensor that comes out of it."""

    name: str
    dtype: DType
    shape: tuple[Size, ...]
    batch_axis: int = Field(ge=0)
    time_axis: int | None = Field(
        default=None, ge=0, description="None: an output that holds the last valid step's value"
    )

    below: int | None = Field(
        default=None,
        ge=1,
        description="of an integer input, such as token ids: every value is at least 0 and below this",
    )
    absent: tuple[int, ...] = Field(
        default=(),
        description="axes of the shape that the graph itself lacks; only batch and time, where a run takes one of them",
    )

    @model_validator(mode="after")
    def _axes_exist(self) -> TensorSpec:
        for axis in (self.batch_axis, self.time_axis):
            if axis is not None and (axis >= len(self.shape) or self.shape[axis] is not None):
                raise ValueError(
                    f"tensor {self.name!r}: axis {axis} must exist in shape {self.shape} and be free (null)"
                )
        if self.batch_axis == self.time_axis:
            raise ValueError(f"tensor {self.name!r}: batch and time cannot be the same axis")
        return self

    @cached_property
    def tail(self) -> tuple[int | None, ...]:
        """The sizes of the axes that are neither batch nor time, in order."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (self.batch_axis, self.time_axis))


class StateSpec(_Part):
    """A state that one run hands to the next: the graph's input and output for it."""

    name: str = Field(description="its name on the wire")
    input: str
    output: str
    dtype: DType
    shape: tuple[Size, ...] = Field(description="null at the batch axis and nowhere else")
    batch_axis: int = Field(ge=0)
    initial: str | None = Field(
        default=None,
        description="base64 of the initial value, row-major, little-endian, without the batch axis; null for zeros",
    )

    @model_validator(mode="after")
    def _only_the_batch_is_free(self) -> StateSpec:
        free = [axis for axis, size in enumerate(self.shape) if size is None]
        if free != [self.batch_axis]:
            raise ValueError(f"state {self.name!r}: shape {self.shape} must be null at axis {self.batch_axis} alone")
        return self

    absent: tuple[int, ...] = Field(
        default=(), description="the batch axis, where the graph itself lacks it because a run takes one row"
    )

    @cached_property
    def tail(self) -> tuple[int, ...]:
        """The sizes of the axes other than the batch, in order."""
        return tuple(size for size in self.shape if size is not None)


class ConstantSpec(_Part):
    """An input of the graph that gets the same value in every run, a sample rate say."""

    name: str
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=0)], ...] = ()
    value: str = Field(description="base64 of the value, row-major, little-endian")


class ParityRow(_Part):
    """One line of the verification: the largest difference seen in one kind of case."""

    case: str = Field(description='what was compared, e.g. "random, ragged" or "whole against chunked"')
    batch: int
    steps: int
    outputs: float = Field(description="largest error over the outputs")
    states: float = Field(description="largest error over the final states")
    bound: float = Field(description="what both must stay under")

    @property
    def within(self) -> bool:
        """Whether both are numbers and stayed within a bound that is one."""
        return all(error <= self.bound < float("inf") for error in (self.outputs, self.states))


class Parity(_Part):
    """The verification that export ran before it wrote the file."""

    reference: str = Field(description='what the graph was held against, e.g. "NumPy float64"')
    provider: str = Field(description="the onnxruntime execution provider that ran the graph")
    rows: tuple[ParityRow, ...]

    @property
    def max_error(self) -> float:
        """The largest error seen; 0 where nothing was compared."""
        return max((max(row.outputs, row.states) for row in self.rows), default=0.0)


class LayerSpec(_Part):
    """One recurrent layer, for people and for placement on a device; the server does not need it to run the graph."""

    cell: str
    input_size: int
    hidden_size: int
    bidirectional: bool = False
    peepholes: bool = False
    reset: Literal["before", "after"] = "before"
    activation: str = "tanh"
    lowering: Literal["operator", "scan"] = "operator"


class Manifest(_Part):
    """Everything that the server needs to know of a model file."""

    format: Literal[1] = 1
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    lengths: str | None = Field(
        default=None, description="the graph's input for the rows' lengths, [N]; null if it has none"
    )
    lengths_dtype: Literal["int32", "int64"] = "int32"
    constants: tuple[ConstantSpec, ...] = ()
    rows_per_run: Literal[1] | None = Field(
        default=None, description="1 where a run takes one row; null for any number"
    )
    steps_per_run: Literal[1] | None = Field(
        default=None, description="1 where a run takes one step, as a graph without a time axis does; null for any"
    )
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    states: tuple[StateSpec, ...]
    streamable: bool = Field(description="whether whole and chunked runs agree: no layer reads backward")
    layers: tuple[LayerSpec, ...] = ()
    head_on: Literal["every", "last"] = "every"
    precision: Precision = "float32"
    weights_digest: str | None = Field(
        default=None,
        description="sha256 over the names, shapes and values of the weights, as the exporter reads them from the file",
    )
    parity: Parity | None = None
    made_with: dict[str, str] = Field(default_factory=dict, description="versions of the libraries that wrote the file")

    @model_validator(mode="after")
    def _names_differ(self) -> Manifest:
        graph_inputs = [
            *(x.name for x in self.inputs),
            *([self.lengths] if self.lengths else []),
            *(constant.name for constant in self.constants),
            *(s.input for s in self.states),
        ]
        outputs = [y.name for y in self.outputs]
        states = [state.name for state in self.states]
        for kind, names in (
            ("graph input", graph_inputs),
            ("output", outputs),
            # What a state has become may be served as an output too: the new h of a bare cell, say.
            ("a state's output", [state.output for state in self.states]),
            ("state", states),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind} {twice[0]!r} stands twice")
        # By its own input's name a state may go: nothing else comes under it.
        others = {*outputs, *graph_inputs} - ({state.input for state in self.states} - {*outputs})
        if taken := sorted(others.intersection(states)):
            raise ValueError(f"a state is called {taken[0]!r}, and so is an input or output; expected another name")
        if reserved := sorted(RESERVED.intersection([*graph_inputs, *outputs, *states])):
            raise ValueError(f"a tensor is called {reserved[0]!r}, which means something else in requests")
        return self

    @property
    def step_bytes(self) -> int:
        """Bytes of one step of one row's inputs; a size that is free counts as 1."""
        return sum(math.prod(size or 1 for size in x.tail) * _ITEM_BYTES[x.dtype] for x in self.inputs)

    @property
    def state_bytes(self) -> int:
        """Bytes of one row's states."""
        return sum(math.prod(state.tail) * _ITEM_BYTES[state.dtype] for state in self.states)

    def reply_bytes(self, steps: int, states: bool = False) -> int:
        """Bytes of one row's outputs, and of its states where asked; a size that is free counts as 1."""
        every, once, of_states = self._reply_parts
        return steps * every + once + (of_states if states else 0)

    @cached_property
    def _reply_parts(self) -> tuple[int, int, int]:
        """Bytes of a row's outputs at every step, of those that come once, and of its states."""
        every = sum(_bytes(y.tail, y.dtype) for y in self.outputs if y.time_axis is not None)
        once = sum(_bytes(y.tail, y.dtype) for y in self.outputs if y.time_axis is None)
        return every, once, sum(_bytes(state.tail, state.dtype) for state in self.states)


def _bytes(shape: tuple[int | None, ...], dtype: DType) -> int:
    return math.prod(size or 1 for size in shape) * _ITEM_BYTES[dtype]
