"""What ``inspect`` finds in files from elsewhere: recurrent nodes wherever they are, and what is certain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.__main__ import main
from export.inspect import dataflow
from export.inspect.anatomy import dissect
from export.inspect.proposal import Proposal, propose
from service.errors import LoadError
from service.graphs.description import parse, read
from service.graphs.onnx_file import OnnxFile
from service.graphs.presented import present
from service.manifest import Manifest
from service.values import from_text
from tests import graphs
from tests.any_graphs import CASES, GRU, Case, draw, model, place
from tests.unit.export.inspect.foreign import (
    FLOAT,
    INT32,
    INT64,
    H,
    I,
    body,
    lstm,
    node,
    tensor,
    unsaid,
    weights,
    write,
    write_cell,
    write_lstm,
    write_packed,
)


def proposed(path: Path) -> Proposal:
    """The proposal for a file."""
    return propose(dissect(OnnxFile(path)))


def accepted(path: Path, text: str) -> Manifest:
    """What the server makes of a file and a model.yaml."""
    file = OnnxFile(path)
    return present(parse(text), file.signature, path.parent, file.initializer)


def without_decisions(text: str) -> str:
    """A proposal after somebody has decided: the lines that ask are deleted."""
    return "".join(line for line in text.splitlines(keepends=True) if "# decide: " not in line)


def check_open(path: Path, proposal: Proposal) -> None:
    """There is something to decide, and the server refuses the proposal as it stands, with the first of it."""
    assert proposal.decisions
    with pytest.raises(LoadError, match=f"to be decided, and then deleted: {re.escape(proposal.decisions[0][:50])}"):
        accepted(path, proposal.text)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_proposal_is_what_a_person_wrote(tmp_path: Path, case: Case) -> None:
    """Of graphs that are served in other tests: what is proposed for certain is what their model.yaml says."""
    path = case.write(tmp_path)
    written = read(path.parents[1])
    assert written is not None
    proposal = proposed(path)
    text = without_decisions(proposal.text).replace("value: null", "value: 1")
    text = re.sub(r"^(states|outputs):\n(?!  [^#])", "", text, flags=re.MULTILINE)  # where all of one kind is left open
    made = parse(text)
    pairs, right = (
        [(state.input, state.output, state.batch_axis) for state in states] for states in (made.states, written.states)
    )
    missing = [pair for pair in right if pair not in pairs]
    assert pairs == [pair for pair in right if pair not in missing]
    assert all(any(f"whether {state} " in line for line in proposal.decisions) for state, _, _ in missing)
    assert made.inputs
    signature = OnnxFile(path).signature
    for ours, theirs, ports in (
        (made.inputs, written.inputs, signature.inputs),
        (made.outputs, written.outputs, signature.outputs),
    ):
        for name, one in ours.items():
            assert one.batch_axis == theirs[name].batch_axis
            time = theirs[name].time_axis
            # An axis of one step is as good as none.
            assert one.time_axis == (time if time is None or ports[name].shape[time] is None else None)


def test_an_lstm_with_h_and_c(tmp_path: Path) -> None:
    """Of two states of one shape the operator's own inputs and outputs tell which is which, not names."""
    path = write_lstm(tmp_path / "a.onnx", names=("a", "b", "c", "d"))
    proposal = proposed(path)
    assert proposal.evidence == [
        "a reaches initial_h of LSTM 'lstm'; c is its Y_h",
        "b reaches initial_c of LSTM 'lstm'; d is its Y_c",
    ]
    assert proposal.decisions == []
    manifest = accepted(path, proposal.text)
    assert [(state.input, state.output, state.batch_axis) for state in manifest.states] == [
        ("a", "c", 1),
        ("b", "d", 1),
    ]
    (x,), (y,) = manifest.inputs, manifest.outputs
    assert (x.time_axis, x.batch_axis, y.time_axis, y.batch_axis) == (0, 1, 0, 1)


def test_names_that_mislead(tmp_path: Path) -> None:
    """Names that say the opposite of the dataflow are not believed."""
    path = write_lstm(tmp_path / "a.onnx", names=("c_in", "h_in", "h_out", "c_out"))
    pairs = [(state.input, state.output) for state in accepted(path, proposed(path).text).states]
    assert pairs == [("c_in", "h_out"), ("h_in", "c_out")]


def test_batch_first_states_without_layers(tmp_path: Path) -> None:
    """States [N, H], batch-first sequences and lengths, through Transpose and Unsqueeze."""
    path = write(
        tmp_path / "a.onnx",
        [
            node("Transpose", ["audio"], ["x"], perm=[1, 0, 2]),
            node("Unsqueeze", ["state", "zero"], ["h"]),
            node(
                "GRU", ["x", "W", "R", "", "how_many", "h"], ["Y", "Y_h"], "gru", hidden_size=H, linear_before_reset=1
            ),
            node("Squeeze", ["Y", "one"], ["steps"]),
            node("Transpose", ["steps"], ["y"], perm=[1, 0, 2]),
            node("Squeeze", ["Y_h", "zero"], ["next"]),
        ],
        [tensor("audio", "a", "b", I), tensor("how_many", "a", dtype=INT32), tensor("state", "a", H)],
        [tensor("y", "a", "b", H), tensor("next", "a", H)],
        weights(3, more={"zero": [0], "one": [1]}),
    )
    proposal = proposed(path)
    assert proposal.decisions == []
    assert proposal.evidence == ["state reaches initial_h of GRU 'gru'; next is its Y_h"]
    manifest = accepted(path, proposal.text)
    assert (manifest.lengths, manifest.inputs[0].batch_axis, manifest.inputs[0].time_axis) == ("how_many", 0, 1)
    assert (manifest.outputs[0].batch_axis, manifest.outputs[0].time_axis) == (0, 1)
    assert manifest.states[0].batch_axis == 0


