"""The manifest of a graph that has none inside: what its description says, held against what the graph is.

Owns how a graph's own axes are presented: every sequence gets a batch and a time axis, every state a batch axis, also
where a run takes one row or one step and the graph lacks them. An axis that the graph lacks is put in front: batch
first, time behind it. Must not know onnx, onnxruntime or grpc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from service.errors import LoadError
from service.graphs.description import NAME, Description, InputDescription, OutputDescription, Shape, StateDescription
from service.graphs.graph import Port, Signature
from service.manifest import ConstantSpec, DType, Manifest, Precision, StateSpec
from service.values import from_file, from_yaml, to_text

Array = NDArray[np.generic]
Initializer = Callable[[str], Array | None]
"""Gives the value of an initializer of the graph; None where there is none of that name."""

DTYPES: tuple[str, ...] = get_args(DType)


def present(
    description: Description,
    signature: Signature,
    folder: Path,
    initializer: Initializer,
    precision: Precision = "float32",
) -> Manifest:
    """Return the manifest that a graph would have.

    Args:
        description: of the graph.
        signature: the graph's inputs and outputs.
        folder: DIR/NAME, where files that the description names stand.
        initializer: gives the graph's own values.
        precision: in which the graph computes; that of its inputs is told from them.

    Raises:
        LoadError: where description and graph disagree, or the graph cannot be served; the text names the place.
    """
    try:
        return _Presenter(description, signature, folder, initializer, precision).manifest()
    except ValidationError as error:
        wrong = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise LoadError(f"{NAME}: {wrong}") from error


@dataclass(slots=True)
class _Tensor:
    """One tensor of the graph with its axes: those that the description names, with their sizes in the graph."""

    where: str
    name: str
    dtype: str
    shape: tuple[int | None, ...]
    batch_axis: int | None
    time_axis: int | None = None

    def size(self, axis: int | None) -> int | None:
        """The size of an axis; 1 of one that the graph lacks; None for any."""
        return 1 if axis is None else self.shape[axis]

    def presented(self, with_time: bool) -> dict[str, object]:
        """The fields that a spec says of its axes."""
        shape, batch, time = list(self.shape), self.batch_axis, self.time_axis
        absent = []
        for axis in (batch, time):
            if axis is not None:
                shape[axis] = None
        if batch is None:
            shape.insert(0, None)
            batch, time = 0, None if time is None else time + 1
            absent.append(0)
        if time is None and with_time:
            time = batch + 1
            shape.insert(time, None)
            absent.append(time)
        axes: dict[str, object] = {"shape": tuple(shape), "batch_axis": batch, "absent": tuple(absent)}
        return axes if time is None else axes | {"time_axis": time}


class _Presenter:
    def __init__(
        self,
        description: Description,
        signature: Signature,
        folder: Path,
        initializer: Initializer,
        precision: Precision,
    ) -> None:
        self._folder = folder
        self._precision = precision
        self._initializer = initializer
        self._description = description
        self._signature = signature
        self._takes = inputs = {**signature.optional, **signature.inputs}
        self._check_names()
        outputs = signature.outputs
        self._inputs = [
            _tensor(f"inputs.{name}", name, inputs[name], one)
            for name, one in description.inputs.items()
            if one.role == "sequence"
        ]
        self._outputs = [
            _tensor(f"outputs.{name}", name, outputs[name], one) for name, one in description.outputs.items()
        ]
        self._states = [
            _tensor(f"states[{index}]", one.input, inputs[one.input], one)
            for index, one in enumerate(description.states)
        ]

    def manifest(self) -> Manifest:
        lengths, lengths_port = self._lengths()
        rows, steps = self._rows_per_run(lengths_port), self._steps_per_run()
        self._check_free_axes(steps is not None)
        described = self._description.inputs
        return Manifest.model_validate(
            {
                "inputs": [
                    {"name": x.name, "dtype": x.dtype, "below": described[x.name].below, **x.presented(True)}
                    for x in self._inputs
                ],
                "lengths": lengths,
                "lengths_dtype": "int32" if lengths_port is None else lengths_port.dtype,
                "constants": [self._constant(name) for name, one in described.items() if one.role == "constant"],
                "rows_per_run": rows,
                "steps_per_run": steps,
                "outputs": [
                    {"name": y.name, "dtype": y.dtype, **y.presented(steps is not None)} for y in self._outputs
                ],
                "states": [
                    self._state(tensor, one) for tensor, one in zip(self._states, self._description.states, strict=True)
                ],
                "streamable": self._description.streamable,
                "precision": "float16"
                if self._precision == "float32" and any(x.dtype == "float16" for x in self._inputs)
                else self._precision,
            }
        )

    def _check_names(self) -> None:
        graph, description = self._signature, self._description
        for where, name, there, kind in [
            *((f"inputs.{name}", name, self._takes, "input") for name in description.inputs),
            *((f"states[{i}].input", one.input, self._takes, "input") for i, one in enumerate(description.states)),
            *((f"states[{i}].output", one.output, graph.outputs, "output") for i, one in enumerate(description.states)),
            *((f"outputs.{name}", name, graph.outputs, "output") for name in description.outputs),
        ]:
            if name not in there:
                raise _wrong(where, f"the graph has no {kind} {name!r}; it has {', '.join(sorted(there))}")
        carried = {one.input for one in description.states}
        for name in sorted(carried & description.inputs.keys()):
            raise _wrong(f"inputs.{name}", f"{name!r} is the input of a state too; expected one of them")
        known = description.inputs.keys() | carried
        if left := sorted(graph.inputs.keys() - known):
            raise LoadError(f"{NAME} says nothing of the graph's input {', '.join(map(repr, left))}")

    def _rows_per_run(self, lengths: Port | None) -> int | None:
        going_in = [tensor.size(tensor.batch_axis) for tensor in (*self._inputs, *self._states)]
        going_in += [] if lengths is None else [lengths.shape[0]]
        # Exporters write their example's sizes into outputs although a run gives others; each run's are checked.
        told = self._outputs if any(going_in) else []
        for tensor in (*self._inputs, *self._states, *told):
            size, axis = tensor.size(tensor.batch_axis), tensor.batch_axis
            if size is not None and size > 1:
                free = [other for other, any_size in enumerate(tensor.shape) if any_size is None]
                free = [other for other in free if other != tensor.time_axis]
                raise _wrong(
                    f"{tensor.where}.batch_axis",
                    f"axis {axis} of {tensor.name!r}, of shape {_show(tensor.shape)}, is {size}; axis {free[0]} takes "
                    f"any size: batch_axis: {free[0]}?"
                    if free
                    else f"the graph has a batch of {size} baked into {tensor.name!r}; export it with a batch axis "
                    "that takes any size, or 1",
                )
        for y in self._outputs:
            if y.batch_axis is None and not any(going_in):
                raise _wrong(y.where, "batch_axis is left out, although what goes into the graph has a batch")
        return 1 if any(going_in) else None

    def _steps_per_run(self) -> int | None:
        told = self._outputs if any(x.size(x.time_axis) for x in self._inputs) else []
        for tensor in (*self._inputs, *told):
            size = tensor.size(tensor.time_axis)
            if size is not None and size > 1:
                raise _wrong(
                    f"{tensor.where}.time_axis",
                    f"{tensor.name!r} takes exactly {size} steps; leave time_axis out, so that one step holds all of "
                    "them, or export the model with a time axis that takes any size",
                )
        sizes = {x.name: x.size(x.time_axis) for x in self._inputs}
        if len(set(sizes.values())) > 1:
            free = [name for name, size in sizes.items() if size is None]
            raise LoadError(f"{NAME}: {free} have a time axis and the other inputs have none; expected all, or none")
        steps = next(iter(sizes.values()))
        for y in self._outputs:
            if steps is None and y.time_axis is not None and y.size(y.time_axis) == 1:
                raise _wrong(
                    f"{y.where}.time_axis",
                    f"{y.name!r} has one step, the inputs have any number; leave time_axis out if it is the last",
                )
        return steps

    def _check_free_axes(self, by_step: bool) -> None:
        """Refuse axes of any size that nobody has named: most often a batch or time axis was left out."""
        shapes = {f"inputs.{name}": one.shape for name, one in self._description.inputs.items()}
        shapes |= {f"outputs.{name}": one.shape for name, one in self._description.outputs.items()}
        with_all_named = [y for y in self._outputs if not by_step and y.time_axis is None]
        for tensor in (*self._inputs, *with_all_named, *self._states):
            for axis, size in enumerate(tensor.shape):
                if size is None and axis not in (tensor.batch_axis, tensor.time_axis) and not shapes.get(tensor.where):
                    raise _wrong(
                        tensor.where,
                        f"axis {axis} of {tensor.name!r}, of shape {_show(tensor.shape)}, takes any size and is "
                        "neither batch nor time; name it as one of these, or give the sizes, as in shape: [null, 512]",
                    )

    def _lengths(self) -> tuple[str | None, Port | None]:
        name = next((name for name, one in self._description.inputs.items() if one.role == "lengths"), None)
        if name is None:
            return None, None
        port = self._takes[name]
        if port.dtype not in ("int32", "int64") or len(port.shape) != 1 or (port.shape[0] or 1) > 1:
            raise _wrong(
                f"inputs.{name}",
                f"{name!r} is {port.dtype}{_show(port.shape)}; lengths are int32 or int64, one a row: [any]",
            )
        return name, port

    def _constant(self, name: str) -> ConstantSpec:
        one, port = self._description.inputs[name], self._takes[name]
        where = f"inputs.{name}"
        dtype = _dtype(where, name, port)
        if one.file is not None:
            value = self._load(f"{where}.file", one.file, dtype)
        else:
            try:
                value = from_yaml(one.value, dtype)
            except ValueError as error:
                raise _wrong(f"{where}.value", str(error)) from error
            if value.ndim == 0 and all(size == 1 for size in port.shape):
                value = value.reshape([1] * len(port.shape))
        if len(value.shape) != len(port.shape) or any(
            want not in (None, have) for want, have in zip(port.shape, value.shape, strict=True)
        ):
            raise _wrong(where, f"the value has shape {_show(value.shape)}, the graph takes {_show(port.shape)}")
        return ConstantSpec.model_validate(
            {"name": name, "dtype": dtype, "shape": value.shape, "value": to_text(value)}
        )

    def _state(self, tensor: _Tensor, one: StateDescription) -> StateSpec:
        out = self._signature.outputs[one.output]
        if out.dtype != tensor.dtype or (out.shape and not _fit(out.shape, tensor.shape, tensor.batch_axis)):
            raise _wrong(
                tensor.where,
                f"input {one.input!r} is {tensor.dtype}{_show(tensor.shape)} and output {one.output!r} is "
                f"{out.dtype}{_show(out.shape)}; they must be alike",
            )
        return StateSpec.model_validate(
            {
                "name": one.name or one.input,
                "input": one.input,
                "output": one.output,
                "dtype": tensor.dtype,
                "initial": self._initial(tensor, one),
                **tensor.presented(False),
            }
        )

    def _initial(self, tensor: _Tensor, one: StateDescription) -> str | None:
        where = f"{tensor.where}.initial"
        if one.initial.file is not None:
            value = self._load(f"{where}.file", one.initial.file, tensor.dtype)
        elif (initializer := self._initial_initializer(one)) is not None:
            found = self._initializer(initializer)
            if found is None:
                raise _wrong(where, f"the graph has no initializer {initializer!r}")
            value = found
        else:
            return None
        whole = [1 if axis == tensor.batch_axis else size for axis, size in enumerate(tensor.shape)]
        without = [size for axis, size in enumerate(tensor.shape) if axis != tensor.batch_axis]
        if value.dtype.name != tensor.dtype or list(value.shape) not in (whole, without):
            raise _wrong(
                where,
                f"the value is {value.dtype.name}{_show(value.shape)}; expected {tensor.dtype}{_show(without)}, "
                "that of one row",
            )
        return to_text(value)

    def _initial_initializer(self, one: StateDescription) -> str | None:
        """The initializer that a sequence begins with: the one that is named, or what the state's input has itself."""
        own = one.input in self._signature.optional and "initial" not in one.model_fields_set
        return one.input if own else one.initial.initializer

    def _load(self, where: str, name: str, dtype: str) -> Array:
        try:
            return from_file(self._folder, name, dtype)
        except ValueError as error:
            raise _wrong(where, str(error)) from error


