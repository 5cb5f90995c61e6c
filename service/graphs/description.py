"""model.yaml: what an operator says of a model that does not say it itself, beside the model's versions.

Owns the form of the file and its reading; what it says is held against the graph elsewhere. Must not know onnx,
onnxruntime or grpc. Axes and names are the graph's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, ValidationInfo, field_validator, model_validator

from service.errors import LoadError
from service.graphs.yaml_file import MAX_BYTES, Section, parse_yaml
from service.manifest import Precision

NAME = "model.yaml"
"""The file's name: DIR/NAME/model.yaml."""

_SHOWN = 500
"""How much of a line an error shows."""

UNDECIDED = re.compile(r"^ *# decide: (.*)$", re.MULTILINE)
"""A comment that whoever proposes a file leaves where somebody has to decide, and to delete it."""

Axis = Annotated[int, Field(ge=0, strict=True)]
Shape = tuple[Annotated[int, Field(ge=1, strict=True)] | None, ...]
"""Sizes of the graph's axes; null where any will do."""
Name = Annotated[str, Field(coerce_numbers_to_str=True)]
"""The name of a tensor; some exporters number them."""


class InputDescription(Section):
    """One input of the graph.

    Attributes:
        role: sequence: comes with every call. lengths: how many steps of each row are valid. constant: the same in
            every run.
        time_axis: null if the graph has none: a run takes one step then.
        batch_axis: null if the graph has none: a run takes one row then.
        below: of integers: each is at least 0 and below this.
        shape: sizes that the graph leaves open.
        value: of a constant: a number, a bool, or nested lists of them.
        file: of a constant: a .npy file with its value, beside model.yaml.
    """

    role: Literal["sequence", "lengths", "constant"] = "sequence"
    time_axis: Axis | None = None
    batch_axis: Axis | None = None
    below: Annotated[int, Field(ge=1, strict=True)] | None = None
    shape: Shape | None = None
    value: Any = None
    file: str | None = None

    @model_validator(mode="after")
    def _only_what_its_role_has(self) -> InputDescription:
        allowed = {
            "sequence": {"role", "time_axis", "batch_axis", "below", "shape"},
            "lengths": {"role"},
            "constant": {"role", "value", "file"},
        }[self.role]
        if foreign := sorted(self.model_fields_set - allowed):
            raise ValueError(f"an input of role {self.role} has no {foreign[0]}")
        if self.role == "constant" and (self.value is None) == (self.file is None):
            found = "neither" if self.value is None else "both"
            raise ValueError(f"a constant has either a value or a file, got {found}")
        return self


class Initial(Section):
    """A state's initial value: zeros where neither is given.

    Attributes:
        file: a .npy file beside model.yaml; without the batch axis, or with one of size 1.
        initializer: the name of one in the graph.
    """

    file: str | None = None
    initializer: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _zeros(cls, given: Any) -> Any:
        if given == "zeros" or isinstance(given, Initial):
            return {} if given == "zeros" else given
        if isinstance(given, dict) and len(given) <= 1:
            return given
        raise ValueError("expected zeros, {file: NAME.npy} or {initializer: NAME}")


class StateDescription(Section):
    """A state that one run hands to the next.

    Attributes:
        input: the graph's input for it.
        output: the graph's output for it.
        name: on the wire; the input's by default.
        batch_axis: null if the graph has none: a run takes one row then.
        shape: sizes that the graph leaves open.
        initial: what a sequence begins with; by default zeros, or what the graph gives its input where nobody does.
    """

    input: Name
    output: Name
    name: Name | None = None
    batch_axis: Axis | None = None
    shape: Shape | None = None
    initial: Initial = Initial()


class OutputDescription(Section):
    """One output of the graph that is served.

    Attributes:
        time_axis: null if the graph has none: it holds the last step's value, or that of the run's one step.
        batch_axis: null if the graph has none: a run gives one row then.
        shape: sizes that the graph leaves open.
    """

    time_axis: Axis | None = None
    batch_axis: Axis | None = None
    shape: Shape | None = None