def test_layers_in_one_state(tmp_path: Path) -> None:
    """States [L, N, H] of h and c, sliced for each layer and put together again, are still told apart."""
    path = write(
        tmp_path / "a.onnx",
        [
            node("Split", ["s1"], ["h1", "h2"], axis=0),
            node("Split", ["s2"], ["c1", "c2"], axis=0),
            lstm(["x", "W1", "R", "", "", "h1", "c1"], ["Y1", "h1_", "c1_"], "first"),
            node("Squeeze", ["Y1", "one"], ["between"]),
            lstm(["between", "W2", "R", "", "", "h2", "c2"], ["Y2", "h2_", "c2_"], "second"),
            node("Squeeze", ["Y2", "one"], ["y"]),
            node("Concat", ["h1_", "h2_"], ["t2"], axis=0),
            node("Concat", ["c1_", "c2_"], ["t1"], axis=0),
        ],
        [tensor("x", None, None, I), tensor("s1", 2, None, H), tensor("s2", 2, None, H)],
        [tensor("y", None, None, H), tensor("t1", 2, None, H), tensor("t2", 2, None, H)],
        {
            "W1": weights()["W"],
            "W2": weights(input_size=H)["W"],
            "R": weights()["R"],
            "one": np.array([1]),
        },
    )
    proposal = proposed(path)
    assert proposal.decisions == []
    manifest = accepted(path, proposal.text)
    assert [(state.input, state.output) for state in manifest.states] == [("s1", "t2"), ("s2", "t1")]


@pytest.mark.parametrize("sizes", [(None, None), ("N", "N"), (1, 1)])
def test_the_signature_of_speech_activity_models(tmp_path: Path, sizes: tuple[Any, Any]) -> None:
    """Packed h and c, nodes inside If; free, named and fixed batch: only the rate is to be decided."""
    path = write_packed(tmp_path / "a.onnx", sizes)
    anatomy = dissect(OnnxFile(path))
    nodes = [(each.operator, each.path) for each in anatomy.recurrences]
    assert nodes == [("If", "rates"), ("LSTM", "rates/else_branch/slow"), ("LSTM", "rates/then_branch/fast")]
    proposal = propose(anatomy)
    (evidence,) = proposal.evidence
    for each in ("initial_h of LSTM 'rates/else_branch/slow'", "initial_c of LSTM 'rates/then_branch/fast'"):
        assert each in evidence
    assert evidence.endswith("; stateN is its Y_h and Y_c")
    assert proposal.decisions == ["the value of sr, the same in every run; the graph compares it with 16000"]
    check_open(path, proposal)
    manifest = accepted(path, without_decisions(proposal.text).replace("value: null", "value: 16000"))
    assert [(state.input, state.output, state.batch_axis) for state in manifest.states] == [("state", "stateN", 1)]
    assert manifest.inputs[0].batch_axis == 0
    assert manifest.rows_per_run == (1 if sizes == (1, 1) else None)


def test_a_state_with_a_batch_of_one(tmp_path: Path) -> None:
    """[1, 2, H, 2] with a batch fixed at 1: the only tensor of its shape, and called a state."""
    path = write(
        tmp_path / "a.onnx",
        [node("Add", ["state_in", "x"], ["state_out"]), node("ReduceMean", ["state_out"], ["y"], axes=[1, 2, 3])],
        [tensor("x", 1, 1, 1, 1), tensor("state_in", 1, 2, H, 2)],
        [tensor("y", 1, 1, 1, 1), tensor("state_out", 1, 2, H, 2)],
    )
    proposal = proposed(path)
    assert proposal.decisions == []
    manifest = accepted(path, proposal.text)
    assert manifest.rows_per_run == 1
    assert manifest.states[0].batch_axis == 0


def test_h_and_c_that_nothing_tells_apart(tmp_path: Path) -> None:
    """Two states of one shape in a cell of ordinary operators: all pairs are listed, none is chosen, none is served."""
    path = write_cell(tmp_path / "a.onnx")
    proposal = proposed(path)
    check_open(path, proposal)
    assert proposal.decisions == [
        "whether h_in ends as h_out or c_out; a swapped pair gives wrong numbers and no error",
        "whether c_in ends as c_out or h_out; a swapped pair gives wrong numbers and no error",
    ]
    decided = without_decisions(proposal.text)
    for state in ("h", "c"):
        line = f"- {{input: {state}_in, output: {state}_out, batch_axis: 0}}"
        assert f"  # {line}\n" in decided
        decided = decided.replace(f"# {line}", line)
    pairs = [(state.input, state.output) for state in accepted(path, decided).states]
    assert pairs == [("h_in", "h_out"), ("c_in", "c_out")]


