"""Recurrent graphs as others export them, small, each with its model.yaml and a plain loop over onnxruntime.

The loop is written from the graph's own axes for each of them, and knows nothing of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
Arrays = dict[str, Array]

I, H, O = 3, 4, 2


def model(text: str, weights: Mapping[str, Array] | None = None) -> Any:
    """Return an onnx model from the text of its graph, in onnx's own notation, and its initializers."""
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def place(repository: Path, name: str, model: Any, description: str | None = None, version: int = 1) -> Path:
    """Write a model into a repository, and its description beside its versions; return the .onnx file."""
    path = repository / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    if description is not None:
        (repository / name / "model.yaml").write_text(dedent(description))
    return path


def draw(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    """Random weights."""
    return np.random.default_rng([seed, *shape]).uniform(-0.9, 0.9, shape).astype(dtype)


CELL = {"W": draw(I, H), "R": draw(H, H), "V": draw(H, O)}
"""Of h' = tanh(x W + h R), y = h' V."""
LSTM = {"W": draw(1, 4 * H, I), "R": draw(1, 4 * H, H), "B": draw(1, 8 * H), "axis": np.array([1], np.int64)}
GRU = {"W": draw(1, 3 * H, I), "R": draw(1, 3 * H, H), "axis": np.array([1], np.int64)}


def close(given: Array, expected: Array) -> None:
    """Equal to the bit where values are discrete, and as float32 or float16 may differ elsewhere."""
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    bound = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-12}.get(expected.dtype.name, 0)
    np.testing.assert_allclose(given.astype(np.float64), expected.astype(np.float64), rtol=0, atol=bound)


def _features(random: np.random.Generator, steps: int) -> Arrays:
    return {"x": random.uniform(-1, 1, (steps, I)).astype(np.float32)}


@dataclass
class Case:
    """A graph with its description.

    Attributes:
        name: what is particular to it.
        graph: its text.
        weights: its initializers.
        description: its model.yaml.
        initial: the states that a sequence begins with, by the graph's inputs, for one row.
        states: the graph's output for each of them.
        feeds: from one row's inputs [T, ...] to those of each run, in the graph's own axes.
        outputs: from the outputs of all runs to [T, ...].
        inputs: draws one row's inputs.
        row_by_row: whether it has to be run on one row at a time.
    """

    name: str
    graph: str
    weights: Mapping[str, Array]
    description: str
    initial: Arrays
    states: dict[str, str]
    feeds: Callable[[Arrays], list[Arrays]]
    outputs: Callable[[list[Arrays]], Arrays]
    inputs: Callable[[np.random.Generator, int], Arrays] = _features
    row_by_row: bool = False
    files: Arrays = field(default_factory=dict)

    def write(self, repository: Path) -> Path:
        """Write it into a repository, as model ``any``."""
        path = place(repository, "any", model(self.graph, self.weights), self.description)
        for name, array in self.files.items():
            np.save(path.parent.parent / name, array)
        return path

    def loop(self, path: Path, inputs: Arrays) -> tuple[Arrays, Arrays]:
        """Run one row from its beginning: outputs [T, ...], and the states in the graph's own axes."""
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        states = dict(self.initial)
        runs = []
        for feeds in self.feeds(inputs):
            runs.append(dict(zip(names, session.run(names, feeds | states), strict=True)))
            states = {name: runs[-1][output] for name, output in self.states.items()}
        return self.outputs(runs), states


def _steps(inputs: Arrays) -> list[Arrays]:
    """One run a step, with a batch of one row."""
    return [{name: array[step : step + 1] for name, array in inputs.items()} for step in range(len(inputs["x"]))]


def _joined(runs: list[Arrays]) -> Arrays:
    return {"y": np.concatenate([run["y"] for run in runs])}


