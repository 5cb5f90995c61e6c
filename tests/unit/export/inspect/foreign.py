"""Graphs as others write them: without a manifest, in the shapes and forms that are in use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Size = int | str | None
I, H = 3, 4

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def tensor(name: str, *sizes: Size, dtype: int = FLOAT) -> Any:
    """An input or output."""
    return helper.make_tensor_value_info(name, dtype, list(sizes))


def unsaid(name: str, dtype: int = FLOAT) -> Any:
    """An output whose axes the file does not say."""
    return helper.make_tensor_value_info(name, dtype, None)


def node(
    operator: str, inputs: Sequence[str], outputs: Sequence[str], name: str | None = None, **attributes: Any
) -> Any:
    """A node."""
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def lstm(inputs: Sequence[str], outputs: Sequence[str], name: str = "lstm", **attributes: Any) -> Any:
    """An LSTM with the weights of ``weights``."""
    return node("LSTM", inputs, outputs, name, hidden_size=H, **attributes)


def weights(gates: int = 4, input_size: int = I, more: dict[str, Any] | None = None) -> dict[str, NDArray[Any]]:
    """W and R of a recurrent operator, and other initializers: integers unless they are arrays."""
    random = np.random.default_rng(0)
    drawn = {
        "W": random.uniform(-0.5, 0.5, (1, gates * H, input_size)).astype(np.float32),
        "R": random.uniform(-0.5, 0.5, (1, gates * H, H)).astype(np.float32),
    }
    given = {
        name: value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        for name, value in (more or {}).items()
    }
    return drawn | given


def body(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """The body of an If, Loop or Scan."""
    return helper.make_graph(nodes, "body", inputs, outputs)


def write(
    path: Path,
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    initializers: dict[str, NDArray[Any]] | None = None,
    functions: Sequence[Any] = (),
    within: Sequence[Any] = (),
) -> Path:
    """Write a file that also says what tensors within it are; returns its path."""
    arrays = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    graph = helper.make_graph(list(nodes), "foreign", list(inputs), list(outputs), arrays, value_info=within)
    domains = [helper.make_opsetid("", 17), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9, functions=list(functions))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def write_lstm(
    path: Path, state: Sequence[Size] = (1, "N", H), names: Sequence[str] = ("h0", "c0", "hT", "cT")
) -> Path:
    """x[T, N, 3] -> y[T, N, 4], with h and c as inputs and outputs of their own."""
    h, c, h_out, c_out = names
    return write(
        path,
        [lstm(["x", "W", "R", "", "", h, c], ["Y", h_out, c_out]), node("Squeeze", ["Y", "one"], ["y"])],
        [tensor("x", "T", "N", I), tensor(h, *state), tensor(c, *state)],
        [tensor("y", "T", "N", H), tensor(h_out, *state), tensor(c_out, *state)],
        weights(more={"one": [1]}),
    )


def write_cell(path: Path, names: Sequence[str] = ("x", "h_in", "c_in", "y", "h_out", "c_out")) -> Path:
    """One step of something like an LSTM, out of ordinary operators: nothing in it says which state is which."""
    x, h, c, y, h_out, c_out = names
    return write(
        path,
        [
            node("Add", [x, h], ["sum"]),
            node("Sigmoid", ["sum"], ["gate"]),
            node("Mul", ["gate", c], [c_out]),
            node("Tanh", [c_out], [h_out]),
            node("MatMul", [h_out, "head"], [y]),
        ],
        [tensor(x, "N", H), tensor(h, "N", H), tensor(c, "N", H)],
        [tensor(y, "N", 1), tensor(h_out, "N", H), tensor(c_out, "N", H)],
        {"head": np.ones((H, 1), np.float32)},
    )


def write_packed(path: Path, sizes: tuple[Size, Size] = (None, None), branches: bool = True) -> Path:
    """input[N, 6], state[2, N, 4] with h and c packed, and sr: each rate's own LSTM inside a branch of an If.

    The signature is that of the speech-activity models that are most in use.
    """

    def branch(name: str) -> Any:
        return body(
            [
                lstm(["step", "W", "R", "", "", "h", "c"], [f"{name}_Y", f"{name}_h", f"{name}_c"], name),
                node("Concat", [f"{name}_h", f"{name}_c"], [f"{name}_state"], axis=0),
                node("Squeeze", [f"{name}_h", "zero"], [f"{name}_out"]),
            ],
            [],
            [unsaid(f"{name}_out"), unsaid(f"{name}_state")],
        )

    nodes = [
        node("Unsqueeze", ["input", "zero"], ["step"]),
        node("Split", ["state"], ["h", "c"], axis=0),
    ]
    nodes += [
        node("Equal", ["sr", "rate"], ["is_16k"]),
        node("If", ["is_16k"], ["out", "stateN"], "rates", then_branch=branch("fast"), else_branch=branch("slow")),
    ]
    return write(
        path,
        [*nodes, node("ReduceMean", ["out"], ["output"], axes=[1])],
        [tensor("input", sizes[0], 6), tensor("state", 2, sizes[1], H), tensor("sr", dtype=INT64)],
        [tensor("output", sizes[0], 1), tensor("stateN", 2, sizes[1], H)],
        weights(input_size=6, more={"zero": [0], "rate": 16000}),
    )