def write_lstm_cells(path: Path, names: tuple[str, str, str], layers: int = 1, width: int = I, h: bool = True) -> Path:
    """One step of LSTM cells out of ordinary operators; without ``h``, gates that come out of x alone.

    Args:
        path: where to.
        names: of x, h and c.
        layers: how many; the number of its layer stands behind the name of each state.
        width: of x.
        h: whether gates depend on h.
    """
    x, hidden, cell = names
    lines, inputs, outputs, arrays, below = [], [f"float[N, {width}] {x}"], ["float[N, 1] y"], {"head": draw(H, 1)}, x
    for k in range(layers):
        arrays |= {f"W{k}": draw(width if k == 0 else H, 4 * H), f"R{k}": draw(H, 4 * H)}
        inputs += [f"float[N, {H}] {hidden}{k}"] * h + [f"float[N, {H}] {cell}{k}"]
        outputs += [f"float[N, {H}] p{k}", f"float[N, {H}] q{k}"]
        lines.append(f"a{k} = MatMul({below}, W{k})")
        lines.append(f"b{k} = MatMul({hidden}{k}, R{k})  s{k} = Add(a{k}, b{k})" if h else f"s{k} = Identity(a{k})")
        lines.append(
            f"i{k}, o{k}, f{k}, g{k} = Split <axis = 1, num_outputs = 4> (s{k})"
            f"  I{k} = Sigmoid(i{k})  O{k} = Sigmoid(o{k})  F{k} = Sigmoid(f{k})  G{k} = Tanh(g{k})"
            f"  kept{k} = Mul(F{k}, {cell}{k})  new{k} = Mul(I{k}, G{k})  q{k} = Add(kept{k}, new{k})"
            f"  bent{k} = Tanh(q{k})  p{k} = Mul(bent{k}, O{k})"
        )
        below = f"p{k}"
    lines.append(f"y = MatMul({below}, head)")
    text = f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {'  '.join(lines)} }}"
    return place(path, "cells", model(text, arrays))


@pytest.mark.parametrize(
    ("names", "layers", "width"), [(("x", "a", "b"), 1, I), (("x", "c", "h"), 3, I), (("x", "h", "c"), 2, H)]
)
def test_lstm_cells_of_ordinary_operators(tmp_path: Path, names: tuple[str, str, str], layers: int, width: int) -> None:
    """The c is what a gate multiplies and keeps, h what its gates come out of: in every layer, whatever its name."""
    path = write_lstm_cells(tmp_path, names, layers, width)
    proposal = proposed(path)
    assert proposal.decisions == []
    pairs = {(state.input, state.output) for state in accepted(path, proposal.text).states}
    _, h, c = names
    assert pairs == {pair for k in range(layers) for pair in ((f"{h}{k}", f"p{k}"), (f"{c}{k}", f"q{k}"))}


def test_an_lstm_cell_whose_x_could_be_h(tmp_path: Path) -> None:
    """Where x is as wide as h and no name tells them apart, c alone is certain."""
    path = write_lstm_cells(tmp_path, ("u", "v", "w"), width=H)
    proposal = proposed(path)
    check_open(path, proposal)
    assert proposal.evidence == ["q0 is w0 times a gate, and more: c of an LSTM cell"]


def test_gates_of_x_alone(tmp_path: Path) -> None:
    """A cell whose gates do not depend on h has none: what it takes is not taken for it, and its output is served."""
    path = write_lstm_cells(tmp_path, ("u", "", "c"), width=H, h=False)
    proposal = proposed(path)
    assert proposal.evidence == ["q0 is c0 times a gate, and more: c of an LSTM cell"]
    assert ("u", "p0") not in re.findall(r"^  - {input: (\w+), output: (\w+)", proposal.text, re.MULTILINE)


def test_an_input_that_could_be_a_state(tmp_path: Path) -> None:
    """Where an input comes back in its own shape and no name says what it is, that is left open."""
    path = write(
        tmp_path / "a.onnx",
        [node("Add", ["p", "q"], ["r"]), node("Mul", ["p", "q"], ["s"])],
        [tensor("p", "N", H), tensor("q", "N", H)],
        [tensor("r", "N", H), tensor("s", "N", H)],
    )
    proposal = proposed(path)
    check_open(path, proposal)
    assert "whether p is a sequence, as here, or a state, as below" in proposal.decisions


def test_axes_that_nothing_tells(tmp_path: Path) -> None:
    """Two free axes without a name, and no recurrent node that takes them: batch and time are left open."""
    path = write(
        tmp_path / "a.onnx", [node("Relu", ["x"], ["y"])], [tensor("x", None, None, I)], [tensor("y", None, None, I)]
    )
    proposal = proposed(path)
    check_open(path, proposal)
    assert proposal.decisions[0] == "x: which of its free axes 0, 1 is batch, and which time"