CASES = [
    Case(
        "layers before the batch, lengths, a constant, an initial file",
        """g (float[T, N, 3] x, int64[N] lens, int64 sr, float[1, N, 4] h0, float[1, N, 4] c0)
            => (float[T, N, 4] y, float[1, N, 4] hT, float[1, N, 4] cT) {
            l = Cast<to = 6>(lens)
            Y, hT, cT = LSTM<hidden_size = 4>(x, W, R, B, l, h0, c0)
            h = Squeeze(Y, axis)
            rate = Cast<to = 1>(sr)
            y = Div(h, rate)
        }""",
        LSTM,
        """\
        inputs:
          x: {role: sequence, time_axis: 0, batch_axis: 1}
          lens: {role: lengths}
          sr: {role: constant, value: 2}
        states:
          - {input: h0, output: hT, batch_axis: 1, initial: {file: h0.npy}}
          - {input: c0, output: cT, batch_axis: 1}
        outputs:
          y: {time_axis: 0, batch_axis: 1}
        """,
        {"h0": draw(1, 1, H, seed=5), "c0": np.zeros((1, 1, H), np.float32)},
        {"h0": "hT", "c0": "cT"},
        lambda inputs: [{"x": inputs["x"][:, None], "lens": np.array([len(inputs["x"])]), "sr": np.array(2)}],
        lambda runs: {"y": runs[0]["y"][:, 0]},
        files={"h0.npy": draw(1, 1, H, seed=5)},
    ),
    Case(
        "[N, H], no time axis",
        """g (float[N, 3] x, float[N, 4] h) => (float[N, 2] y, float[N, 4] h_next) {
            a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)  h_next = Tanh(s)  y = MatMul(h_next, V)
        }""",
        CELL,
        """\
        inputs: {x: {batch_axis: 0}}
        states: [{input: h, output: h_next, batch_axis: 0}]
        outputs: {y: {batch_axis: 0}}
        """,
        {"h": np.zeros((1, H), np.float32)},
        {"h": "h_next"},
        _steps,
        _joined,
    ),
    Case(
        "[2, N, H], h and c in one tensor, no lengths",
        """g (float[N, T, 3] x, float[2, N, 4] s) => (float[N, T, 4] y, float[2, N, 4] s_next) {
            t = Transpose<perm = [1, 0, 2]>(x)
            h, c = Split<axis = 0, num_outputs = 2>(s)
            Y, hT, cT = LSTM<hidden_size = 4>(t, W, R, B, , h, c)
            u = Squeeze(Y, axis)
            y = Transpose<perm = [1, 0, 2]>(u)
            s_next = Concat<axis = 0>(hT, cT)
        }""",
        LSTM,
        """\
        inputs: {x: {batch_axis: 0, time_axis: 1}}
        states: [{name: state, input: s, output: s_next, batch_axis: 1}]
        outputs: {y: {batch_axis: 0, time_axis: 1}}
        """,
        {"s": np.zeros((2, 1, H), np.float32)},
        {"s": "s_next"},
        lambda inputs: [{"x": inputs["x"][None]}],
        lambda runs: {"y": runs[0]["y"][0]},
    ),
    Case(
        "[1, 2, H, 2], batch and time fixed at 1",
        """g (float[1, 1, 3] x, float[1, 2, 3, 2] s) => (float[1, 1, 3] y, float[1, 2, 3, 2] s_next) {
            e = Unsqueeze(x, last)  a = Mul(s, A)  b = Add(a, e)  s_next = Tanh(b)
            z = ReduceSum<keepdims = 0>(s_next, summed)  y = Unsqueeze(z, axis)
        }""",
        {"A": draw(2, I, 2), "last": np.array([3]), "summed": np.array([1, 3]), "axis": np.array([1])},
        """\
        inputs: {x: {batch_axis: 0, time_axis: 1}}
        states: [{input: s, output: s_next, batch_axis: 0}]
        outputs: {y: {batch_axis: 0, time_axis: 1}}
        """,
        {"s": np.zeros((1, 2, I, 2), np.float32)},
        {"s": "s_next"},
        lambda inputs: [{"x": x[None, None]} for x in inputs["x"]],
        lambda runs: {"y": np.concatenate([run["y"][0] for run in runs])},
        row_by_row=True,
    ),
    Case(
        "no axes at all",
        """g (float[3] x, float[4] h) => (float y, float[4] h_next) {
            a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)  h_next = Tanh(s)
            y = ReduceSum<keepdims = 0>(h_next)
        }""",
        CELL,
        """\
        inputs: {x: {}}
        states: [{input: h, output: h_next}]
        outputs: {y: {}}
        """,
        {"h": np.zeros(H, np.float32)},
        {"h": "h_next"},
        lambda inputs: [{"x": x} for x in inputs["x"]],
        lambda runs: {"y": np.array([run["y"] for run in runs])},
        row_by_row=True,
    ),
    Case(
        "a time axis and no batch, an initializer as initial state",
        """g (float[T, 3] x, float[1, 1, 4] h) => (float[T, 4] y, float[1, 1, 4] h_next) {
            b = Unsqueeze(x, axis)
            Y, h_next = GRU<hidden_size = 4>(b, W, R, , , h)
            y = Squeeze(Y, middle)
        }""",
        GRU | {"middle": np.array([1, 2]), "learned": draw(1, H, seed=7)},
        """\
        inputs: {x: {time_axis: 0}}
        states: [{input: h, output: h_next, batch_axis: 1, initial: {initializer: learned}}]
        outputs: {y: {time_axis: 0}}
        """,
        {"h": draw(1, H, seed=7)[:, None]},
        {"h": "h_next"},
        lambda inputs: [{"x": inputs["x"]}],
        lambda runs: runs[0],
        row_by_row=True,
    ),
    Case(
        "states that a Scan and a Loop carry",
        """g (float[T, N, 3] x, float[N, 4] h_in, float[N, 4] total_in)
            => (float[T, N, 4] y, float[N, 4] h_out, float[N, 4] total_out) {
            h_out, y = Scan <num_scan_inputs = 1, body = step (float[N, 4] h, float[N, 3] x_t)
                => (float[N, 4] h_t, float[N, 4] y_t) {
                a = MatMul(x_t, W)  b = MatMul(h, R)  s = Add(a, b)  h_t = Tanh(s)  y_t = Identity(h_t)
            }> (h_in, x)
            sizes = Shape(x)  steps = Gather(sizes, first)
            total_out = Loop (steps, yes, total_in) <
                body = add (int64 i, bool go, float[N, 4] before) => (bool go_on, float[N, 4] after) {
                    go_on = Identity(go)  y_i = Gather(y, i)  after = Add(before, y_i)
                }
            >
        }""",
        {"W": draw(I, H), "R": draw(H, H), "first": np.array(0), "yes": np.array(True)},
        """\
        inputs: {x: {time_axis: 0, batch_axis: 1}}
        states:
          - {input: h_in, output: h_out, batch_axis: 0}
          - {input: total_in, output: total_out, batch_axis: 0}
        outputs: {y: {time_axis: 0, batch_axis: 1}}
        """,
        {"h_in": np.zeros((1, H), np.float32), "total_in": np.zeros((1, H), np.float32)},
        {"h_in": "h_out", "total_in": "total_out"},
        lambda inputs: [{"x": inputs["x"][:, None]}],
        lambda runs: {"y": runs[0]["y"][:, 0]},
    ),
    Case(
        "two layers in one state [2, N, H], in the body of a Loop",
        """g (float[T, N, 3] x, float[2, N, 4] h0) => (float[T, N, 4] y, float[2, N, 4] hT) {
            first, second = Split <axis = 0, num_outputs = 2> (h0)
            Y1, h1 = GRU<hidden_size = 4>(x, W, R, , , first)
            between = Squeeze(Y1, axis)
            h2, y = Loop (once, yes, second, between) <
                body = layer (int64 i, bool go, float[1, N, 4] h, float[T, N, 4] below)
                    => (bool go_on, float[1, N, 4] h_next, float[T, N, 4] above) {
                    go_on = Identity(go)
                    Y2, h_next = GRU<hidden_size = 4>(below, W2, R, , , h)
                    above = Squeeze(Y2, axis)
                }
            >
            hT = Concat <axis = 0> (h1, h2)
        }""",
        GRU | {"W2": draw(1, 3 * H, H), "once": np.array(1), "yes": np.array(True)},
        """\
        inputs: {x: {time_axis: 0, batch_axis: 1}}
        states: [{input: h0, output: hT, batch_axis: 1}]
        outputs: {y: {time_axis: 0, batch_axis: 1}}
        """,
        {"h0": np.zeros((2, 1, H), np.float32)},
        {"h0": "hT"},
        lambda inputs: [{"x": inputs["x"][:, None]}],
        lambda runs: {"y": runs[0]["y"][:, 0]},
    ),
    Case(
        "a state that has a value of its own",
        """g (float[T, 1, 3] x, float[1, 1, 4] h, float[1, 12, 3] W) => (float[T, 4] y, float[1, 1, 4] h_next) {
            Y, h_next = GRU<hidden_size = 4>(x, W, R, , , h)
            y = Squeeze(Y, middle)
        }""",
        GRU | {"middle": np.array([1, 2]), "h": draw(1, 1, H, seed=8)},
        """\
        inputs: {x: {time_axis: 0, batch_axis: 1}}
        states: [{input: h, output: h_next, batch_axis: 1}]
        outputs: {y: {time_axis: 0}}
        """,
        {"h": draw(1, 1, H, seed=8)},
        {"h": "h_next"},
        lambda inputs: [{"x": inputs["x"][:, None]}],
        lambda runs: runs[0],
        row_by_row=True,
    ),
    Case(
        "float16",
        """g (float16[N, 3] x, float16[N, 4] h) => (float16[N, 2] y, float16[N, 4] h_next) {
            a = MatMul(x, W)  b = MatMul(h, R)  s = Add(a, b)  h_next = Tanh(s)  y = MatMul(h_next, V)
        }""",
        {name: array.astype(np.float16) for name, array in CELL.items()},
        """\
        inputs: {x: {batch_axis: 0}}
        states: [{input: h, output: h_next, batch_axis: 0}]
        outputs: {y: {batch_axis: 0}}
        """,
        {"h": np.zeros((1, H), np.float16)},
        {"h": "h_next"},
        _steps,
        _joined,
        inputs=lambda random, steps: {"x": random.uniform(-1, 1, (steps, I)).astype(np.float16)},
    ),
    Case(
        "many inputs and outputs, of every dtype",
        """g (int64[N] token, bool[N] on, int8[N, 2] small, double[N, 2] wide, int32[N] count, bool[N, 2] seen)
            => (double[N, 2] total, int64[N] doubled, int8[N, 2] kept, bool[N, 2] seen_next, int32[N] count_next) {
            known = Gather(table, token)  sum = Add(known, wide)
            step = Cast<to = 6>(on)  count_next = Add(count, step)
            running = Cast<to = 11>(count_next)  column = Unsqueeze(running, last)  total = Mul(sum, column)
            doubled = Add(token, token)
            kept = Neg(small)
            positive = Greater(small, zero)  seen_next = Or(seen, positive)
        }""",
        {"table": draw(7, 2, dtype="float64"), "last": np.array([1]), "zero": np.array(0, np.int8)},
        """\
        inputs:
          token: {batch_axis: 0, below: 7}
          on: {batch_axis: 0}
          small: {batch_axis: 0}
          wide: {batch_axis: 0}
        states:
          - {input: count, output: count_next, batch_axis: 0}
          - {input: seen, output: seen_next, batch_axis: 0}
        outputs:
          total: {batch_axis: 0}
          doubled: {batch_axis: 0}
          kept: {batch_axis: 0}
        """,
        {"count": np.zeros(1, np.int32), "seen": np.zeros((1, 2), np.bool_)},
        {"count": "count_next", "seen": "seen_next"},
        lambda inputs: [
            {name: array[step : step + 1] for name, array in inputs.items()} for step in range(len(inputs["token"]))
        ],
        lambda runs: {name: np.concatenate([run[name] for run in runs]) for name in ("total", "doubled", "kept")},
        inputs=lambda random, steps: {
            "token": random.integers(0, 7, steps),
            "on": random.random(steps) > 0.5,
            "small": random.integers(-9, 9, (steps, 2)).astype(np.int8),
            "wide": random.uniform(-1, 1, (steps, 2)),
        },
    ),
    Case(
        "inside If and Loop",
        """g (float[N, T, 3] x, int64 sr, float[1, N, 4] h0) => (float[N, T, 4] y, float[1, N, 4] hT) {
            x_time_first = Transpose<perm = [1, 0, 2]>(x)
            slow = Equal(sr, rate)
            u, hT = If (slow) <
                then_branch = recurrent () => (float[T, N, 4] u_then, float[1, N, 4] h_then) {
                    Y, h_then = GRU<hidden_size = 4>(x_time_first, W, R, , , h0)
                    u_then = Squeeze(Y, axis)
                },
                else_branch = nothing () => (float[T, N, 4] u_else, float[1, N, 4] h_else) {
                    m = MatMul(x_time_first, V)  u_else = Sub(m, m)  h_else = Identity(h0)
                }
            >
            v = Transpose<perm = [1, 0, 2]>(u)
            y = Loop (trips, yes, v) <
                body = twice (int64 i, bool go, float[N, T, 4] before) => (bool go_on, float[N, T, 4] after) {
                    go_on = Identity(go)  after = Add(before, half)
                }
            >
        }""",
        GRU
        | {
            "V": draw(I, H),
            "rate": np.array(8000),
            "trips": np.array(2),
            "yes": np.array(True),
            "half": np.array(0.5, np.float32),
        },
        """\
        inputs:
          x: {batch_axis: 0, time_axis: 1}
          sr: {role: constant, value: 8000}
        states: [{input: h0, output: hT, batch_axis: 1}]
        outputs:
          y: {batch_axis: 0, time_axis: 1}
        """,
        {"h0": np.zeros((1, 1, H), np.float32)},
        {"h0": "hT"},
        lambda inputs: [{"x": inputs["x"][None], "sr": np.array(8000)}],
        lambda runs: {"y": runs[0]["y"][0]},
    ),
    Case(
        "a batch that is declared free and fails at two rows",
        """g (float[N, 3] x, float[N, 4] h) => (float[N, 2] y, float[N, 4] h_next) {
            row = Reshape(x, one_row)  a = MatMul(row, W)  b = MatMul(h, R)  s = Add(a, b)
            h_next = Tanh(s)  y = MatMul(h_next, V)
        }""",
        CELL | {"one_row": np.array([1, I])},
        """\
        inputs: {x: {batch_axis: 0}}
        states: [{input: h, output: h_next, batch_axis: 0}]
        outputs: {y: {batch_axis: 0}}
        """,
        {"h": np.zeros((1, H), np.float32)},
        {"h": "h_next"},
        _steps,
        _joined,
        row_by_row=True,
    ),
    Case(
        "rows that are mixed",
        """g (float[N, T, 3] x, float[1, N, 4] h0) => (float[N, T, 4] y, float[1, N, 4] hT) {
            mean = ReduceMean<keepdims = 1>(x, rows)  d = Add(x, mean)
            t = Transpose<perm = [1, 0, 2]>(d)
            Y, hT = GRU<hidden_size = 4>(t, W, R, , , h0)
            u = Squeeze(Y, axis)  y = Transpose<perm = [1, 0, 2]>(u)
        }""",
        GRU | {"rows": np.array([0])},
        """\
        inputs: {x: {batch_axis: 0, time_axis: 1}}
        states: [{input: h0, output: hT, batch_axis: 1}]
        outputs: {y: {batch_axis: 0, time_axis: 1}}
        """,
        {"h0": np.zeros((1, 1, H), np.float32)},
        {"h0": "hT"},
        lambda inputs: [{"x": inputs["x"][None]}],
        lambda runs: {"y": runs[0]["y"][0]},
        row_by_row=True,
    ),
]
