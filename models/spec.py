"""The shape of a recurrent model, in words alone: which cells, how large, what stands before and after them.

Owns the vocabulary that the reference, the fused modules, the weight layouts and the exporter share. Imports nothing
but the standard library, so that each of them can be read without the others.

Canonical weights. A layer's weights are a dict of arrays in the *fused* layout, gates stacked along the first axis:

====================  =================  ==========================================================================
cell                  gates, in order    arrays
====================  =================  ==========================================================================
``rnn``               h                  ``W_x[H, I]  W_h[H, H]  b[H]``
``lstm``              i f c o            ``W_x[4H, I] W_h[4H, H] b[4H]``
``lstm_peephole``     i f c o            the same, and ``V[3H]`` for i, f, o
``lstm_coupled``      f c o              ``W_x[3H, I] W_h[3H, H] b[3H]``, and ``V[2H]`` for f, o with peepholes
``gru``               r z h              ``W_x[3H, I] W_h[3H, H] b[3H]``; ``b_h[H]`` inside the reset with reset after
====================  =================  ==========================================================================

Products are ``W_x @ x`` for a column x, so ``x @ W_x.T`` for rows. Without bias there is no ``b`` and no ``b_h``. A
model's weights are one flat dict: ``layers.0.W_x`` for forward, ``layers.0.reverse.W_x`` for the backward direction,
``layers.0.h0[H]`` and ``layers.0.c0[H]`` for a learned initial state (``layers.0.reverse.h0`` likewise),
``embedding[V, E]``, ``head.W[O, F]`` and ``head.b[O]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cell = Literal["rnn", "lstm", "lstm_peephole", "lstm_coupled", "gru"]
Activation = Literal["tanh", "relu"]

GATES: dict[str, tuple[str, ...]] = {
    "rnn": ("h",),
    "lstm": ("i", "f", "c", "o"),
    "lstm_peephole": ("i", "f", "c", "o"),
    "lstm_coupled": ("f", "c", "o"),
    "gru": ("r", "z", "h"),
}
"""The gates of each cell, in the order in which the fused layout stacks them."""

PEEPHOLES: dict[str, tuple[str, ...]] = {"lstm_peephole": ("i", "f", "o"), "lstm_coupled": ("f", "o")}
"""The gates that see the cell state, in the order in which ``V`` stacks them."""

PREFIXES = ("", "reverse.")
"""What stands before a weight's name, forward direction first."""


@dataclass(frozen=True)
class Layer:
    """One recurrent layer.

    Attributes:
        cell: which equation.
        input_size: I, the width of what goes in.
        hidden_size: H, the width of the state of one direction.
        bidirectional: a second set of weights reads the sequence backward; the output is 2H wide, forward first.
        peepholes: for ``lstm_coupled`` only (``lstm_peephole`` always has them).
        reset: for ``gru`` only: the reset gate is applied before or after the recurrent product.
        activation: of the candidate; for ``rnn`` of the state.
        bias: whether the layer has bias terms; without, they are zeros.
        learned_initial_state: whether the initial state is a weight; otherwise zeros.
    """

    cell: Cell
    input_size: int
    hidden_size: int
    bidirectional: bool = False
    peepholes: bool = False
    reset: Literal["before", "after"] = "before"
    activation: Activation = "tanh"
    bias: bool = True
    learned_initial_state: bool = False

    def __post_init__(self) -> None:
        if self.cell not in GATES:
            raise ValueError(f"unknown cell {self.cell!r}; expected one of {', '.join(GATES)}")
        if self.input_size < 1 or self.hidden_size < 1:
            raise ValueError(
                f"sizes must be positive, got input_size={self.input_size}, hidden_size={self.hidden_size}"
            )
        if self.peepholes and self.cell not in PEEPHOLES:
            raise ValueError(f"cell {self.cell!r} has no form with peepholes")
        if self.reset not in ("before", "after") or (self.reset == "after" and self.cell != "gru"):
            raise ValueError(f"reset={self.reset!r} does not go with cell {self.cell!r}; 'after' is for gru alone")
        if self.activation not in ("tanh", "relu"):
            raise ValueError(f"unknown activation {self.activation!r}; expected tanh or relu")

    @property
    def directions(self) -> int:
        """1, or 2 where the layer is bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Width of what comes out, both directions side by side."""
        return self.directions * self.hidden_size

    @property
    def has_peepholes(self) -> bool:
        """Whether gates see the cell state."""
        return self.cell == "lstm_peephole" or self.peepholes

    @property
    def has_cell_state(self) -> bool:
        """Whether the state is (h, c) and not h alone."""
        return self.cell.startswith("lstm")

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the layer and its shape, the backward direction's under ``reverse.``."""
        rows, H = len(GATES[self.cell]) * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"W_x": (rows, self.input_size), "W_h": (rows, H)}
        if self.bias:
            shapes["b"] = (rows,)
        if self.bias and self.reset == "after":
            shapes["b_h"] = (H,)
        if self.has_peepholes:
            shapes["V"] = (len(PEEPHOLES[self.cell]) * H,)
        if self.learned_initial_state:
            shapes |= {"h0": (H,), "c0": (H,)} if self.has_cell_state else {"h0": (H,)}
        return {prefix + name: shape for prefix in PREFIXES[: self.directions] for name, shape in shapes.items()}


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: optional embedding, a stack of layers, optional head.

    Attributes:
        layers: bottom first; each layer's input_size is the output_size of the one below (or of the embedding).
        vocabulary_size: number of token ids where the input is tokens; None where the input is vectors.
        head_size: O, the width of the linear head's output; None for no head (the output is the top layer's h).
        head_on: the head (or the plain output) on every step, or on the last valid one.
    """

    layers: tuple[Layer, ...]
    vocabulary_size: int | None = None
    head_size: int | None = None
    head_on: Literal["every", "last"] = "every"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a model needs at least one layer")
        for name, size in (("vocabulary_size", self.vocabulary_size), ("head_size", self.head_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, or None where there is none; got {size}")
        if self.head_on not in ("every", "last"):
            raise ValueError(f"unknown head_on {self.head_on!r}; expected every or last")
        for below, above in zip(self.layers, self.layers[1:], strict=False):
            if above.input_size != below.output_size:
                raise ValueError(f"a layer takes {above.input_size} values, the one below gives {below.output_size}")

    @property
    def output_size(self) -> int:
        """Width of the model's output."""
        return self.head_size or self.layers[-1].output_size

    @property
    def streamable(self) -> bool:
        """Whether the model can run step by step: no layer reads backward."""
        return not any(layer.bidirectional for layer in self.layers)

    @property
    def uniform(self) -> bool:
        """Whether the layers' states have one shape and kind, so that they stack to [L * directions, N, H]."""
        first = self.layers[0]
        return all(
            (layer.hidden_size, layer.directions, layer.has_cell_state)
            == (first.hidden_size, first.directions, first.has_cell_state)
            for layer in self.layers
        )

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model, under its full name, and its shape."""
        shapes = {
            f"layers.{index}.{name}": shape
            for index, layer in enumerate(self.layers)
            for name, shape in layer.weight_shapes.items()
        }
        if self.vocabulary_size is not None:
            shapes["embedding"] = (self.vocabulary_size, self.layers[0].input_size)
        if self.head_size is not None:
            shapes |= {"head.W": (self.head_size, self.layers[-1].output_size), "head.b": (self.head_size,)}
        return shapes