def test_inside_a_loop(tmp_path: Path) -> None:
    """A GRU inside a Loop that carries its state: found, with its path, and the pair is certain."""
    inside = body(
        [
            node("Identity", ["go"], ["going"]),
            node("GRU", ["x", "W", "R", "", "", "h"], ["", "h_next"], "gru", hidden_size=H),
        ],
        [tensor("i", dtype=INT64), tensor("go", dtype=onnx.TensorProto.BOOL), unsaid("h")],
        [tensor("going", dtype=onnx.TensorProto.BOOL), unsaid("h_next")],
    )
    path = write(
        tmp_path / "a.onnx",
        [node("Loop", ["times", "", "first"], ["second"], "repeat", body=inside), node("Squeeze", ["second"], ["y"])],
        [tensor("x", 1, "N", I), tensor("first", 1, "N", H)],
        [unsaid("y"), tensor("second", 1, "N", H)],
        weights(3, more={"times": 2}),
    )
    anatomy = dissect(OnnxFile(path))
    assert [each.path for each in anatomy.recurrences] == ["repeat", "repeat/body/gru"]
    gru = anatomy.recurrences[1]
    assert (gru.cuda.runs_on, gru.cpu.runs_on) == ("cpu", "cpu")
    assert gru.cuda.reason is not None
    assert "linear_before_reset=0" in gru.cuda.reason
    (evidence,) = propose(anatomy).evidence
    assert evidence.startswith("first reaches ")
    assert "second is its " in evidence


def test_inside_a_scan_and_a_function(tmp_path: Path) -> None:
    """A Scan's carried value pairs its state, time is what it scans, and a node inside a function has its path."""
    step = body(
        [node("Add", ["h", "x_t"], ["sum"]), node("Tanh", ["sum"], ["h_t"]), node("Identity", ["h_t"], ["y_t"])],
        [unsaid("h"), unsaid("x_t")],
        [unsaid("h_t"), unsaid("y_t")],
    )
    function = helper.make_function(
        "mine",
        "Twice",
        ["a"],
        ["b"],
        [lstm(["a", "W_", "R_"], ["b"], "deep")],
        [helper.make_opsetid("", 17)],
    )
    path = write(
        tmp_path / "a.onnx",
        [
            node("Scan", ["p", "q"], ["r", "s"], "scan", body=step, num_scan_inputs=1),
            helper.make_node("Twice", ["s"], ["z"], domain="mine"),
        ],
        [tensor("q", "k", "rows", H), tensor("p", "rows", H)],
        [tensor("s", "k", "rows", H), tensor("r", "rows", H)],
        functions=[function],
    )
    anatomy = dissect(OnnxFile(path))
    assert [each.path for each in anatomy.recurrences] == ["scan", "mine.Twice/deep"]
    proposal = propose(anatomy)
    assert proposal.evidence == ["p reaches carried value 0 of Scan 'scan'; r is its carried value 0"]
    x = accepted(path, proposal.text).inputs[0]
    assert (x.name, x.time_axis, x.batch_axis) == ("q", 0, 1)


@pytest.mark.parametrize(
    ("made", "on_cuda", "names"),
    [
        (lstm(["x", "W", "R", "", "", "", "", "P"], ["Y"]), "cpu", "peepholes"),
        (lstm(["x", "W", "R"], ["Y"], activations=["Sigmoid", "Relu", "Tanh"]), "cpu", "activations=Sigmoid,Relu,Tanh"),
        (lstm(["x", "W", "R"], ["Y"], clip=1.0), "cpu", "clip"),
        (lstm(["x", "W", "R"], ["Y"], layout=1), None, "layout=1"),
        (lstm(["x", "W", "R"], ["Y"]), "cuda", None),
    ],
)
def test_where_nodes_run(tmp_path: Path, made: Any, on_cuda: str | None, names: str | None) -> None:
    """What falls back, or is refused, says which attribute is why."""
    path = write(
        tmp_path / "a.onnx",
        [made],
        [tensor("x", "T", "N", I)],
        [unsaid("Y")],
        weights(more={"P": np.zeros((1, 3 * H), np.float32)}),
    )
    (found,) = dissect(OnnxFile(path)).recurrences
    assert found.cuda.runs_on == on_cuda
    assert names is None or names in str(found.cuda.reason)
    assert found.cpu.runs_on == (None if names == "layout=1" else "cpu")


def test_a_state_that_stays_inside(tmp_path: Path) -> None:
    """An LSTM that begins with zeros in every run is named, and its proposal does not let streams be cut."""
    path = write(
        tmp_path / "a.onnx",
        [lstm(["x", "W", "R"], ["Y"]), node("Squeeze", ["Y", "one"], ["y"])],
        [tensor("x", "T", "N", I)],
        [tensor("y", "T", "N", H)],
        weights(more={"one": [1]}),
    )
    anatomy = dissect(OnnxFile(path))
    assert anatomy.hidden == ["LSTM 'lstm'"]
    assert not accepted(path, propose(anatomy).text).streamable


def test_both_directions(tmp_path: Path) -> None:
    """A graph that reads from the end too is not streamable."""
    two = {name: np.concatenate([array, array]) for name, array in weights().items()}
    path = write(
        tmp_path / "a.onnx",
        [lstm(["x", "W", "R", "", "", "h", "c"], ["Y", "h_out", "c_out"], direction="bidirectional")],
        [tensor("x", "T", "N", I), tensor("h", 2, "N", H), tensor("c", 2, "N", H)],
        [tensor("Y", "T", 2, "N", H), tensor("h_out", 2, "N", H), tensor("c_out", 2, "N", H)],
        two,
    )
    assert not accepted(path, proposed(path).text).streamable


