"""model.yaml: what it can say, and each thing that it must not, with the place in the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import LoadError
from service.graphs.description import Description, InputDescription, Versions, parse, read

WHOLE = """
inputs:
  x:    {role: sequence, time_axis: 0, batch_axis: 1}
  lens: {role: lengths}
  sr:   {role: constant, value: 16000}
states:
  - {input: h0, output: hT, batch_axis: 1}
  - {input: c0, output: cT, batch_axis: 1, initial: {file: c0.npy}, name: c}
outputs:
  y:    {time_axis: 0, batch_axis: 1}
"""
GRAPH = "inputs: {x: {}}\noutputs: {y: {}}\n"


def test_a_whole_description() -> None:
    """Every part of it, with the defaults of what is left out."""
    description = parse(WHOLE)
    assert description.of_graph
    assert description.inputs["x"] == InputDescription(role="sequence", time_axis=0, batch_axis=1)
    assert description.inputs["sr"].value == 16000
    assert [state.initial.file for state in description.states] == [None, "c0.npy"]
    assert [state.name for state in description.states] == [None, "c"]
    assert (description.strict, description.streamable, description.row_by_row) == (False, True, False)
    assert description.tolerance is None
    assert description.versions is None


def test_how_to_serve_alone_describes_no_graph() -> None:
    """It goes with a file that was exported here."""
    for text in ("", "versions: [1, 3]", "strict: true\ntolerance: 1e-3", "precision: int8\nthreads: 2"):
        assert not parse(text).of_graph


@pytest.mark.parametrize("on", ["true", "1", "on", "'on'"])
def test_a_switch_is_spelt_as_the_server_s(on: str) -> None:
    """TF32, which a flag can turn on too."""
    assert parse(f"tf32: {on}").tf32 is True


@pytest.mark.parametrize(
    ("text", "versions"), [("{latest: 2}", Versions(latest=2)), ("[1, 3]", Versions.model_validate([1, 3]))]
)
def test_versions(text: str, versions: Versions) -> None:
    """The newest few, or those that are listed."""
    assert parse(f"versions: {text}").versions == versions


def test_names_are_as_they_are_written() -> None:
    """Also those that YAML takes for numbers and bools elsewhere."""
    description = parse("inputs: {1: {}, on: {}, 007: {}}\nstates: [{input: 37, output: 52}]\noutputs: {no: {}}")
    assert list(description.inputs) == ["1", "on", "007"]
    assert (description.states[0].input, description.states[0].output) == ("37", "52")
    assert list(description.outputs) == ["no"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("input: {}", r"unknown key 'input', expected some of inputs, states"),
        ("devcie: cpu", r"unknown key 'devcie', expected some of .*; did you mean device\?"),
        ("[1, 2]", r"expected a mapping"),
        ("inputs: [x]", r"inputs: expected a mapping"),
        ("a: [", r"expected the node content"),
        ("a: &a 1\nb: *a", r"aliases are not taken"),
        ("inputs: {x: {}, x: {}}", r"'x' stands twice"),
        ("? [a]\n: 1", r"a key is a name"),
        ("!!python/object/apply:os.getcwd []", r"could not determine a constructor"),
        ("[" * 5000, r"recursion"),
        ("inputs: {x: {}}", r"at least one input of role sequence, and one output"),
        ("outputs: {y: {}}\ninputs: {x: {role: lengths}}", r"at least one input of role sequence"),
        (GRAPH.replace("{}}", "{}, a: {role: lengths}, b: {role: lengths}}", 1), r"at most one input of role lengths"),
        ("inputs: {x: {role: state}}", r"inputs\.x\.role: .*'sequence', 'lengths' or 'constant'"),
        ("inputs: {x: {axis: 1}}", r"inputs\.x: unknown key 'axis', expected some of role, time_axis"),
        (
            "inputs: {x: {batch_axis: -1}}",
            r"inputs\.x\.batch_axis: expected a number greater than or equal to 0, got -1",
        ),
        ("inputs: {x: {batch_axis: last}}", r"inputs\.x\.batch_axis: expected a whole number, got 'last'"),
        ("inputs: {x: {batch_axis: true}}", r"inputs\.x\.batch_axis: "),
        ("inputs: {x: {below: 0}}", r"inputs\.x\.below: "),
        ("inputs: {x: {shape: [0]}}", r"inputs\.x\.shape\[0\]: "),
        ("inputs: {x: {role: lengths, batch_axis: 0}}", r"inputs\.x: an input of role lengths has no batch_axis"),
        ("inputs: {x: {value: 3}}", r"inputs\.x: an input of role sequence has no value"),
        ("inputs: {x: {role: constant}}", r"inputs\.x: a constant has either a value or a file"),
        ("inputs: {x: {role: constant, value: 1, file: a}}", r"inputs\.x: a constant has either a value or a file"),
        (GRAPH + "states: [{input: h}]", r"states\[0\]\.output: is missing"),
        (GRAPH + "states: [{input: h, output: g, initial: ones}]", r"states\[0\]\.initial: expected zeros, \{file"),
        (
            GRAPH + "states: [{input: h, output: g, initial: {url: a}}]",
            r"initial: unknown key 'url', expected some of file",
        ),
        ("versions: {latest: 0}", r"versions\.latest: "),
        ("precision: int4", r"precision: expected 'float32', 'float16' or 'int8', got 'int4'"),
        ("threads: 0", r"threads: expected a number greater than or equal to 1, got 0"),
        ("threads: 100000", r"threads: expected .*1024, got 100000"),
        ("max_tick_rows: 1.5", r"max_tick_rows: expected a whole number, got 1\.5"),
        ("short_tick_ms: 0", r"short_tick_ms: expected a number greater than 0, got 0"),
        ("long_tick_ms: .inf", r"long_tick_ms: expected a finite number, got inf"),
        ("versions: []", r"versions: expected \{latest: N\} or a list"),
        ("versions: 3", r"versions: expected \{latest: N\} or a list"),
        ("tolerance: .inf", r"tolerance: "),
        ("tolerance: 0", r"tolerance: "),
        ("strict: perhaps", r"strict: expected a valid boolean, got 'perhaps'"),
        ("strict: 1", r"strict: expected a valid boolean, got 1"),
        ("states:", r"states: is empty; uncomment or write one line for each state"),
        ("outputs:\n  # y: {}", r"outputs: is empty; uncomment or write one line for each output"),
        ("inputs: {x: {role: constant, value: null}}", r"inputs\.x: a constant has either .*, got neither"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    """The place in the file, and what was expected there."""
    with pytest.raises(LoadError, match=f"(?s)model.yaml is not valid: .*{says}"):
        parse(text)


def test_what_is_not_decided() -> None:
    """The first line that asks for a decision is told before anything else; a value that reads alike asks nothing."""
    with pytest.raises(LoadError, match=r"^model\.yaml, line 3, is to be decided, and then deleted: which is time$"):
        parse("inputs:\n  x: {}\n  # decide: which is time\n  # decide: more\nstates:\n")
    with pytest.raises(LoadError, match=r"line 1, .*: .\[31mred$"):
        parse(b"# decide: \x1b\xff[31mred\n")
    assert parse(GRAPH + "states: [{input: h, output: decide}]").states[0].output == "decide"


def test_read(tmp_path: Path) -> None:
    """Beside the versions; none is none; what is too large, no text, or no file is refused."""
    assert read(tmp_path) is None
    path = tmp_path / "model.yaml"
    path.write_text("strict: true")
    assert read(tmp_path) == Description(strict=True)
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(LoadError, match="larger than 1048576 bytes"):
        read(tmp_path)
    path.write_bytes(b"\xff\xff\x00")
    with pytest.raises(LoadError, match="not valid"):
        read(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(LoadError, match=r"cannot read model\.yaml: it is no file"):
        read(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(LoadError, match=r"cannot read model\.yaml: it is no file"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["1e-3", "1E+3", "-2.5e-1", ".5", "1.", "+0.1", "1e3"])
def test_numbers_as_people_write_them(text: str) -> None:
    """PyYAML alone takes those with an exponent and no point for text."""
    value = (
        parse(f"{{inputs: {{x: {{}}, s: {{role: constant, value: {text}}}}}, outputs: {{y: {{}}}}}}").inputs["s"].value
    )
    assert (type(value), value) == (float, float(text))


@pytest.mark.parametrize("text", ["1e", "e3", "1.2.3", "-", "."])
def test_what_is_no_number(text: str) -> None:
    """Stays text."""
    assert (
        parse(f"{{inputs: {{x: {{}}, s: {{role: constant, file: {text}}}}}, outputs: {{y: {{}}}}}}").inputs["s"].file
        == text
    )
