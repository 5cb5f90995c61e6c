"""ONNX's own test cases for its recurrent operators, run by the reference.

Each case is one ``export_*`` method of ``onnx.backend.test.case.node.{lstm,gru,rnn}``, which hands a node with its
inputs and expected outputs to a function ``expect``; here that function is ours. A case that a newer onnx adds is run
as well.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case import node as node_cases

from models.layouts import convert
from models.reference import State, run_sequence
from models.spec import PREFIXES, Cell, Layer
from models.weights import Array, select

RTOL, ATOL = 1e-3, 1e-7
"""What ONNX itself allows in these cases."""

MODULES: dict[str, ModuleType] = {
    operator: importlib.import_module(f"{node_cases.__name__}.{operator.lower()}")
    for operator in ("LSTM", "GRU", "RNN")
}
CASES = [
    pytest.param(module, name, id=f"{operator} {name.removeprefix('export_')}")
    for operator, module in MODULES.items()
    for name in vars(getattr(module, operator))
    if name.startswith("export_")
]


def _run(node: onnx.NodeProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run one node by the reference; its outputs ``Y``, ``Y_h`` and ``Y_c`` as the operator shapes them."""
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    layout = attributes.pop("layout", 0)
    direction = attributes.pop("direction", b"forward").decode()
    hidden_size = attributes.pop("hidden_size")
    reset_after = attributes.pop("linear_before_reset", 0)
    assert not attributes, f"the case uses attributes that are not handled here: {sorted(attributes)}"

    arrays: dict[str, Array] = {name: inputs[name] for name in ("W", "R", "B", "P") if name in inputs}
    cells: dict[str, Cell] = {"LSTM": "lstm_peephole" if "P" in arrays else "lstm", "GRU": "gru", "RNN": "rnn"}
    layer = Layer(
        cells[node.op_type],
        arrays["W"].shape[2],
        hidden_size,
        bidirectional=direction == "bidirectional",
        reset="after" if reset_after else "before",
        bias="B" in arrays,
    )
    weights = convert(arrays, layer, source="onnx", target="fused")

    # Batchwise (layout 1): X[N, T, I] and initial states [N, D, H]; otherwise X[T, N, I] and [D, N, H].
    batch_first = layout == 1
    x = inputs["X"] if batch_first else inputs["X"].swapaxes(0, 1)
    given = [inputs[name] for name in ("initial_h", "initial_c") if name in inputs]
    given = [state.swapaxes(0, 1) if batch_first else state for state in given]
    outputs, states = [], []
    for d in range(layer.directions):
        start: State | None = tuple(state[d] for state in given) or None
        here = select(weights, PREFIXES[d]) if d else weights
        reverse = direction == "reverse" or d == 1
        each, state = run_sequence(layer, here, x, inputs.get("sequence_lens"), start, reverse)
        outputs.append(each)
        states.append(state)

    y = np.stack(outputs)  # [D, N, T, H]
    final = [np.stack(parts) for parts in zip(*states, strict=True)]  # h and c, each [D, N, H]
    results = {"Y": y.transpose(1, 2, 0, 3) if batch_first else y.transpose(2, 0, 1, 3)}
    for name, part in zip(("Y_h", "Y_c"), final, strict=False):
        results[name] = part.swapaxes(0, 1) if batch_first else part
    return results


@pytest.mark.parametrize(("module", "case"), CASES)
def test_case(module: ModuleType, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gives the case's expected outputs, in float32 as the case has them and in float64."""
    seen: list[tuple[onnx.NodeProto, list[Array], list[Array]]] = []

    def expect(node: onnx.NodeProto, inputs: list[Array], outputs: list[Array], name: str, **_: Any) -> None:
        seen.append((node, inputs, outputs))

    monkeypatch.setattr(module, "expect", expect)
    np.random.seed(0)  # noqa: NPY002 the cases draw from NumPy's global generator
    operator = module.__name__.rpartition(".")[2].upper()
    getattr(getattr(module, operator), case)()

    assert seen, "the case gave nothing to run"
    for node, inputs, outputs in seen:
        assert node.op_type == operator
        named = dict(zip(filter(None, node.input), inputs, strict=True))
        expected = dict(zip(filter(None, node.output), outputs, strict=True))
        for dtype in (np.float32, np.float64):
            cast = {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in named.items()}
            results = _run(node, cast)
            for name, array in expected.items():
                assert results[name].shape == array.shape
                assert results[name].dtype == dtype
                np.testing.assert_allclose(results[name], array, rtol=RTOL, atol=ATOL)


def test_no_case_is_left_out() -> None:
    """Each operator has cases, and onnx has none of them in any other file."""
    assert {case.values[0] for case in CASES} == set(MODULES.values())
    holders = {
        path.stem
        for path in Path(str(node_cases.__file__)).parent.glob("*.py")
        if re.search(r"""make_node\(\s*["'](LSTM|GRU|RNN)["']""", path.read_text(encoding="utf-8"))
    }
    assert holders == {"lstm", "gru", "rnn"}