def test_sizes_that_are_baked_in(tmp_path: Path) -> None:
    """An initial state of one row, and a Reshape to fixed sizes, are found where the inputs' own axes are free."""
    path = write(
        tmp_path / "a.onnx",
        [
            node("Reshape", ["flat", "shape"], ["x"], "to_steps"),
            lstm(["flat", "W", "R", "", "", "h", "h"], ["Y"]),
        ],
        [tensor("flat", "T", "N", I)],
        [unsaid("Y"), unsaid("x")],
        weights(more={"shape": [7, 2, I], "h": np.zeros((1, 2, H), np.float32)}),
    )
    assert dissect(OnnxFile(path)).baked == [
        "initial_h of LSTM 'lstm' is a constant of shape [1, 2, 4]: a batch of 2 is baked in",
        "initial_c of LSTM 'lstm' is a constant of shape [1, 2, 4]: a batch of 2 is baked in",
        "Reshape 'to_steps' makes [7, 2, 3] of what comes in: no size is free there",
    ]


def write_example_sizes(path: Path, last: str) -> Path:
    """A GRU whose results are said to have the sizes of an example, as torch's exporter writes them."""
    return write(
        path,
        [
            node("GRU", ["x", "W", "R", "", "", "h"], ["Y", "h_out"], "gru", hidden_size=H),
            node("Squeeze", ["Y", "one"], ["steps"]),
            helper.make_node(last, ["steps"], ["y"], domain="" if last == "Relu" else "com.microsoft"),
        ],
        [tensor("x", "T", "N", I), tensor("h", 1, "N", H)],
        [tensor("y", 7, 2, H), tensor("h_out", 1, 2, H)],
        weights(3, more={"one": [1]}),
        within=[tensor("steps", 7, 2, H)],
    )


def test_sizes_of_an_example(tmp_path: Path) -> None:
    """What the graph says of an output counts more than what the file says of it; where only the file speaks, ask."""
    path = write_example_sizes(tmp_path / "a.onnx", "Relu")
    anatomy = dissect(OnnxFile(path))
    assert "output 'y' is said to be [7, 2, 4]; the graph gives [T, N, 4]" in anatomy.baked
    y = accepted(path, propose(anatomy).text).outputs[0]
    assert (y.time_axis, y.batch_axis) == (0, 1)

    path = write_example_sizes(tmp_path / "b.onnx", "Gelu")
    proposal = proposed(path)
    check_open(path, proposal)
    assert proposal.decisions == [
        "y: the file says [7, 2, 4], which may be an example's sizes; x has {time_axis: 0, batch_axis: 1}"
    ]
    decided = without_decisions(proposal.text)
    assert accepted(path, decided.replace("time_axis: decide, batch_axis: decide", "time_axis: 0, batch_axis: 1"))


def test_a_length_that_a_reshape_fixes(tmp_path: Path) -> None:
    """A GRU whose result is reshaped to an example's length, as torch's exporter does with time-major ones.

    It runs at other lengths too, with wrong numbers or none, so it is for somebody to decide.
    """
    path = write(
        tmp_path / "a.onnx",
        [
            node("GRU", ["x", "W", "R", "", "", "h"], ["Y", "h_out"], "gru", hidden_size=H),
            node("Reshape", ["Y", "shape"], ["y"], "to_steps"),
        ],
        [tensor("x", "T", "N", I), tensor("h", 1, "N", H)],
        [tensor("y", 5, "N", H), tensor("h_out", 1, "N", H)],
        weights(3, more={"shape": [5, -1, H]}),
    )
    proposal = proposed(path)
    check_open(path, proposal)
    reshape, length = proposal.decisions
    assert "Reshape 'to_steps' makes [5, -1, 4] of [T, 1, N, 4]" in reshape
    assert length.startswith("y: a fixed 5 stands where its sequence has time")


@pytest.mark.parametrize(("shape", "fixes"), [([-1, H], 0), ([-1, 2, 2], 0), ([-1, 2 * H], 1)])
def test_a_reshape_of_free_sizes(tmp_path: Path, shape: list[int], fixes: int) -> None:
    """One that joins free axes, or splits a fixed one, fixes nothing; one that takes part of a free axis does."""
    path = write(
        tmp_path / "a.onnx",
        [node("GRU", ["x", "W", "R"], ["Y"], "gru", hidden_size=H), node("Reshape", ["Y", "shape"], ["y"])],
        [tensor("x", "T", "N", I)],
        [unsaid("y")],
        weights(3, more={"shape": shape}),
    )
    assert len(dissect(OnnxFile(path)).lengths) == fixes


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_time_that_is_fixed(tmp_path: Path, batch_first: bool) -> None:
    """A model that was exported without dynamic axes takes blocks for steps: it says so, and somebody has to decide."""
    nodes = [lstm(["steps", "W", "R", "", "", "h", "c"], ["Y", "h_out", "c_out"])]
    permutation = [1, 0, 2] if batch_first else [0, 1, 2]
    nodes.insert(0, node("Transpose", ["x"], ["steps"], perm=permutation))
    shape, axis = ((1, 6, I), 1) if batch_first else ((6, 1, I), 0)
    path = write(
        tmp_path / "a.onnx",
        nodes,
        [tensor("x", *shape), tensor("h", 1, 1, H), tensor("c", 1, 1, H)],
        [tensor("Y", 6, 1, 1, H), tensor("h_out", 1, 1, H), tensor("c_out", 1, 1, H)],
        weights(),
    )
    proposal = proposed(path)
    check_open(path, proposal)
    (decision,) = proposal.decisions
    assert f"6 steps a run, as axis {axis} of 'x' is the time of LSTM 'lstm': a step here is a block of 6" in decision
    (x,) = accepted(path, without_decisions(proposal.text)).inputs
    assert 6 in x.shape


