"""Weights from elsewhere: what is exported of them computes what a textbook's loop over the same arrays computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.__main__ import main
from export.describe import initial_state, read_manifest
from export.weights.given_outputs import check_outputs
from export.weights.model import read_model
from models.layouts import convert
from models.reference import run_model
from models.spec import Layer
from tests.unit.export.weights import textbook
from tests.unit.export.weights.elsewhere import KERAS, LSTM, Array, Arrays, H, I, drawn, gates, joined, save, write

T = 9
BOUND = 2e-6
X = np.random.default_rng(7).standard_normal((T, I)).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A spec, the arrays that it names, and the loop that says what they compute.

    Attributes:
        step: one step of the textbook's.
        w: the weights as the textbook has them.
        spec: SPEC.yaml without ``weights``.
        file: the name of the file that holds the weights.
        arrays: what stands in the file; None for the textbook's own.
        start: the initial h and c.
    """

    step: textbook.Step
    w: Arrays
    spec: str
    file: str = "w.npz"
    arrays: Arrays | None = None
    start: tuple[Array, Array] = field(default=(np.zeros(H), np.zeros(H)))


ELMAN = drawn({"Wxh": (I, H), "Whh": (H, H), "bx": (H,), "bh": (H,)})
GRU_AFTER = gates("rzn", cr=(H,), cz=(H,), cn=(H,))
OLAH = drawn({f"{part}{gate}": (H, n) for gate in "fiCo" for part, n in (("W", H + I), ("b", 1))})
COUPLED = gates("fgo", pf=(H,), po=(H,))
START = drawn({"h": (H,), "c": (H,)}, seed=5)

CASES = {
    "one matrix a gate, [in, hidden]; a learned initial state": Case(
        textbook.lstm,
        LSTM,
        """
        layers:
          - cell: lstm
            product: x @ W
            arrays:
              W_x: {i: Wi, f: Wf, c: Wg, o: Wo}
              W_h: {i: Ui, f: Uf, c: Ug, o: Uo}
              b: {i: bi, f: bf, c: bg, o: bo}
            initial: {h: h_start, c: c_start}
        """,
        arrays=LSTM | {"h_start": START["h"][None], "c_start": START["c"]},
        start=(START["h"], START["c"]),
    ),
    "one matrix for [h, x], biases as columns, safetensors": Case(
        textbook.lstm_joined,
        OLAH,
        """
        layers:
          - cell: lstm
            product: W @ x
            arrays: {W_hx: {i: Wi, f: Wf, c: WC, o: Wo}, b: {i: bi, f: bf, c: bC, o: bo}}
        """,
        file="w.safetensors",
    ),
    "peepholes": Case(
        textbook.lstm_peephole,
        gates("ifgo", pi=(H,), pf=(H,), po=(H,)),
        """
        layers:
          - cell: lstm_peephole
            product: x @ W
            arrays:
              W_x: {i: Wi, f: Wf, c: Wg, o: Wo}
              W_h: {i: Ui, f: Uf, c: Ug, o: Uo}
              b: {i: bi, f: bf, c: bg, o: bo}
              V: "p{gate}"
        """,
    ),
    "coupled, f = 1 - i": Case(
        textbook.lstm_forgets_what_it_writes,
        gates("igo"),
        """
        layers:
          - cell: lstm_coupled
            product: x @ W
            arrays: {W_x: {i: Wi, c: Wg, o: Wo}, W_h: {i: Ui, c: Ug, o: Uo}, b: {i: bi, c: bg, o: bo}}
        """,
    ),
    "coupled, i = 1 - f, with peepholes; gates stacked in rows": Case(
        textbook.lstm_writes_what_it_forgets,
        COUPLED,
        """
        layers:
          - cell: lstm_coupled
            product: W @ x
            gates: o f c
            arrays: {W_x: W, W_h: U, b: b, V: p}
        """,
        arrays={
            "W": joined(COUPLED, "W", "ofg", 1).T.copy(),
            "U": joined(COUPLED, "U", "ofg", 1).T.copy(),
            "b": joined(COUPLED, "b", "ofg", 0)[None],
            "p": joined(COUPLED, "p", "of", 0),
        },
    ),
    "an inverted update gate, reset before": Case(
        textbook.gru_inverted,
        gates("urh"),
        """
        layers:
          - cell: gru
            reset: before
            inverted_update: true
            product: x @ W
            arrays:
              W_x: {z: Wu, r: Wr, h: Wh}
              W_h: {z: Uu, r: Ur, h: Uh}
              b: {z: bu, r: br, h: bh}
        """,
    ),
    "a GRU with two biases, reset after": Case(
        textbook.gru_after,
        GRU_AFTER,
        """
        layers:
          - cell: gru
            reset: after
            product: x @ W
            arrays:
              W_x: {r: Wr, z: Wz, h: Wn}
              W_h: {r: Ur, z: Uz, h: Un}
              b: {r: br, z: bz, h: bn}
              b_h: {r: cr, z: cz, h: cn}
        """,
    ),
    "relu, two biases": Case(
        textbook.elman_relu,
        ELMAN,
        """
        layers:
          - {cell: rnn, activation: relu, product: x @ W, arrays: {W_x: Wxh, W_h: Whh, b: bx, b_h: bh}}
        """,
    ),
    "Keras 3, .weights.h5": Case(
        textbook.lstm,
        LSTM,
        """
        layers:
          - {cell: lstm, layout: keras, prefix: layers/lstm}
        """,
        file="w.weights.h5",
        arrays={f"layers/lstm/cell/vars/{place}": array for place, array in enumerate(KERAS.values())}
        | {"layers/lstm/cell/seed_generator/vars/0": np.zeros(2, np.uint32), "optimizer/vars/1": np.array(1e-3)},
    ),
}