class Versions(Section):
    """Which versions to serve: ``{latest: N}``, or a list of numbers.

    Attributes:
        latest: the newest, this many; null where they are listed.
        listed: these; none where the newest are served.
    """

    latest: Annotated[int, Field(ge=1, strict=True)] | None = None
    listed: tuple[Annotated[int, Field(ge=1, strict=True)], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _either(cls, given: Any) -> Any:
        if isinstance(given, list) and given:
            return {"listed": given}
        if isinstance(given, Versions) or (isinstance(given, dict) and given.keys() == {"latest"}):
            return given
        raise ValueError("expected {latest: N} or a list of version numbers")


class Description(Section):
    """All that a model.yaml can say.

    Attributes:
        inputs: every input of the graph but those of states.
        states: what one run hands to the next.
        outputs: what is served; the graph's other outputs are not.
        strict: refuse what would otherwise be served with a warning.
        streamable: whether chunks of a sequence give what the whole gives; false for graphs that read both ways.
        row_by_row: run the graph on one row at a time, although it takes several.
        tolerance: largest difference that the audit lets pass, as a share where values are beyond 1.
        versions: which to serve; null for what the server's settings say.
        precision: of the file to serve, of those that a version has; null for that of its model.onnx.
        device: that runs it. This and what follows: null for what the server's settings say.
        fallback: what to do where CUDA was asked for and does not run it.
        tf32: whether CUDA may multiply in TF32.
        threads: inside one run.
        max_tick_rows: most rows in one run.
        short_tick_ms: milliseconds that a run should take while many single steps come, or any chunks beside batches.
        long_tick_ms: the same otherwise.
        max_queue_delay_us: microseconds that rows may wait for others to fill their tick.
    """

    inputs: dict[str, InputDescription] = Field(default_factory=dict)
    states: tuple[StateDescription, ...] = ()
    outputs: dict[str, OutputDescription] = Field(default_factory=dict)
    strict: StrictBool = False
    streamable: StrictBool = True
    row_by_row: StrictBool = False
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    versions: Versions | None = None
    precision: Precision | None = None
    device: Literal["auto", "cpu", "cuda"] | None = None
    fallback: Literal["refuse", "allow"] | None = None
    tf32: bool | None = None
    threads: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = None
    max_tick_rows: Annotated[int, Field(ge=1, le=65_536, strict=True)] | None = None
    short_tick_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    long_tick_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_queue_delay_us: Annotated[int, Field(ge=0, strict=True)] | None = None

    @property
    def of_graph(self) -> bool:
        """Whether it describes a graph, rather than only how one is to be served."""
        return bool(self.model_fields_set & {"inputs", "states", "outputs", "streamable"})

    @property
    def speed(self) -> tuple[float | None, ...]:
        """What of it changes how fast the model is run, and nothing else."""
        return self.threads, self.max_tick_rows, self.short_tick_ms, self.long_tick_ms, self.max_queue_delay_us

    @field_validator("inputs", "states", "outputs", mode="before")
    @classmethod
    def _not_empty(cls, given: Any, info: ValidationInfo) -> Any:
        if given is None:
            one = str(info.field_name).removesuffix("s")
            raise ValueError(f"is empty; uncomment or write one line for each {one}, or delete the key")
        return given

    @model_validator(mode="after")
    def _whole(self) -> Description:
        roles = [described.role for described in self.inputs.values()]
        if self.of_graph and not ("sequence" in roles and self.outputs):
            raise ValueError("expected at least one input of role sequence, and one output")
        if roles.count("lengths") > 1:
            raise ValueError("expected at most one input of role lengths")
        return self


def read(model_folder: Path) -> Description | None:
    """Read a model's description.

    Args:
        model_folder: DIR/NAME.

    Returns:
        None where there is none.

    Raises:
        LoadError: if it cannot be read, or says what it must not; the text names the place in the file.
    """
    path = model_folder / NAME
    try:
        # Opening a pipe waits until somebody writes.
        if path.exists() and not path.is_file():
            raise LoadError(f"cannot read {NAME}: it is no file")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LoadError(f"cannot read {NAME}: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise LoadError(f"{NAME} is larger than {MAX_BYTES} bytes")
    return parse(text)


def parse(text: bytes | str) -> Description:
    """Read the text of a model.yaml.

    Raises:
        LoadError: as for ``read``.
    """
    shown = text.decode(errors="replace") if isinstance(text, bytes) else text
    if (left := UNDECIDED.search(shown)) is not None:
        line = shown.count("\n", 0, left.start()) + 1
        what = "".join(letter for letter in left[1][:_SHOWN] if letter.isprintable())
        raise LoadError(f"{NAME}, line {line}, is to be decided, and then deleted: {what}")
    try:
        return parse_yaml(Description, text)
    except ValueError as error:
        raise LoadError(f"{NAME} is not valid: {error}") from error