def test_names_that_yaml_would_misread(tmp_path: Path) -> None:
    """Tensors called like numbers, bools or worse are quoted; nothing of a name is taken for a comment or a command."""
    names = ('x: {}\n# decide: "', "no", "\x1b[31mred", "1", "null", "[]")
    path = write_lstm(tmp_path / "a.onnx", names=names[1:5])
    proposal = proposed(path)
    assert proposal.decisions == []
    assert proposal.text.isascii()
    assert all(line.isprintable() for line in proposal.text.splitlines())
    pairs = [(state.input, state.output) for state in accepted(path, proposal.text).states]
    assert pairs == [("no", "1"), ("\x1b[31mred", "null")]

    path = write_cell(tmp_path / "b.onnx", names=(names[0], "h_in", "c_in", names[5], "h_out", "c_out"))
    assert len(proposed(path).decisions) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and proposal are printed; with --write the proposal stands where the server looks, and only once."""
    path = write_lstm(tmp_path / "models/tagger/3/model.onnx")
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "[T, N, 3]",
        "hidden_size=4",
        "runs",
        "should run",
        "ai.onnx 17",
        "h0 reaches initial_h of LSTM 'lstm'; hT is its Y_h",
    ):
        assert words in printed
    assert "\x1b" not in printed
    assert main(["inspect", str(path), "--write"]) == 0
    text = (tmp_path / "models/tagger/model.yaml").read_text()
    assert len(accepted(path, text).states) == 2
    capsys.readouterr()
    assert main(["inspect", str(path), "--write"]) == 2
    assert "model.yaml is there already" in capsys.readouterr().err


def test_the_command_leaves_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 where something is to be decided; what the server would refuse for another reason is said too."""
    assert main(["inspect", str(write_cell(tmp_path / "a.onnx"))]) == 3
    assert "# decide: whether h_in ends as h_out or c_out" in capsys.readouterr().out
    baked = write_lstm(tmp_path / "b.onnx", state=(1, 4, H))
    main(["inspect", str(baked)])
    assert "4" in capsys.readouterr().out


def test_a_file_that_was_exported_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its manifest is shown, and no model.yaml is proposed or written."""
    path = graphs.write_lstm(tmp_path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "h0 -> hT" in printed
    assert "none is needed" in printed
    assert "inputs:" not in printed
    assert main(["inspect", str(path), "--write"]) == 2
    assert not (path.parents[1] / "model.yaml").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not a file"),
        (b"", "holds no nodes"),
        (b"\xff" * 100, "is not an onnx file"),
        (b"hello", "is not an onnx file"),
    ],
)
def test_what_is_no_onnx_file(
    tmp_path: Path, content: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit code 2."""
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_files_that_were_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever single bytes of a file become, there is an answer and no traceback."""
    whole = write_packed(tmp_path / "whole.onnx").read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "a.onnx"
    for _ in range(50):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        assert main(["inspect", str(path)]) in (0, 2, 3)
        capsys.readouterr()


def test_functions_that_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that each call the next one twice, 40 deep, are followed up to a limit, and by nobody else further."""
    monkeypatch.setattr(dataflow, "MAX_NODES", 1_000)
    functions = [
        helper.make_function(
            "mine",
            f"f{k}",
            ["a"],
            ["b"],
            [helper.make_node(f"f{k + 1}", [v], [w], domain="mine") for v, w in (("a", "m"), ("m", "b"))],
            [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)],
        )
        for k in range(40)
    ]
    path = write(
        tmp_path / "a.onnx",
        [helper.make_node("f0", ["x"], ["y"], domain="mine")],
        [tensor("x", "N", I, dtype=FLOAT)],
        [unsaid("y")],
        functions=functions,
    )
    assert not dissect(OnnxFile(path)).flow.whole


DENOISER = """g (float[N, 8] mel_in, float[N, 5] speaker, float[N, 4] h_in)
    => (float[N, 8] mel_out, float[N, 1] vad, float[N, 4] h_out) {
    a = MatMul(mel_in, A)  b = MatMul(h_in, B)  c = MatMul(speaker, C)  s = Sum(a, b, c)
    h_out = Tanh(s)  mel_out = MatMul(h_out, D)  vad = MatMul(h_out, V)
}"""
DENOISER_WEIGHTS = {"A": draw(8, 4), "B": draw(4, 4), "C": draw(5, 4), "D": draw(4, 8), "V": draw(4, 1)}


