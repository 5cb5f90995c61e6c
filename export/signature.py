"""The graph's inputs and outputs for states: their names, and which states of the model stand in each.

Owns the one place where the model's list of states meets the graph's tensors. Must not know torch or ONNX.

A model whose layers' states have one shape (``ModelSpec.uniform``) has one tensor ``[L * directions, N, H]`` each for h
and c: ``h0`` in, ``hT`` out, ``h`` on the wire. Other models have one ``[N, H]`` for each direction of each layer, with
the layer's number counted from 1: ``h0_1``, ``h0_2_reverse``; on the wire ``h_1``, ``h_2_reverse``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.reference import State
from models.spec import ModelSpec
from models.weights import Array


@dataclass(frozen=True)
class StateTensor:
    """One state input of the graph, and the output that follows it.

    Attributes:
        name: its name on the wire.
        part: 0 for h, 1 for c.
        directions: the places in the model's list of states that stand in this tensor, in order.
        hidden_size: H.
        stacked: whether the tensor is ``[len(directions), N, H]``; otherwise it is ``[N, H]``.
    """

    name: str
    part: int
    directions: tuple[int, ...]
    hidden_size: int
    stacked: bool

    @property
    def input(self) -> str:
        """The graph's input: ``h0``, ``c0_2``."""
        return f"{self.name[0]}0{self.name[1:]}"

    @property
    def output(self) -> str:
        """The graph's output: ``hT``, ``cT_2``."""
        return f"{self.name[0]}T{self.name[1:]}"

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The tensor's shape, None for the batch."""
        free = (None, self.hidden_size)
        return (len(self.directions), *free) if self.stacked else free

    @property
    def batch_axis(self) -> int:
        """Where N stands in the shape."""
        return 1 if self.stacked else 0


def state_tensors(spec: ModelSpec) -> tuple[StateTensor, ...]:
    """The state tensors of a model's graph, in the order of its inputs."""
    if spec.uniform:
        first = spec.layers[0]
        every = tuple(range(len(spec.layers) * first.directions))
        names = ("h", "c") if first.has_cell_state else ("h",)
        return tuple(StateTensor(name, part, every, first.hidden_size, True) for part, name in enumerate(names))
    tensors: list[StateTensor] = []
    place = 0
    for number, layer in enumerate(spec.layers, start=1):
        for suffix in ("", "_reverse")[: layer.directions]:
            for part, name in enumerate(("h", "c") if layer.has_cell_state else ("h",)):
                tensors.append(StateTensor(f"{name}_{number}{suffix}", part, (place,), layer.hidden_size, False))
            place += 1
    return tuple(tensors)


def pack_states(tensors: Sequence[StateTensor], states: Sequence[State]) -> list[Array]:
    """The graph's state tensors from the model's list of states."""
    packed = []
    for tensor in tensors:
        parts = [states[place][tensor.part] for place in tensor.directions]
        packed.append(np.stack(parts) if tensor.stacked else parts[0])
    return packed


def unpack_states(tensors: Sequence[StateTensor], packed: Sequence[Array]) -> list[State]:
    """The model's list of states from the graph's state tensors."""
    states: dict[int, Mapping[int, Array]] = {}
    for tensor, array in zip(tensors, packed, strict=True):
        for row, place in enumerate(tensor.directions):
            part = array[row] if tensor.stacked else array
            states[place] = {**states.get(place, {}), tensor.part: part}
    return [tuple(parts[part] for part in sorted(parts)) for _, parts in sorted(states.items())]
