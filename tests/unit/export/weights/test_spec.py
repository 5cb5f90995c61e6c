"""Specs of weights from elsewhere: what is wrong with one is told in a line that names the place."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import export.arguments
from export.__main__ import main
from export.errors import ExportError, VerificationFailed
from export.weights.given_outputs import check_outputs
from export.weights.model import read_model
from export.weights.own_arrays import PARTS
from export.weights.spec import HeadSource, Initial, LayerSource, WeightsSpec
from tests.unit.export.weights.elsewhere import KERAS, Arrays, H, I, drawn, gates, save, write

T = 9
OWN = "{cell: lstm, product: x @ W, gates: i f c o, arrays: {W_x: W, W_h: U, b: b}}"
GRU = "{cell: gru, product: x @ W, reset: before, arrays: {W_x: 'W{gate}', W_h: 'U{gate}', b: 'b{gate}'}}"
GOOD = drawn({"W": (I, 4 * H), "U": (H, 4 * H), "b": (4 * H,)})
GOOD_GRU = gates("rzh")
TWO_MODULES = drawn({"a.weight_ih_l0": (4 * H, I), "b.weight_ih_l0": (4 * H, I)})

SPECS = {
    "no mapping": ("- 3", "expected a mapping with some of the keys weights, layers"),
    "no YAML": ("weights: [", "while parsing a flow node"),
    "no weights": (f"layers: [{OWN}]", "weights: is missing"),
    "no layers": ("weights: w.npz\nlayers: []", "layers: List should have at least 1 item"),
    "an unknown key": (f"wights: w.npz\nlayers: [{OWN}]", "unknown key 'wights', expected some of weights, layers"),
    "an unknown key below": ("weights: w.npz\nlayers: [{cel: gru}]", "layers[0]: unknown key 'cel', expected some of"),
    "a key that is no text": ("weights: w.npz\nlayers: [{on: gru}]", "layers[0]: unknown key 'on'"),
    "a key twice": ("weights: w.npz\nlayers: [{cell: gru, arrays: {b: b, b: c}}]", "'b' stands twice"),
    "gates that are null": (
        "weights: w.npz\nlayers: [{cell: gru, reset: before, product: x @ W, gates: null, arrays: {W_x: W, W_h: U}}]",
        "layers[0]: arrays.W_x: gates is missing",
    ),
    "a size that is a bool": (
        f"weights: w.npz\nlayers: [{OWN[:-1]}, hidden_size: yes}}]",
        "layers[0].hidden_size: expected a whole number, got True",
    ),
    "an unknown cell": ("weights: w.npz\nlayers: [{cell: lsmt}]", "layers[0].cell: expected 'rnn', 'lstm'"),
    "a size that is none": (
        f"weights: w.npz\nlayers: [{OWN[:-1]}, hidden_size: 0}}]",
        "layers[0].hidden_size: expected a number greater than or equal to 1, got 0",
    ),
    "no layout, no arrays": ("weights: w.npz\nlayers: [{cell: gru}]", "layers[0]: expected a layout and a prefix, or"),
    "no product": ("weights: w.npz\nlayers: [{cell: rnn, arrays: {W_x: W}}]", "product is missing"),
    "a layout and a product": (
        "weights: w.npz\nlayers: [{cell: rnn, layout: keras, product: x @ W}]",
        "product and gates are not to be said: layout keras fixes both",
    ),
    "gates of another cell": (
        f"weights: w.npz\nlayers: [{OWN.replace('i f c o', 'r z h')}]",
        "gates are 'rzh', expected i f c o in the arrays' order",
    ),
    "a reset of an LSTM": (
        f"weights: w.npz\nlayers: [{OWN[:-1]}, reset: after}}]",
        "reset and inverted_update are for",
    ),
    "a name that is none": (
        "weights: w.npz\nlayers: [{cell: rnn, product: x @ W, arrays: {W_x: 3}}]",
        "layers[0].arrays.W_x: expected the name of an array, a name with {gate} in it, or a mapping",
    ),
    "a head without a product": (
        f"weights: w.npz\nlayers: [{OWN}]\nhead: {{arrays: {{W: b}}}}",
        "head: expected a layout and a prefix; or arrays W and b by name, and a product",
    ),
    "aliases of aliases": (
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases are not taken",
    ),
}


@pytest.mark.parametrize(("spec", "says"), SPECS.values(), ids=SPECS.keys())
def test_specs_that_are_none(spec: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line: the place in the spec, what was wrong, what was expected."""
    assert main(["from-weights", str(write(tmp_path, spec, w_npz=GOOD)), "--output", str(tmp_path / "out.onnx")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m export from-weights: {tmp_path / 'spec.yaml'}: ")
    assert says in line
    assert len(line) < 500


ARRAYS: dict[str, tuple[str, Arrays, str]] = {
    "missing": (
        f"layers: [{OWN.replace('W_x: W', 'W_x: V')}]",
        GOOD,
        "layers[0]: there is no array 'V'; there are W [3, 16], U [4, 16], b [16]",
    ),
    "misspelt": (
        f"layers: [{OWN.replace('b: b', 'b: bais')}]",
        GOOD | {"bias": GOOD["b"]},
        "layers[0]: there is no array 'bais'; did you mean 'bias'?",
    ),
    "left over": (
        f"layers: [{OWN.replace(', b: b', '')}]",
        GOOD,
        "arrays are left over: b [16]; expected each to be of use in the spec, or under 'ignore'",
    ),
    "not finite": (f"layers: [{OWN}]", GOOD | {"b": np.full(4 * H, np.nan, np.float32)}, "'b' holds NaN or infinity"),
    "integers": (
        f"layers: [{OWN}]",
        GOOD | {"b": np.zeros(4 * H, np.int64)},
        "'b' is int64, expected floating point",
    ),
    "the other product": (
        f"layers: [{OWN}]",
        GOOD | {"W": GOOD["W"].T},
        "'W' has shape [16, 3], expected [3, 16] with product x @ W; it would fit product: W @ x",
    ),
    "a shape": (
        f"layers: [{OWN}]",
        GOOD | {"U": GOOD["U"][:, :-1]},
        "arrays.W_h: 'U' has shape [4, 15], expected [4, 16]",
    ),
    "a matrix that is none": (f"layers: [{OWN}]", GOOD | {"W": GOOD["b"]}, "'W' has shape [16], expected a matrix"),
    "a bias": (f"layers: [{OWN}]", GOOD | {"b": GOOD["b"][1:]}, "arrays.b: 'b' has shape [15], expected [16]"),
    "joined the other way": (
        "layers: [{cell: lstm, product: W @ x, gates: i f c o, arrays: {W_xh: W}}]",
        {"W": np.zeros((I + H, 4 * H), np.float32)},
        "arrays.W_xh: the shape is [7, 16], expected [H, I + H] for each gate with product W @ x",
    ),
    "a size that was said": (
        f"layers: [{OWN[:-1]}, hidden_size: 5}}]",
        GOOD,
        "arrays.W_x: 'W' has shape [3, 16], expected [2, 20]",
    ),
    "a direction that was said": (
        f"layers: [{OWN[:-1]}, bidirectional: true}}]",
        GOOD,
        "layers[0]: bidirectional: true in the spec, false by the arrays",
    ),
    "no order of gates": (
        f"layers: [{OWN.replace('gates: i f c o, ', '')}]",
        GOOD,
        "arrays.W_x: gates is missing, the order in which 'W' stacks them; i f c o, for example",
    ),
    "an unknown part": (
        f"layers: [{OWN.replace('W_x:', 'Wx:')}]",
        GOOD,
        "layers[0]: arrays: unknown part 'Wx', expected some of W_x, W_h",
    ),
    "half of the matrices": (f"layers: [{OWN.replace('W_h: U, ', '')}]", GOOD, "of matrices there are W_x; expected"),
    "an unknown gate": (
        f"layers: [{GRU.replace(chr(39) + 'b{gate}' + chr(39), '{r: br, i: bz}')}]",
        GOOD_GRU,
        "layers[0]: arrays.b: unknown gate 'i', expected some of r z h",
    ),
    "a gate that is missing": (
        f"layers: [{GRU.replace(chr(39) + 'U{gate}' + chr(39), '{r: Ur, z: Uz}')}]",
        GOOD_GRU,
        "layers[0]: arrays.W_h: gate h is missing, expected r z h",
    ),
    "peepholes of none": (
        f"layers: [{OWN.replace('b: b', 'V: b')}]",
        GOOD,
        "layers[0]: arrays.V: a cell lstm has no peepholes",
    ),
    "peepholes that are missing": (
        f"layers: [{OWN.replace('cell: lstm', 'cell: lstm_peephole')}]",
        GOOD,
        "layers[0]: arrays.V: gate i is missing, expected i f o",
    ),
    "no reset": (f"layers: [{GRU.replace('reset: before, ', '')}]", GOOD_GRU, "layers[0]: reset is missing"),
    "layers that do not fit": (
        f"layers: [{GRU}, {GRU}]",
        GOOD_GRU,
        "layers[1]: takes 3 values, the layer below gives 4",
    ),
    "an initial state": (
        f"layers: [{GRU[:-1]}, initial: {{h: Wr}}}}]",
        GOOD_GRU,
        "layers[0]: initial.h: the shape is [3, 4], expected [1, 1, 4]",
    ),
    "an initial cell state of a GRU": (
        f"layers: [{GRU[:-1]}, initial: {{c: br}}}}]",
        GOOD_GRU,
        "layers[0]: initial.c: a cell gru has no cell state",
    ),
    "a head": (
        f"layers: [{GRU}]\nhead: {{product: x @ W, arrays: {{W: Wr}}}}",
        GOOD_GRU,
        "head: 'Wr' has shape [3, 4], expected [4, O]: the top layer gives 4 values",
    ),
    "an embedding": (f"layers: [{GRU}]\nembedding: Ur", GOOD_GRU, "embedding: 'Ur' has shape [4, 4], expected [V, 3]"),
    "nothing under a prefix": (
        "layers: [{cell: gru, layout: keras, prefix: gru}]",
        GOOD,
        "layers[0]: prefix: nothing in layout keras stands under 'gru'; there are W [3, 16]",
    ),
    "two modules": (
        "layers: [{cell: lstm, layout: torch}]",
        TWO_MODULES,
        "layers[0]: prefix is missing: there are recurrent modules under ['a.', 'b.']",
    ),
    "a short prefix": (
        "layers: [{cell: lstm, layout: keras}]",
        {"one/kernel": GOOD["W"], "two/kernel": GOOD["W"]},
        "layers[0]: prefix: both 'one/kernel' and 'two/kernel' could be 'kernel'; expected a longer prefix",
    ),
    "another cell": (
        "layers: [{cell: gru, layout: torch}]",
        drawn({"weight_ih_l0": (4 * H, I), "weight_hh_l0": (4 * H, H)}),
        "layers[0]: cell: the spec says gru, the arrays are those of torch's lstm",
    ),
    "a GRU without biases": (
        "layers: [{cell: gru, layout: keras}]",
        {"kernel": GOOD["W"][:, : 3 * H], "recurrent_kernel": GOOD["U"][:, : 3 * H]},
        "layers[0]: reset is missing: these arrays do not tell",
    ),
    "a bias of Keras' on cuDNN": (
        "layers: [{cell: lstm, layout: keras}]",
        {**KERAS, "bias": np.zeros(8 * H, np.float32)},
        "layers[0]: 'bias', which is 'bias', has shape [32], expected [16]",
    ),
    "relu in Keras' LSTM": (
        "layers: [{cell: lstm, layout: keras, activation: relu}]",
        KERAS,
        "layers[0]: layout 'keras' cannot hold relu for the candidate of cell 'lstm'",
    ),
    "the last of both directions, in Keras": (
        "layers: [{cell: lstm, layout: keras}]\noutput: last",
        {f"{side}/{name}": array for side in ("forward", "backward") for name, array in KERAS.items()},
        "output: a Bidirectional layer of Keras without return_sequences",
    ),
}


@pytest.mark.parametrize(("spec", "arrays", "says"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_that_do_not_fit(
    spec: str, arrays: Arrays, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that names the array, what it is and what was expected; nothing is written."""
    path = write(tmp_path, f"weights: w.npz\n{spec}", w_npz=arrays)
    assert main(["from-weights", str(path), "--output", str(tmp_path / "out.onnx")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m export from-weights: {path}: ")
    assert says in line
    assert not (tmp_path / "out.onnx").exists()


def test_what_needs_no_mention(tmp_path: Path) -> None:
    """Whole numbers and single ones are weights of nothing, as the document says; a vector has to be named."""
    passed = {"optimizer/vars/0": np.array(7), "rate": np.array(1e-3), "seed": np.arange(2, dtype=np.uint32)}
    text = f"weights: w.npz\nlayers: [{OWN}]"
    read_model(write(tmp_path, text, w_npz=GOOD | passed))
    with pytest.raises(ExportError, match=r"arrays are left over: more \[1\]"):
        read_model(write(tmp_path, text, w_npz=GOOD | passed | {"more": np.zeros(1)}))


def test_files_that_do_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spec that is not there or too long, a file that is not there or of no known kind, a name in two files."""
    save(tmp_path / "w.npz", GOOD)
    np.savez(tmp_path / "again.npz", b=GOOD["b"])
    (tmp_path / "w.pkl").write_bytes(b"")
    (tmp_path / "long.yaml").write_text("#" * (2**20 + 1))
    for name, weights, says in (
        ("none.yaml", None, "none.yaml: No such file"),
        ("long.yaml", None, "long.yaml is over 1048576 bytes"),
        ("spec.yaml", "none.npz", "weights: [Errno 2] No such file"),
        ("spec.yaml", "w.pkl", "w.pkl: unknown kind of checkpoint"),
        ("spec.yaml", "[w.npz, again.npz]", "weights: again.npz has 'b', and so has a file before it"),
    ):
        if weights:
            write(tmp_path, f"weights: {weights}\nlayers: [{OWN}]")
        assert main(["from-weights", str(tmp_path / name), "--output", str(tmp_path / "out.onnx")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_what_the_model_gave_has_to_be_of_its_form(tmp_path: Path) -> None:
    """Outputs of another shape are refused, and are no failed verification."""
    spec, weights = read_model(write(tmp_path, f"weights: w.npz\nlayers: [{OWN}]\noutput: last", w_npz=GOOD))
    data = {"x": np.zeros((1, T, I)), "y": np.zeros((1, T, H))}
    with pytest.raises(
        ExportError, match=r"data: y is float64 of shape \(1, 9, 4\), expected numbers \(1, 4\)"
    ) as refusal:
        check_outputs(spec, weights, data)
    assert not isinstance(refusal.value, VerificationFailed)


def test_the_help_s_specs_are_specs(capsys: pytest.CaptureFixture[str]) -> None:
    """The page shows the examples whole; each of them is a spec, and together they have every key that there is."""
    text = (Path(export.arguments.__file__).parent / "weights/example.yaml").read_text()
    for document in yaml.safe_load_all(text):
        WeightsSpec.model_validate(document)
    for section in (WeightsSpec, LayerSource, HeadSource, Initial):
        for key in section.model_fields:
            assert re.search(rf"\b{key}\b", text), key
    for part in PARTS:
        assert part in text
    with pytest.raises(SystemExit) as done:
        main(["from-weights", "--help"])
    assert done.value.code == 0
    page = capsys.readouterr().out
    assert all(line in page for line in text.splitlines())