def test_a_signal_that_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """mel_in and mel_out of one shape are no state for that: beside a sequence that is certain, it is left open."""
    path = place(tmp_path, "any", model(DENOISER, DENOISER_WEIGHTS))
    proposal = proposed(path)
    check_open(path, proposal)
    assert proposal.evidence == ["h_out alone has the shape and dtype of h_in, and by name they are a state"]
    assert proposal.decisions == ["whether mel_in is a sequence, as here, or a state, as below"]
    line = "# mel_in: {batch_axis: 0}"
    text = without_decisions(proposal.text).replace(line, line[2:]).replace("# mel_out", "mel_out")
    manifest = accepted(path, text)
    assert [x.name for x in manifest.inputs] == ["speaker", "mel_in"]
    assert [state.name for state in manifest.states] == ["h_in"]


@pytest.mark.parametrize(
    ("small", "says"),
    [
        (
            "int64[1] count, float[1, 8] h_in) => (float[1, 8] y, float[1, 8] h_out, int64[1] count_next",
            ["whether count is a sequence or a constant, as here, or a state, as below"],
        ),
        (
            "int64 count, float[1, 8] h_in) => (float[1, 8] y, float[1, 8] h_out, int64 count_next",
            ["whether count is a sequence or a constant, as here, or a state, as below"],
        ),
        (
            "int64[1, 1] count, float[1, 8] h_in) => (float[1, 8] y, float[1, 8] h_out, float count_next",
            ["the value of count, the same in every run"],
        ),
        (
            "int64[1, 1] tokens, float[1, 8] h_in) => (float[1, 8] y, float[1, 8] h_out, float count_next",
            ["whether tokens is a sequence or a constant, as here"],
        ),
    ],
)
def test_counters_tokens_and_constants(tmp_path: Path, small: str, says: list[str]) -> None:
    """One integer is a constant only where it does not come back and is not called a sequence; else it is left open."""
    name = "tokens" if "tokens" in small else "count"
    text = f"""g (float[1, 3] x, {small}) {{
        f = Cast<to = 1>({name})  p = MatMul(x, A)  s = Add(p, h_in)  h_out = Tanh(s)  y = Mul(h_out, f)
        count_next = {"Add(count, one)" if "int64 count_next" in small or "int64[1] count_next" in small else "Max(f)"}
    }}"""
    path = place(tmp_path, "any", model(text, {"A": draw(3, 8), "one": np.array(1)}))
    proposal = proposed(path)
    check_open(path, proposal)
    named = [line for line in proposal.decisions if name in line]
    assert named == says


def test_a_word_is_the_sequence_where_nothing_else_can_be(tmp_path: Path) -> None:
    """tokens[1, 1] beside a state alone: something has to be the sequence."""
    text = """g (int64[1, 1] tokens, float[1, 1, 4] h0) => (float[1, 1, 4] y, float[1, 1, 4] hn) {
        e = Gather(E, tokens)  Y, hn = GRU<hidden_size = 4>(e, W, R, , , h0)  y = Squeeze(Y, axis)
    }"""
    path = place(tmp_path, "any", model(text, GRU | {"E": draw(9, 3)}))
    proposal = proposed(path)
    assert proposal.decisions == []
    assert [x.name for x in accepted(path, proposal.text).inputs] == ["tokens"]


WITH_DEFAULT = """g (float[T, N, 3] x, float[1, 1, 4] h0, float[1, 12, 3] W) => (float[T, N, 4] y, float[1, 1, 4] hn) {
    Y, hn = GRU<hidden_size = 4>(x, W, R, , , h0)  y = Squeeze(Y, axis)
}"""


def test_a_state_that_has_a_value(tmp_path: Path) -> None:
    """An input with an initializer behind it can be given, and is proposed as a state; it begins with that value."""
    path = place(tmp_path, "any", model(WITH_DEFAULT, GRU | {"h0": draw(1, 1, H)}))
    anatomy = dissect(OnnxFile(path))
    proposal = propose(anatomy)
    assert anatomy.hidden == []
    assert (proposal.decisions, proposal.evidence) == ([], ["h0 reaches initial_h of GRU 'GRU[0]'; hn is its Y_h"])
    (state,) = accepted(path, proposal.text).states
    assert state.initial is not None
    assert np.array_equal(from_text(state.initial, "float32", (1, H)), draw(1, 1, H)[0])
    zeros = accepted(path, proposal.text.replace("batch_axis: 1}\noutputs", "batch_axis: 1, initial: zeros}\noutputs"))
    assert zeros.states[0].initial is None

    old = model(WITH_DEFAULT, GRU | {"h0": draw(1, 1, H)})
    old.ir_version = 3
    path = place(tmp_path, "old", old)
    anatomy = dissect(OnnxFile(path))
    assert anatomy.optional == []
    assert anatomy.hidden == ["GRU 'GRU[0]'"]