def export_case(case: Case, folder: Path) -> Path:
    """Write a case's spec and arrays, and export it."""
    save(folder / case.file, case.w if case.arrays is None else case.arrays)
    spec, file = folder / "spec.yaml", folder / "model.onnx"
    spec.write_text(f"weights: {case.file}\n" + "\n".join(line[8:] for line in case.spec.splitlines()))
    assert main(["from-weights", str(spec), "--output", str(file)]) == 0
    return file


def run_file(file: Path, x: Array) -> tuple[Array, dict[str, Array]]:
    """Run an exported model in onnxruntime over one sequence, from the initial state that its manifest has."""
    manifest = read_manifest(onnx.load(file))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {state.input: initial_state(state, 1) for state in manifest.states}
    feed |= {"x": x[:, None], "lengths": np.array([len(x)], np.int32)}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    return found.pop("y")[:, 0], found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_textbook_s_loop_is_what_is_exported(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outputs and final states of the file, in onnxruntime, are those of the loop over the same arrays."""
    file = export_case(case, tmp_path)
    y, states = run_file(file, X)
    expected, h, c = textbook.run(case.step, case.w, X, *case.start)
    np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND)
    np.testing.assert_allclose(states["hT"][0, 0], h, rtol=0, atol=BOUND)
    if "cT" in states:
        np.testing.assert_allclose(states["cT"][0, 0], c, rtol=0, atol=BOUND)


def test_a_stack_of_own_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells of different kinds and sizes, two directions, two files, a head, a learned initial state in one layer."""
    below, above = gates("urh", I, 5), gates("ifgo", 5, 2, seed=1)
    backward, start = gates("ifgo", 5, 2, seed=2), drawn({"start": (5,)})["start"]
    head = drawn({"Why": (4, 3), "by": (1, 3)}, seed=3)
    lstm = """{W_x: "%sW{gate}", W_h: "%sU{gate}", b: {i: %sbi, f: %sbf, c: %sbc, o: %sbo}}"""
    spec = f"""
weights: [below.npz, above.npz]
layers:
  - cell: gru
    reset: before
    inverted_update: true
    product: x @ W
    arrays: {{W_x: {{z: Wu, r: Wr, h: Wh}}, W_h: {{z: Uu, r: Ur, h: Uh}}, b: {{z: bu, r: br, h: bh}}}}
    initial: {{h: start}}
    input_size: 3
    hidden_size: 5
  - cell: lstm
    product: x @ W
    prefix: fw.
    arrays: {lstm % (("",) * 6)}
    bidirectional: true
    backward: {{arrays: {lstm % (("bw.",) * 6)}}}
head: {{product: x @ W, arrays: {{W: Why, b: by}}}}
"""
    sides = {
        f"{side}.{name.replace('g', 'c')}": array
        for side, arrays in (("fw", above), ("bw", backward))
        for name, array in arrays.items()
    }
    path = write(tmp_path, spec, below_npz=below | {"start": start}, above_npz=sides | head)
    assert main(["from-weights", str(path), "--output", str(tmp_path / "model.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "layer 2: lstm 5 -> 2, bidirectional" in printed
    assert " ".join(printed.split()).endswith("give --data with x and y to do so")
    y, states = run_file(tmp_path / "model.onnx", X)

    zeros = np.zeros(2)
    middle, h_1, _ = textbook.run(textbook.gru_inverted, below, X, start, start)
    forward, h_2, c_2 = textbook.run(textbook.lstm, above, middle, zeros, zeros)
    reverse, h_3, c_3 = textbook.run(textbook.lstm, backward, middle[::-1], zeros, zeros)
    expected = np.concatenate([forward, reverse[::-1]], axis=1) @ head["Why"] + head["by"]
    np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND)
    final = {"hT_1": h_1, "hT_2": h_2, "cT_2": c_2, "hT_2_reverse": h_3, "cT_2_reverse": c_3}
    assert states.keys() == final.keys()
    for name, state in final.items():
        np.testing.assert_allclose(states[name][0], state, rtol=0, atol=BOUND)
    assert main(["verify", str(tmp_path / "model.onnx")]) == 0


def test_a_torch_model_by_its_prefixes(tmp_path: Path) -> None:
    """Embedding, a module of two layers and directions with a learned state, and a linear layer, in a state dict."""

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = torch.nn.Conv1d(1, 1, 1)
            self.norm = torch.nn.BatchNorm1d(1)
            self.embed = torch.nn.Embedding(11, I)
            self.gru = torch.nn.GRU(I, H, 2, batch_first=True, bidirectional=True)
            self.fc = torch.nn.Linear(2 * H, 2, bias=False)
            self.h0 = torch.nn.Parameter(torch.rand(4, 1, H))

    torch.manual_seed(0)
    net = Tagger()
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "net.pt")
    path = write(
        tmp_path,
        """
weights: net.pt
embedding: embed.weight
layers:
  - {cell: gru, layout: torch, prefix: gru., initial: {h: h0}}
head: {layout: torch, prefix: fc}
ignore: [cnn.*, norm.*]
""",
    )
    ids = np.random.default_rng(0).integers(0, 11, (1, T))
    with torch.no_grad():
        outputs, h = net.gru(net.embed(torch.from_numpy(ids)), net.h0)
        expected = net.fc(outputs)[0].numpy()
    np.savez(tmp_path / "data.npz", x=ids, y=expected[None])
    arguments = ["--output", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz")]
    assert main(["from-weights", str(path), *arguments]) == 0
    y, states = run_file(tmp_path / "model.onnx", ids[0])
    np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND)
    np.testing.assert_allclose(states["hT"], h.numpy(), rtol=0, atol=BOUND)


def keras_gru(seed: int) -> tuple[Arrays, Arrays]:
    """A GRU as the textbook and as Keras have it: z r h, kernels [I, 3H], two biases in the rows of one array."""
    w = gates("rzn", seed=seed, cr=(H,), cz=(H,), cn=(H,))
    biases = np.stack([joined(w, "b", "zrn", 0), joined(w, "c", "zrn", 0)])
    return w, {"kernel:0": joined(w, "W", "zrn", 1), "recurrent_kernel:0": joined(w, "U", "zrn", 1), "bias:0": biases}


def test_a_keras_model_by_its_prefixes(tmp_path: Path) -> None:
    """A Bidirectional GRU and a Dense layer, in a file with the names of Keras 2; two layers' names begin alike."""
    (w, forward), (v, backward) = keras_gru(0), keras_gru(1)
    dense, other = drawn({"kernel:0": (2 * H, 2), "bias:0": (2,)}), drawn({"kernel:0": (2, 2), "bias:0": (2,)})
    files = {
        "model_weights/both/both/forward_gru/gru_cell_1/": forward,
        "model_weights/both/both/backward_gru/gru_cell_2/": backward,
        "model_weights/dense/dense/": dense,
        "model_weights/dense_1/dense_1/": other,
    }
    arrays = {prefix + name: array for prefix, part in files.items() for name, array in part.items()}
    path = write(
        tmp_path,
        """
weights: model.h5
layers:
  - {cell: gru, layout: keras, prefix: model_weights/both}
head: {layout: keras, prefix: model_weights/dense}
ignore: model_weights/dense_1/*
""",
        model_h5=arrays,
    )
    spec, weights = read_model(path)
    assert spec.layers == (Layer("gru", I, H, bidirectional=True, reset="after"),)
    y, _ = run_model(spec, weights, X[None].astype(np.float64))
    zeros = np.zeros(H)
    hs, *_ = textbook.run(textbook.gru_after, w, X, zeros, zeros)
    reverse, *_ = textbook.run(textbook.gru_after, v, X[::-1], zeros, zeros)
    expected = np.concatenate([hs, reverse[::-1]], axis=1) @ dense["kernel:0"].astype(float) + dense["bias:0"]
    np.testing.assert_allclose(y[0], expected, rtol=0, atol=1e-12)


KERAS_FILES = {
    "stack.weights.h5": """
layers:
  - {cell: gru, layout: keras, prefix: layers/gru}
  - {cell: gru, layout: keras, prefix: layers/gru_1}
head: {layout: keras, prefix: layers/dense}
""",
    "both.h5": """
layers:
  - {cell: lstm, layout: keras, prefix: model_weights/bidirectional}
  - {cell: lstm, layout: keras, prefix: model_weights/bidirectional_1, bidirectional: true}
head: {layout: keras, prefix: model_weights/dense_1}
""",
    "trained.weights.h5": """
layers:
  - {cell: rnn, layout: keras, prefix: layers/simple_rnn, activation: relu}
head: {layout: keras, prefix: layers/dense}
output: last
ignore: optimizer/*
""",
}


@pytest.mark.parametrize(("file", "spec"), KERAS_FILES.items(), ids=KERAS_FILES.keys())
def test_files_that_keras_wrote(file: str, spec: str, tmp_path: Path) -> None:
    """Files of Keras itself, read by prefixes alone, are models that give what Keras gave."""
    folder = Path(__file__).parent / "from_keras"
    model, weights = read_model(write(tmp_path, f"weights: {folder / file}{spec}"))
    with np.load(folder / "outputs.npz") as outputs:
        data = {"x": outputs["x"], "y": outputs[file.partition(".")[0]]}
    assert check_outputs(model, weights, data) < 1e-6


LIBRARIES: dict[str, tuple[Any, Layer, str]] = {
    "onnx": ("onnx", Layer("lstm_peephole", I, H, bidirectional=True), "rnn_"),
    "onnx, one direction": ("onnx", Layer("gru", I, H, reset="after"), ""),
    "fused": ("fused", Layer("lstm_coupled", I, H, peepholes=True, bidirectional=True), "layers.0."),
    "fused, reset after": ("fused", Layer("gru", I, H, reset="after", activation="relu"), "layers.0."),
    "matrices": ("matrices", Layer("lstm", I, H, bias=False, bidirectional=True), ""),
    "matrices, coupled": ("matrices", Layer("lstm_coupled", I, H, bias=False), "cell/"),
    "keras, no bias": ("keras", Layer("gru", I, H, bias=False, reset="after"), "gru/"),
    "torch, no bias": ("torch", Layer("rnn", I, H, bias=False, activation="relu", bidirectional=True), "net.rnn."),
}


@pytest.mark.parametrize(("layout", "layer", "prefix"), LIBRARIES.values(), ids=LIBRARIES.keys())
def test_layouts_are_found_by_their_names(layout: Any, layer: Layer, prefix: str, tmp_path: Path) -> None:
    """A layer's arrays in each layout, under a prefix, come back as they were, with all that the arrays tell."""
    weights = drawn(layer.weight_shapes)
    theirs = convert(weights, layer, source="fused", target=layout)
    path = write(
        tmp_path,
        f"weights: w.npz\nlayers:\n  - {{cell: {layer.cell}, layout: {layout}, prefix: '{prefix}', "
        f"activation: {layer.activation}{', reset: after' if layer.reset == 'after' else ''}}}",
        w_npz={prefix + name: array for name, array in theirs.items()},
    )
    spec, read = read_model(path)
    assert spec.layers == (layer,)
    for name, array in weights.items():
        np.testing.assert_array_equal(read[f"layers.0.{name}"], array)


def test_a_torch_cell_and_arrays_by_the_layout_s_names(tmp_path: Path) -> None:
    """A GRUCell, whose names have no layer; and arrays with names of nobody, each said to be one of the layout's."""
    cell = torch.nn.GRUCell(I, H)
    torch.save(cell.state_dict(), tmp_path / "cell.pt")
    spec, weights = read_model(write(tmp_path, "weights: cell.pt\nlayers: [{cell: gru, layout: torch}]"))
    assert spec.layers == (Layer("gru", I, H, reset="after"),)
    np.testing.assert_array_equal(weights["layers.0.W_h"], cell.weight_hh.detach().numpy())

    lstm = "{cell: lstm, layout: keras, prefix: my, arrays: {kernel: K, recurrent_kernel: R, bias: B}}"
    arrays = dict(zip(("myK", "myR", "myB"), KERAS.values(), strict=True))
    spec, weights = read_model(write(tmp_path, f"weights: w.npz\nlayers: [{lstm}]", w_npz=arrays))
    np.testing.assert_array_equal(weights["layers.0.W_x"], KERAS["kernel"].T)


def test_an_inverted_update_gate_is_exact(tmp_path: Path) -> None:
    """Of what goes into the gate every bit but the sign is kept, in torch's layout too; all else is left alone."""
    gru = torch.nn.GRU(I, H)
    torch.save(gru.state_dict(), tmp_path / "gru.pt")
    path = write(tmp_path, "weights: gru.pt\nlayers: [{cell: gru, layout: torch, inverted_update: true}]")
    _, inverted = read_model(path)
    path.write_text(path.read_text().replace("true", "false"))
    _, plain = read_model(path)
    sign = np.repeat([1, -1, 1], H)
    for name in ("W_x", "W_h", "b"):
        array = plain[f"layers.0.{name}"]
        np.testing.assert_array_equal(inverted[f"layers.0.{name}"], array * (sign if name == "b" else sign[:, None]))
    np.testing.assert_array_equal(inverted["layers.0.b_h"], plain["layers.0.b_h"])


def test_one_second_bias_is_the_candidate_s(tmp_path: Path) -> None:
    """With reset after, a second bias of H numbers stands inside the reset, and is zero where there is none."""
    spec = """
weights: w.npz
layers:
  - cell: gru
    reset: after
    product: x @ W
    arrays: {W_x: "W{gate}", W_h: "U{gate}", b: "b{gate}", b_h: inside}
"""
    w = gates("rzh", inside=(H,))
    _, weights = read_model(write(tmp_path, spec, w_npz=w))
    np.testing.assert_array_equal(weights["layers.0.b_h"], w["inside"])
    np.testing.assert_array_equal(weights["layers.0.b"], joined(w, "b", "rzh", 0))
    del w["inside"]
    _, weights = read_model(write(tmp_path, spec.replace(", b_h: inside", ""), w_npz=w))
    np.testing.assert_array_equal(weights["layers.0.b_h"], np.zeros(H))


def test_what_the_model_gave_tells_a_wrong_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gates in a wrong order are sound weights of another model: the given outputs tell, and no file is written."""
    expected, *_ = textbook.run(textbook.lstm, LSTM, X, np.zeros(H), np.zeros(H))
    np.savez(tmp_path / "data.npz", x=np.stack([X, X]), y=np.stack([expected, expected]), lengths=np.array([T, 4]))
    arrays = {"W": KERAS["kernel"], "U": KERAS["recurrent_kernel"], "b": KERAS["bias"]}
    layer = "{cell: lstm, product: x @ W, gates: %s, arrays: {W_x: W, W_h: U, b: b}}"
    output = tmp_path / "model.onnx"
    arguments = ["--output", str(output), "--data", str(tmp_path / "data.npz")]
    path = write(tmp_path, f"weights: w.npz\nlayers: [{layer % 'f i c o'}]", w_npz=arrays)
    assert main(["from-weights", str(path), *arguments]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "the model is not the one they come from" in printed
    assert "whether x or h stands first in one matrix of both (W_xh or W_hx)" in printed
    assert not output.exists()
    path.write_text(path.read_text().replace("f i c o", "i f c o"))
    assert main(["from-weights", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "the outputs given with the data are the model's" in printed
    assert "not compared" not in printed
    assert output.exists()
