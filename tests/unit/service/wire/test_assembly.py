"""Messages written by hand are those that the stubs' library would write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor.tensors import encode_tensor
from conveyor.v1 import conveyor_pb2 as pb
from service.manifest import TensorSpec
from service.wire.assembly import Part, assemble, field, size
from service.wire.codec import join, stack
from service.wire.conveyor_tensors import parts
from service.wire.inference_stubs import inference_pb2
from service.wire.inference_tensors import written

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("way")

OUTPUT = TensorSpec(name="y", dtype="float32", shape=(None, None, 3), batch_axis=1, time_axis=0)
LAST = TensorSpec(name="last", dtype="float32", shape=(None, 3), batch_axis=0, time_axis=None)
DTYPES = ["float32", "float16", "float64", "int64", "int32", "int8", "bool"]


@pytest.fixture(params=["as if small", "as if large"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of writing."""
    monkeypatch.setattr("service.wire.assembly._SMALL_BYTES", 1e9 if request.param == "as if small" else 0)


def draw(*shape: int, dtype: str = "float32") -> Array:
    """Random elements."""
    return np.random.default_rng(len(shape)).integers(0, 2, shape).astype(dtype)


def reply(*fields: list[Part]) -> bytes:
    """An InferResponse of version 7."""
    whole: list[Part] = [pb.InferResponse(version=7).SerializeToString()]
    for one in fields:
        whole += one
    message = assemble(whole)
    assert message.ByteSize() == len(message.data) == size(whole)
    return message.data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [3, 1, 2], [1000, 1, 70]], ids=str)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "ragged"])
def test_a_reply_is_what_the_library_writes(dtype: str, lengths: list[int], padded: bool) -> None:
    """To the byte: rows with zeros behind them or one right behind the other, of every dtype and of any size."""
    rows = [draw(length, 3, dtype=dtype) for length in lengths]
    steps = max(lengths) + 2
    if padded:
        whole = np.stack([np.concatenate([row, np.zeros((steps - len(row), 3), dtype)]) for row in rows])
    else:
        whole = np.concatenate(rows)
    states = [draw(2, 5, dtype=dtype) for _ in rows]
    expected = pb.InferResponse(
        version=7, outputs=[encode_tensor("y", whole)], final_states=[encode_tensor("h", np.stack(states))]
    )
    joined = join(rows, OUTPUT, steps if padded else None)
    assert reply(parts(2, "y", joined), parts(3, "h", stack(states))) == expected.SerializeToString()


def test_an_output_without_time_is_the_same_in_both_forms() -> None:
    """One value a row, one behind the other."""
    rows = [draw(3), draw(3)]
    expected = pb.InferResponse(version=7, outputs=[encode_tensor("last", np.stack(rows))]).SerializeToString()
    assert reply(parts(2, "last", join(rows, LAST, 9))) == expected
    assert reply(parts(2, "last", join(rows, LAST, None))) == expected


def test_rows_may_be_views_of_any_strides_and_byte_order() -> None:
    """What stands in the message is row-major and little-endian."""
    base = draw(6, 4)
    rows = [base.T[:, ::2], base[::2, :3], base.astype(">f4")[:2, :3]]
    message = pb.InferResponse.FromString(reply(parts(2, "y", join(rows, OUTPUT, None))))
    assert message.outputs[0].data == np.concatenate([row.astype("<f4") for row in rows]).tobytes()


def test_a_tensor_may_be_empty() -> None:
    """Where a model has a size of 0."""
    message = pb.InferResponse.FromString(reply(parts(2, "y", join([draw(2, 0), draw(1, 0)], OUTPUT, 2))))
    assert (list(message.outputs[0].shape), message.outputs[0].data) == ([2, 2, 0], b"")


def test_the_second_doors_replies_too() -> None:
    """A reply, and the same one within a stream's message."""
    rows, last = [draw(2, 3), draw(1, 3)], [draw(3), draw(3)]

    def head() -> inference_pb2.ModelInferResponse:
        response = inference_pb2.ModelInferResponse(model_name="m", model_version="1", id="mine")
        response.parameters["final"].bool_param = True
        return response

    expected = head()
    for name, array in {"y": np.concatenate(rows), "last": np.stack(last)}.items():
        expected.outputs.add(name=name, datatype="FP32", shape=array.shape)
        expected.raw_output_contents.append(array.tobytes())
    whole = written(head(), {"y": join(rows, OUTPUT, None), "last": join(last, LAST, None)})
    assert assemble(whole).data == expected.SerializeToString()
    streamed = inference_pb2.ModelStreamInferResponse(infer_response=expected)
    assert assemble(field(2, whole)).data == streamed.SerializeToString()
