"""What is said of a graph against what it is: the axes that come of it, and each disagreement, named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import LoadError
from service.graphs.description import parse
from service.graphs.graph import Port, Signature
from service.graphs.presented import present
from service.manifest import Manifest
from service.states.pool import initial_value

Ports = dict[str, Port]
F = "float32"
ANY = None

INPUTS: Ports = {
    "x": Port(F, (ANY, ANY, 3)),
    "lens": Port("int64", (ANY,)),
    "sr": Port("int64", (1,)),
    "h0": Port(F, (1, ANY, 5)),
    "c0": Port(F, (1, ANY, 5)),
}
OUTPUTS: Ports = {
    "y": Port(F, (ANY, ANY, 2)),
    "last": Port(F, (ANY, 5)),
    "hT": Port(F, (1, ANY, 5)),
    "cT": Port(F, (1, ANY, 5)),
}
TEXT = """
inputs:
  x: {time_axis: 0, batch_axis: 1}
  lens: {role: lengths}
  sr: {role: constant, value: 16000}
states:
  - {input: h0, output: hT, batch_axis: 1}
  - {input: c0, output: cT, batch_axis: 1, name: c}
outputs:
  y: {time_axis: 0, batch_axis: 1}
"""


def presented(text: str, inputs: Ports = INPUTS, outputs: Ports = OUTPUTS, **initializers: NDArray[Any]) -> Manifest:
    """The manifest of a graph of that signature, described so."""
    return present(parse(text), Signature(inputs, outputs), Path("nowhere"), initializers.get)


def test_the_whole() -> None:
    """Each part in its place; an output that nobody names is not served."""
    manifest = presented(TEXT)
    assert (manifest.lengths, manifest.lengths_dtype) == ("lens", "int64")
    assert (manifest.rows_per_run, manifest.steps_per_run) == (None, None)
    (x,), (y,), (constant,) = manifest.inputs, manifest.outputs, manifest.constants
    assert (x.shape, x.time_axis, x.batch_axis, x.absent) == ((None, None, 3), 0, 1, ())
    assert (y.shape, y.time_axis, y.batch_axis, y.absent) == ((None, None, 2), 0, 1, ())
    assert (constant.dtype, constant.shape) == ("int64", (1,))
    assert [(state.name, state.shape) for state in manifest.states] == [("h0", (1, None, 5)), ("c", (1, None, 5))]
    assert manifest.streamable


def test_an_output_without_time_holds_the_last_step() -> None:
    """Where the inputs have a time axis, and it says so by leaving its own out."""
    (y,) = presented(TEXT.replace("y: {time_axis: 0, batch_axis: 1}", "last: {batch_axis: 0}")).outputs
    assert (y.name, y.shape, y.time_axis) == ("last", (None, 5), None)


@pytest.mark.parametrize(
    ("described", "shape", "presents", "batch", "time", "absent", "rows", "steps"),
    [
        ("time_axis: 0, batch_axis: 1", (ANY, ANY, 3), (ANY, ANY, 3), 1, 0, (), None, None),
        ("batch_axis: 0", (ANY, 3), (ANY, ANY, 3), 0, 1, (1,), None, 1),
        ("batch_axis: 1", (3, ANY), (3, ANY, ANY), 1, 2, (2,), None, 1),
        ("batch_axis: 0, time_axis: 1", (1, ANY, 3), (ANY, ANY, 3), 0, 1, (), 1, None),
        ("batch_axis: 0, time_axis: 1", (ANY, 1, 3), (ANY, ANY, 3), 0, 1, (), None, 1),
        ("time_axis: 0", (ANY, 3), (ANY, ANY, 3), 0, 1, (0,), 1, None),
        ("time_axis: 1", (3, ANY), (ANY, 3, ANY), 0, 2, (0,), 1, None),
        ("", (3,), (ANY, ANY, 3), 0, 1, (0, 1), 1, 1),
        ("", (), (ANY, ANY), 0, 1, (0, 1), 1, 1),
        ("batch_axis: 0, shape: [null, 512]", (ANY, ANY), (ANY, ANY, 512), 0, 1, (1,), None, 1),
        ("batch_axis: 0, shape: [1, 3]", (ANY, 3), (ANY, ANY, 3), 0, 1, (1,), 1, 1),
        ("batch_axis: 0, shape: [null, null]", (ANY, ANY), (ANY, ANY, ANY), 0, 1, (1,), None, 1),
    ],
)
def test_axes(
    described: str,
    shape: tuple[int | None, ...],
    presents: tuple[int | None, ...],
    batch: int,
    time: int,
    absent: tuple[int, ...],
    rows: int | None,
    steps: int | None,
) -> None:
    """A batch and a time axis for every sequence; those that the graph lacks stand in front, or behind the batch."""
    text = f"inputs: {{x: {{{described}}}}}\noutputs: {{y: {{{described}}}}}"
    manifest = presented(text, {"x": Port(F, shape)}, {"y": Port(F, shape)})
    assert (manifest.rows_per_run, manifest.steps_per_run) == (rows, steps)
    for spec in (*manifest.inputs, *manifest.outputs):
        assert (spec.shape, spec.batch_axis, spec.time_axis, spec.absent) == (presents, batch, time, absent)


@pytest.mark.parametrize(
    ("axis", "shape", "presents", "batch", "absent"),
    [
        (1, (2, ANY, 5), (2, ANY, 5), 1, ()),
        (0, (ANY, 5), (ANY, 5), 0, ()),
        (0, (1, 2, 5, 2), (ANY, 2, 5, 2), 0, ()),
        ("null", (2, 5), (ANY, 2, 5), 0, (0,)),
        (0, (1,), (ANY,), 0, ()),
    ],
)
def test_states(
    axis: int | str, shape: tuple[int | None, ...], presents: tuple[int | None, ...], batch: int, absent: tuple[int]
) -> None:
    """Each shape in use; a batch that is fixed at 1, or not there, makes the graph one of one row."""
    text = f"inputs: {{x: {{batch_axis: 0}}}}\noutputs: {{y: {{batch_axis: 0}}}}\nstates: [{{input: h, output: g, batch_axis: {axis}}}]"  # noqa: E501
    inputs, outputs = {"x": Port(F, (ANY, 3)), "h": Port(F, shape)}, {"y": Port(F, (ANY, 3)), "g": Port(F, shape)}
    manifest = presented(text, inputs, outputs)
    (state,) = manifest.states
    assert (state.shape, state.batch_axis, state.absent) == (presents, batch, absent)
    assert manifest.rows_per_run == (None if ANY in shape else 1)


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 5)])
def test_initial_values(shape: tuple[int, ...]) -> None:
    """With the batch axis of one row or without."""
    value = np.arange(5, dtype=np.float32).reshape(shape)
    manifest = presented(TEXT.replace("{input: h0,", "{initial: {initializer: start}, input: h0,"), start=value)
    np.testing.assert_array_equal(initial_value(manifest.states[0]), value.reshape(1, 5))
    np.testing.assert_array_equal(initial_value(manifest.states[1]), np.zeros((1, 5)))


def but(old: str, new: str) -> str:
    """The description, with something else in it."""
    assert old in TEXT
    return TEXT.replace(old, new)


H0 = "{input: h0, output: hT, batch_axis: 1}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            but("  x:", "  z: {batch_axis: 0}\n  x:"),
            r"inputs\.z: the graph has no input 'z'; it has c0, h0, lens, sr, x",
        ),
        (but("  y:", "  z:"), r"outputs\.z: the graph has no output 'z'; it has cT, hT, last, y"),
        (but("input: h0", "input: h1"), r"states\[0\]\.input: the graph has no input 'h1'"),
        (but("output: cT", "output: c1"), r"states\[1\]\.output: the graph has no output 'c1'"),
        (but("  lens: {role: lengths}\n", ""), r" says nothing of the graph's input 'lens'"),
        (
            but("  sr:", "  h0: {batch_axis: 1, time_axis: 0, shape: [null, null, 5]}\n  sr:"),
            r"inputs\.h0: 'h0' is the input of a state too",
        ),
        (but("output: cT", "output: hT"), r"a state's output 'hT' stands twice"),
        (but("name: c", "name: x"), r"a state is called 'x', and so is an input or output"),
        (but("name: c", "name: y"), r"a state is called 'y', and so is an input or output"),
        (but("name: c", "name: sequence_ids"), r"a tensor is called 'sequence_ids', which means something else"),
        (but("name: c", "name: h0"), r"state 'h0' stands twice"),
        (
            but("x: {time_axis: 0", "x: {time_axis: 3"),
            r"inputs\.x\.time_axis: 'x' has no axis 3: its shape is \[any, a",
        ),
        (but(H0, H0.replace("1}", "3}")), r"states\[0\]\.batch_axis: 'h0' has no axis 3"),
        (but("x: {time_axis: 0", "x: {time_axis: 1"), r"inputs\.x: axis 1 cannot be both batch and time"),
        (
            but("batch_axis: 1}\n  lens", "batch_axis: 2}\n  lens"),
            r"inputs\.x\.batch_axis: axis 2 of 'x', of shape \[any, any, 3\], is 3; axis 1 takes any.* batch_axis: 1\?",
        ),
        (
            but("x: {time_axis: 0", "x: {time_axis: 2"),
            r"inputs\.x\.time_axis: 'x' takes exactly 3 steps; leave time_ax",
        ),
        (but("x: {time_axis: 0, ", "x: {"), r"inputs\.x: axis 0 of 'x', of shape \[any, any, 3\], takes any size and"),
        (but("y: {time_axis: 0, ", "y: {"), r"outputs\.y: axis 0 of 'y', of shape \[any, any, 2\], takes any size and"),
        (but("y: {time_axis: 0, batch_axis: 1}", "y: {time_axis: 0}"), r"outputs\.y: batch_axis is left out, although"),
        (but(H0, "{input: h0, output: hT}"), r"states\[0\]: axis 1 of 'h0', of shape \[1, any, 5\], takes any size"),
        (
            but("x: {", "x: {shape: [null, null, 4], "),
            r"inputs\.x\.shape: \[any, any, 4\] is said, the graph has \[any,",
        ),
        (but("x: {", "x: {shape: [null], "), r"inputs\.x\.shape: \[any\] is said"),
        (but("x: {", "x: {below: 5, "), r"inputs\.x\.below: 'x' is float32; only integers have a bound"),
        (but("16000", "1.5"), r"inputs\.sr\.value: 1\.5 is given; the graph takes int64"),
        (but("16000", "[1, 2]"), r"inputs\.sr: the value has shape \[2\], the graph takes \[1\]"),
        (but("value: 16000", "file: sr.npy"), r"inputs\.sr\.file: 'sr.npy' cannot be read"),
        (
            but("lens: {role: lengths}", "lens: {batch_axis: 0}"),
            r"\['x'\] have a time axis and the other inputs have no",
        ),
        (
            but("  sr: {role: constant, value: 16000}", "  sr: {}"),
            r"\['x'\] have a time axis and the other inputs have",
        ),
        (
            but(H0, H0[:-1] + ", initial: {initializer: none}}"),
            r"states\[0\]\.initial: the graph has no initializer 'none'",
        ),
        (
            but(H0, H0[:-1] + ", initial: {initializer: wide}}"),
            r"is float64\[1, 5\]; expected float32\[1, 5\], that of",
        ),
        (but(H0, H0[:-1] + ", initial: {initializer: flat}}"), r"is float32\[5\]; expected float32\[1, 5\], that of"),
        (
            but(H0, H0[:-1] + ", initial: {file: ../h.npy}}"),
            r"states\[0\]\.initial\.file: .* outside the model's folder",
        ),
    ],
)
def test_disagreements(text: str, says: str) -> None:
    """Each is refused, with the place in the description and both sides."""
    with pytest.raises(LoadError, match=f"model.yaml.*{says}"):
        presented(text, wide=np.zeros((1, 5)), flat=np.zeros(5, np.float32))


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ({"lens": Port(F, (ANY,))}, {}, r"inputs\.lens: 'lens' is float32\[any\]; lengths are int32 or int64"),
        ({"lens": Port("int32", ())}, {}, r"inputs\.lens: 'lens' is int32\[\]; lengths are"),
        ({"lens": Port("int32", (4,))}, {}, r"inputs\.lens: 'lens' is int32\[4\]; lengths are"),
        ({"x": Port("tensor(string)", (ANY, ANY, 3))}, {}, r"inputs\.x: 'x' is tensor\(string\); served are float32, "),
        (
            {"h0": Port("float16", (1, ANY, 5))},
            {},
            r"states\[0\]: input 'h0' is float16\[1, any, 5\] and output 'hT' is",
        ),
        ({}, {"hT": Port(F, (1, ANY, 6))}, r"states\[0\]: .* output 'hT' is float32\[1, any, 6\]; they must be alike"),
        ({}, {"hT": Port(F, (ANY, 5))}, r"states\[0\]: .* output 'hT' is float32\[any, 5\]; they must be alike"),
        ({"h0": Port(F, (ANY, ANY, 5))}, {}, r"states\[0\]: axis 0 of 'h0', of shape \[any, any, 5\], takes any size"),
        (
            {"h0": Port(F, (1, 4, 5))},
            {},
            r"states\[0\]\.batch_axis: the graph has a batch of 4 baked into 'h0'; export",
        ),
        ({"x": Port(F, (7, ANY, 3))}, {}, r"inputs\.x\.time_axis: 'x' takes exactly 7 steps; leave time_axis out, so"),
        ({}, {"y": Port(F, (1, ANY, 2))}, r"outputs\.y\.time_axis: 'y' has one step, the inputs have any number"),
        ({}, {"y": Port(F, ())}, r"outputs\.y\.batch_axis: 'y' has no axis 1.*if the graph leaves it unsaid, give it"),
    ],
)
def test_graphs_that_cannot_be_served_so(inputs: Ports, outputs: Ports, says: str) -> None:
    """Refused for what the graph is, with what to do."""
    with pytest.raises(LoadError, match=says):
        presented(TEXT, INPUTS | inputs, OUTPUTS | outputs)


@pytest.mark.parametrize("batch", [1, 8])
def test_outputs_do_not_bake_a_batch_in(batch: int) -> None:
    """Exporters write the sizes of their example there; what goes in says how many rows a run takes."""
    assert presented(TEXT, outputs=OUTPUTS | {"y": Port(F, (ANY, batch, 2))}).rows_per_run is None


def test_an_output_whose_axes_the_graph_leaves_unsaid() -> None:
    """The description gives them."""
    manifest = presented(but("y: {", "y: {shape: [null, null, 2], "), outputs=OUTPUTS | {"y": Port(F, ())})
    assert manifest.outputs[0].shape == (None, None, 2)