def _tensor(
    where: str, name: str, port: Port, described: InputDescription | OutputDescription | StateDescription
) -> _Tensor:
    dtype = _dtype(where, name, port)
    batch, time = described.batch_axis, None if isinstance(described, StateDescription) else described.time_axis
    shape = _sized(where, name, port.shape, described.shape)
    for key, axis in (("batch_axis", batch), ("time_axis", time)):
        if axis is not None and axis >= len(shape):
            unsaid = "" if port.shape else "; if the graph leaves it unsaid, give it, as in shape: [null, null, 512]"
            raise _wrong(f"{where}.{key}", f"{name!r} has no axis {axis}: its shape is {_show(shape)}{unsaid}")
    if batch is not None and batch == time:
        raise _wrong(where, f"axis {batch} cannot be both batch and time")
    if isinstance(described, InputDescription) and described.below is not None and not dtype.startswith("int"):
        raise _wrong(f"{where}.below", f"{name!r} is {dtype}; only integers have a bound")
    return _Tensor(where, name, dtype, shape, batch, time)


def _sized(where: str, name: str, shape: Shape, described: Shape | None) -> Shape:
    if described is None:
        return shape
    # Of an output whose axes the file does not say, the description has the only word.
    if shape and not _fit(shape, described):
        raise _wrong(f"{where}.shape", f"{_show(described)} is said, the graph has {_show(shape)} for {name!r}")
    if not shape:
        return described
    return tuple(theirs if ours is None else ours for ours, theirs in zip(shape, described, strict=True))


def _fit(shape: Shape, other: Shape, but: int | None = None) -> bool:
    """Whether both can be sizes of one tensor, whatever stands at the axis that is left out."""
    return len(shape) == len(other) and all(
        axis == but or a is None or b is None or a == b for axis, (a, b) in enumerate(zip(shape, other, strict=True))
    )


def _dtype(where: str, name: str, port: Port) -> str:
    if port.dtype not in DTYPES:
        raise _wrong(where, f"{name!r} is {port.dtype}; served are {', '.join(DTYPES)}")
    return port.dtype


def _show(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _wrong(where: str, what: str) -> LoadError:
    return LoadError(f"{NAME}: {where}: {what}")