def exit_code(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """What the command returns for a file, and what it prints."""
    code = main(["inspect", str(path), *more])
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


def test_what_the_server_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Operators that nobody knows, data outside the folder: exit code 3, no proposal, nothing written."""
    text = """g (float[N, 3] x, float[N, 4] h_in) => (float[N, 4] h_out, float[N, 1] y) {
        a = my.ops.Magic(x)  s = Add(a, h_in)  h_out = Tanh(s)  y = MatMul(h_out, D)
    }"""
    unknown = model(text, {"D": draw(4, 1)})
    unknown.opset_import.append(helper.make_opsetid("my.ops", 1))
    outside = model(text.replace("my.ops.Magic(x)", "MatMul(x, A)"), {"A": draw(3, 4), "D": draw(4, 1)})
    array = outside.graph.initializer[0]
    array.ClearField("raw_data")
    array.data_location = onnx.TensorProto.EXTERNAL
    array.external_data.add(key="location", value="../../secret.bin")
    for name, graph, says in (
        ("unknown", unknown, "is a Magic of domain 'my.ops', which onnxruntime does not bring along"),
        ("outside", outside, "is outside the model's folder"),
    ):
        path = place(tmp_path, name, graph)
        code, printed = exit_code(path, capsys, "--write")
        assert code == 3
        assert "The server refuses the file, whatever a model.yaml says: " in printed
        assert says in printed
        assert "inputs:" not in printed
        assert not (tmp_path / name / "model.yaml").exists()


def test_no_output_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every output could be a state's, that is to be decided and not left to the server's words."""
    path = place(tmp_path, "any", model(DENOISER.replace(", float[N, 1] vad", ""), DENOISER_WEIGHTS))
    code, printed = exit_code(path, capsys)
    assert code == 3
    assert "# decide: which outputs are served; each of them could be a state's" in printed


def test_a_refusal_without_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A proposal that is whole and is refused all the same is no success: exit code 3, and why."""
    path = write_lstm(tmp_path / "a.onnx", state=(1, 4, H))
    code, printed = exit_code(path, capsys)
    assert code == 3
    assert "would refuse it all the same: model.yaml: " in printed
    assert "a batch of 4 baked into" in printed


def test_beside_how_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model.yaml that describes no graph keeps its keys and its comments, and gets the proposal."""
    path = write_lstm(tmp_path / "tagger/1/model.onnx")
    yaml_file = tmp_path / "tagger/model.yaml"
    yaml_file.write_text("# ours\nversions: {latest: 2}")
    assert exit_code(path, capsys, "--write")[0] == 0
    assert yaml_file.read_text().startswith("# ours\nversions: {latest: 2}\n\n# Proposed by")
    description = read(tmp_path / "tagger")
    assert description is not None
    assert description.versions is not None
    assert (description.versions.latest, len(description.states)) == (2, 2)

    yaml_file.write_text("{versions: {latest: 2}}")
    code, printed = exit_code(path, capsys, "--write")
    assert code == 2
    assert "nothing can be added at its end" in printed
    assert yaml_file.read_text() == "{versions: {latest: 2}}"


def test_a_description_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is held against the file: taken, refused with the server's words, or no description at all."""
    path = write_cell(tmp_path / "cell/1/model.onnx")
    good = """\
inputs: {x: {batch_axis: 0}}
states: [{input: h_in, output: h_out, batch_axis: 0}, {input: c_in, output: c_out, batch_axis: 0}]
outputs: {y: {batch_axis: 0}}
"""
    for text, code, says in (
        (good, 0, "The server would take"),
        (good.replace("c_in", "d_in"), 3, "the graph has no input 'd_in'"),
        ("inputs: [", 3, "model.yaml is not valid"),
    ):
        (tmp_path / "cell/model.yaml").write_text(text)
        found = exit_code(path, capsys)
        assert found[0] == code
        assert says in found[1]
    path = graphs.write_lstm(tmp_path)
    path.parents[1].joinpath("model.yaml").write_text(good)
    code, printed = exit_code(path, capsys)
    assert code == 3
    assert "describes its graph too" in printed


def test_a_manifest_does_not_speak_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences and markup out of a file's manifest are shown, not obeyed; and what it claims is called so."""
    path = graphs.write_lstm(tmp_path)
    file = onnx.load(path)
    (entry,) = file.metadata_props
    manifest = json.loads(entry.value)
    bad = "a [/b] \x1b]0;title\x07"
    row = {"case": bad, "batch": 1, "steps": 1, "outputs": 0.0, "states": 0.0, "bound": 1e-6}
    manifest["parity"] = {"reference": bad, "provider": bad, "rows": [row]}
    manifest["layers"] = [{"cell": bad, "input_size": 1, "hidden_size": 1, "activation": bad}]
    entry.value = json.dumps(manifest)
    onnx.save(file, path)
    code, printed = exit_code(path, capsys)
    assert code == 0
    assert "\x1b" not in printed
    assert printed.count(r"a [/b] \x1b]0;title\x07") >= 4
    assert "as the file says; python -m export verify FILE holds the file against it" in printed
    assert "Exported here" not in printed


def test_a_repository_called_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's name is a name when what was written is told."""
    for name in ("[/b]", "[runs 2024]"):
        path = write_lstm(tmp_path / name / "tagger/1/model.onnx")
        code, printed = exit_code(path, capsys, "--write")
        assert code == 0
        assert f"written {tmp_path / name}/tagger/model.yaml" in printed
