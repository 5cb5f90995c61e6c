"""The axes of a graph's tensors, as far as the file and onnx's shape inference tell them.

Owns which of the two is believed. Must not know what is served, nor what follows from a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx import shape_inference

MAX_INFERRED_BYTES = 1 << 30
"""Shapes are inferred of files up to this size; the inference copies the file."""


@dataclass(frozen=True)
class Axis:
    """One axis: its size where it is fixed, else the name that the file gives it; neither where it says nothing.

    A size of an output is only claimed where nothing but the file's word for it is known. Exporters write the sizes of
    their example there, also of axes that are free.
    """

    size: int | None = None
    name: str | None = None
    claimed: bool = False

    def __str__(self) -> str:
        return str(self.size if self.size is not None else self.name or "?")


def name_axes(model: Any) -> None:
    """Give every free axis of an input a name, so that it is known where it comes out."""
    for value in model.graph.input:
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.HasField("dim_value") and not axis.dim_param:
                axis.dim_param = f"{value.name}.{number}"


def infer(model: Any) -> Any:
    """The model with the axes of its tensors, outputs too, as far as the graph tells them; None where onnx cannot.

    What the file itself says of them is left out: exporters write the sizes of their example there.
    """
    graph = model.graph
    outputs, values = (
        [type(value).FromString(value.SerializeToString()) for value in part] for part in _annotated(graph)
    )
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # onnx raises whatever it meets; without the inference less is known, and nothing is wrong
        return None
    finally:
        for part, said in zip(_annotated(graph), (outputs, values), strict=True):
            del part[:]
            part.extend(said)


def _annotated(graph: Any) -> tuple[Any, Any]:
    return graph.output, graph.value_info


def known_axes(
    graph: Any, said: Mapping[str, tuple[Axis, ...] | None], outputs_are_inferred: bool
) -> dict[str, tuple[Axis, ...]]:
    """The axes of all tensors at the top of a graph, by their names.

    Args:
        graph: an onnx GraphProto, with what was inferred.
        said: the axes of the outputs as the file has them.
        outputs_are_inferred: whether the graph's outputs have what was inferred, and not what the file says.
    """
    values = [*graph.value_info, *graph.input, *(graph.output if outputs_are_inferred else ())]
    axes = {value.name: axes_of(value) for value in values}
    # The inference makes names up for sizes that it cannot tell.
    given = {axis.name for value in graph.input for axis in axes[value.name] or ()}
    for name, known in axes.items():
        axes[name] = known and tuple(axis if axis.size or axis.name in given else Axis() for axis in known)
    axes |= {tensor.name: tuple(Axis(size) for size in tensor.dims) for tensor in graph.initializer}
    axes |= {name: _merged(axes.get(name), theirs) for name, theirs in said.items()}
    return {name: known for name, known in axes.items() if known is not None}


def _merged(known: tuple[Axis, ...] | None, said: tuple[Axis, ...] | None) -> tuple[Axis, ...] | None:
    """What is known of an output, and where nothing is, what the file says."""
    if said is None or (known is not None and len(known) != len(said)):
        return known
    known = known or tuple(Axis() for _ in said)
    return tuple(
        ours if ours != Axis() else Axis(theirs.size, theirs.name, claimed=theirs.size is not None)
        for ours, theirs in zip(known, said, strict=True)
    )


def axes_of(value: Any) -> tuple[Axis, ...] | None:
    """What an onnx ValueInfoProto says of its axes; None where it says nothing."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(
        Axis(axis.dim_value) if axis.HasField("dim_value") else Axis(name=axis.dim_param or None)
        for axis in tensor.shape.dim
    )


def shape_text(axes: tuple[Axis, ...] | None) -> str:
    """A shape in one line."""
    return "not said" if axes is None else f"[{', '.join(map(str, axes))}]"
