"""The spec of a model whose weights come from elsewhere: which arrays of which files are the weights of what.

Owns the schema of SPEC.yaml, reading it, and telling what is wrong with it. Must not know arrays: whether the spec fits
the files is seen where they are read.
"""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as abridged
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, StrictBool, field_validator, model_validator

from export.errors import ExportError
from models.spec import GATES, Activation, Cell
from service.graphs.yaml_file import MAX_BYTES, Section, parse_yaml

Size = Annotated[int, Field(ge=1, strict=True)]

Product = Literal["x @ W", "W @ x"]
"""How a matrix stands in its product, and so which axis is the input's: ``W[in, out]``, or ``W[out, in]``."""


def _names(value: object) -> str | dict[str, str]:
    """One name, or one for each gate."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and value and all(isinstance(each, str) for pair in value.items() for each in pair):
        return value
    raise ValueError("expected the name of an array, a name with {gate} in it, or a mapping from gates to names")


Names = Annotated[str | dict[str, str], PlainValidator(_names)]
"""An array that stacks all gates; or one for each: a pattern with ``{gate}``, or a mapping."""


class Direction(Section):
    """Where the arrays of one direction are.

    Attributes:
        prefix: what stands before their names in the file.
        arrays: their names by the part they play; with a layout and a prefix they are found by the layout's names.
    """

    prefix: str | None = None
    arrays: dict[str, Names] = Field(default_factory=dict)


class Initial(Section):
    """The learned initial state: the names of its arrays, or of one for each layer and direction."""

    h: str | list[str] | None = None
    c: str | list[str] | None = None


class LayerSource(Direction):
    """One recurrent layer; or, in torch's layout, all layers of one module.

    Attributes:
        cell: which equation.
        layout: whose arrays they are; None for arrays that are all named one by one.
        product: with arrays of one's own: how their matrices stand in a product.
        gates: with arrays of one's own: the order in which an array stacks the gates.
        backward: the backward direction's arrays, where they are not found with the forward ones.
        initial: the learned initial state.
        reset: for gru: the reset gate before or after the recurrent product; needed where the arrays do not tell.
        activation: of the candidate.
        inverted_update: for gru: its update gate is ``h = u * h~ + (1 - u) * h``.
        input_size: checked where given; so are all below.
        hidden_size: H of one direction.
        bidirectional: whether there is a backward direction.
        peepholes: whether gates see the cell state.
        bias: whether there are biases.
    """

    cell: Cell
    layout: Literal["torch", "keras", "onnx", "fused", "matrices"] | None = None
    product: Product | None = None
    gates: str | None = None
    backward: Direction | None = None
    initial: Initial = Initial()
    reset: Literal["before", "after"] | None = None
    activation: Activation = "tanh"
    inverted_update: StrictBool = False
    input_size: Size | None = None
    hidden_size: Size | None = None
    bidirectional: StrictBool | None = None
    peepholes: StrictBool | None = None
    bias: StrictBool | None = None

    @field_validator("gates")
    @classmethod
    def _letters(cls, gates: str | None) -> str | None:
        return gates and "".join(gates.replace(",", " ").split())

    @model_validator(mode="after")
    def _fits_together(self) -> LayerSource:
        if self.layout is None and not self.arrays:
            raise ValueError("expected a layout and a prefix, or arrays by the part they play and how their product is")
        if self.layout is None and self.product is None:
            raise ValueError('product is missing: "x @ W" where matrices are W[in, out], "W @ x" where W[out, in]')
        if self.layout is not None and (self.product or self.gates):
            raise ValueError(f"product and gates are not to be said: layout {self.layout} fixes both")
        if self.cell != "gru" and (self.reset or self.inverted_update):
            raise ValueError(f"reset and inverted_update are for gru, the cell is {self.cell}")
        if self.gates is not None and sorted(self.gates) not in map(sorted, gate_sets(self.cell)):
            expected = " or ".join(" ".join(gates) for gates in gate_sets(self.cell))
            raise ValueError(f"gates are {abridged(self.gates)}, expected {expected} in the arrays' order")
        return self


class HeadSource(Direction):
    """The linear head.

    Attributes:
        layout: whose arrays they are: torch's ``weight[O, F]`` and ``bias``, Keras' ``kernel[F, O]`` and ``bias``; None
            for ``W`` and ``b``, named one by one.
        product: without a layout: how W stands in its product.
    """

    layout: Literal["torch", "keras"] | None = None
    product: Product | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> HeadSource:
        if (self.layout is None) != (self.product is not None and bool(self.arrays)):
            raise ValueError(
                'expected a layout and a prefix; or arrays W and b by name, and a product: "x @ W" for W[in, out], '
                '"W @ x" for W[out, in]'
            )
        if any(not isinstance(name, str) for name in self.arrays.values()):
            raise ValueError("a head has no gates: expected one name for each array")
        return self


class WeightsSpec(Section):
    """A whole model.

    Attributes:
        weights: the file or files, relative to the spec.
        layers: bottom first.
        embedding: the name of the embedding ``[V, E]``, where the input is token ids.
        head: the linear head.
        output: of every step, or of the last one alone.
        ignore: names of arrays that have no place in the model; ``*`` and ``?`` as in a shell.
    """

    weights: list[str] = Field(min_length=1, max_length=100)
    layers: list[LayerSource] = Field(min_length=1, max_length=100)
    embedding: str | None = None
    head: HeadSource | None = None
    output: Literal["every", "last"] = "every"
    ignore: list[str] = Field(default_factory=list)

    @field_validator("weights", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


def gate_sets(cell: str) -> tuple[tuple[str, ...], ...]:
    """The gates that a cell's arrays can be of: a coupled LSTM has f, and i = 1 - f; or i, and f = 1 - i."""
    if cell == "lstm_coupled":
        return GATES[cell], ("i", *GATES[cell][1:])
    return (GATES[cell],)


def read_weights_spec(path: Path) -> WeightsSpec:
    """Read a spec.

    Raises:
        ExportError: it cannot be read, or is none; the text names the place, what was wrong and what was expected.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ExportError(f"{path} is over {MAX_BYTES} bytes")
        return parse_yaml(WeightsSpec, content)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path}: {error}") from error
