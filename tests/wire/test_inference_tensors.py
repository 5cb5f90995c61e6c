"""Typed contents: what they are as bytes, and that nothing is made of them before the model has been looked at."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import InvalidRequest
from service.manifest import Manifest
from service.wire.codec import Codec, Tensor
from service.wire.inference_request import identities, read, split
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_tensors import tensor
from tests.sums import Sums

Array = NDArray[Any]

FIELDS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BOOL": "bool_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "INT8": "int_contents",
    "UINT8": "uint_contents",
    "UINT64": "uint64_contents",
}
VALUES: dict[str, list[Any]] = {
    "FP32": [0.0, -1.5, 3e38],
    "FP64": [0.0, -1.5, 1e300],
    "BOOL": [True, False, True],
    "INT64": [0, -(2**63), 2**63 - 1],
    "INT32": [0, -(2**31), 2**31 - 1],
    "INT8": [0, -128, 127],
    "UINT8": [0, 255, 1],
    "UINT64": [0, 2**64 - 1, 5],
}
DTYPES = {"FP32": "<f4", "FP64": "<f8", "BOOL": "?", "INT64": "<i8", "INT32": "<i4"} | {
    "INT8": "i1",
    "UINT8": "u1",
    "UINT64": "<u8",
}


def request(datatype: str, values: list[Any], shape: list[int], name: str = "x") -> pb.ModelInferRequest:
    """A request with one input of typed contents."""
    message = pb.ModelInferRequest(model_name="none")
    given = message.inputs.add(name=name, datatype=datatype, shape=shape)
    getattr(given.contents, FIELDS.get(datatype, "bytes_contents")).extend(values)
    return message


@pytest.mark.parametrize("datatype", VALUES)
@pytest.mark.parametrize("unknown", [b"", b"\x98\x06\x2a" * 5], ids=["", "with fields of a later protocol"])
def test_they_are_what_raw_contents_are(datatype: str, unknown: bytes) -> None:
    """Every value arrives as it was sent, to the bit, from whatever field."""
    message = request(datatype, VALUES[datatype] * 100, [300])
    contents = message.inputs[0].contents.SerializeToString() + unknown
    message.inputs[0].contents.CopyFrom(pb.InferTensorContents.FromString(contents))
    expected = np.array(VALUES[datatype] * 100, DTYPES[datatype])
    assert tensor(message, 0).array("x").tobytes() == expected.tobytes()


def test_values_beyond_their_datatype() -> None:
    """What does not fit into a small integer is refused, not cut."""
    with pytest.raises(InvalidRequest, match="'x' holds a value beyond INT8; expected -128 to 127"):
        tensor(request("INT8", [128], [1]), 0).array("x")


def test_texts_are_for_controls_alone() -> None:
    """Millions of texts for a model, which takes none, are refused without a look at one of them."""
    message = request("BYTES", [b"a", b"b"], [2])
    with pytest.raises(InvalidRequest, match="'x' is BYTES; no model takes texts"):
        read(message, [], 4)
    assert identities(request("BYTES", [b"a", b"b"], [2], "sequence_ids"), 4) == ["a", "b"]
    many = request("BYTES", [b"a"] * 5, [5], "sequence_ids")
    with pytest.raises(InvalidRequest, match="'sequence_ids' has 5 rows; this server takes up to 4"):
        identities(many, 4)


def test_what_no_datatype_of_the_protocol_is() -> None:
    """Elements of a datatype that nobody knows are counted by nobody: they are refused at once."""
    message = request("BF16", [], [2])
    message.inputs[0].contents.fp32_contents.extend([1.0, 2.0])
    with pytest.raises(InvalidRequest, match="'x' is 'BF16', which has no typed contents"):
        read(message, [], 4)


def unread() -> NoReturn:
    """Elements that must not be asked for."""
    raise AssertionError("they were made before it was known that they are wanted")


@pytest.mark.parametrize(
    ("dtype", "shape", "says"),
    [
        ("int32", (1, 2), "is int32; expected float64"),
        ("float64", (1, 2, 3), "has shape"),
        ("float64", (5, 2), "5 rows; this server takes up to 4"),
        ("float64", (2, 9), "9 steps; this server takes up to 8"),
        ("float64", (4, 8), "256 bytes; this server takes up to 200"),
    ],
    ids=str,
)
def test_shapes_come_before_elements(dtype: str, shape: tuple[int, ...], says: str) -> None:
    """Dtype, shape, rows, steps and bytes are held against the model before any element is made."""
    codec = Codec(Sums().manifest, max_steps=8, max_batch=4, max_bytes=200, finite=True)
    with pytest.raises(InvalidRequest, match=says):
        codec.batch([Tensor("x", dtype, shape, unread)], [])


def test_integers_are_made_when_they_are_asked_for() -> None:
    """A request whose model may not exist holds them packed, as they came, and nothing of its message."""
    message = request("INT64", list(range(1000)), [1000])
    one = tensor(message, 0)
    del message
    assert not isinstance(one.data, bytes)
    np.testing.assert_array_equal(one.array("x"), np.arange(1000))


def test_a_constant_of_the_wrong_size_is_not_read() -> None:
    """A tensor under a constant's name is looked into only where its shape may be the constant's."""
    manifest = Manifest.model_validate(
        Sums().manifest.model_dump() | {"constants": [{"name": "rate", "dtype": "int64", "value": "gD4AAAAAAAA="}]}
    )
    message = request("INT64", [16000] * 3, [3], "rate")
    assert split(read(message, [], 4), manifest, 4).inputs == []
    with pytest.raises(InvalidRequest, match="'rate' is a constant of this model"):
        split(read(request("INT64", [16000] * 5, [5], "rate"), [], 4), manifest, 4)
