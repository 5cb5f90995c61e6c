"""ndarray <-> Tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conveyor import InvalidRequest, ProtocolError
from conveyor.tensors import DTYPES, decode_tensor, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb


@given(st.data())
def test_any_array_comes_back_bit_by_bit(data: st.DataObject) -> None:
    """Every dtype of the wire, any shape with zeros and none among the sizes, any strides and byte order survive."""
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    order = data.draw(st.sampled_from("<>"))
    array = data.draw(hnp.arrays(dtype.newbyteorder(order), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
    if data.draw(st.booleans()):
        array = array.T
    result = decode_tensor(pb.Tensor.FromString(encode_tensor("x", array).SerializeToString()))
    assert result.dtype == dtype
    assert result.shape == array.shape
    assert result.tobytes() == array.astype(dtype).tobytes()


def test_bytes_are_little_endian_and_row_major() -> None:
    """The layout on the wire is the one that the contract names, whatever the array's own."""
    array = np.array([[1, 2], [3, 4]], ">i4").T
    assert encode_tensor("x", array).data == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])


def test_decoding_copies_nothing() -> None:
    """The array looks at the message's bytes, and so cannot be written."""
    result = decode_tensor(encode_tensor("x", np.zeros(3)))
    assert not result.flags.owndata
    assert not result.flags.writeable


@pytest.mark.parametrize("dtype", ["complex64", "uint8", "U3", "O", "datetime64[s]"])
def test_a_dtype_that_the_wire_lacks_is_refused_by_name(dtype: str) -> None:
    """The error says which dtype was given and which there are."""
    with pytest.raises(InvalidRequest, match=r"'x' has dtype .* expected one of float32"):
        encode_tensor("x", np.zeros(2, dtype))


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(name="y", data_type=pb.DATA_TYPE_FLOAT32, shape=[2], data=b"1234567"),
        pb.Tensor(name="y", data_type=pb.DATA_TYPE_FLOAT32, shape=[-1, -1], data=b"1234"),
        pb.Tensor(name="y", data_type=pb.DATA_TYPE_UNSPECIFIED, shape=[0]),
        pb.Tensor(name="y", data_type=99, shape=[0]),  # type: ignore[arg-type]
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(tensor: pb.Tensor) -> None:
    """Dtype, shape and byte count have to fit together."""
    with pytest.raises(ProtocolError, match="tensor 'y' came with"):
        decode_tensor(tensor)
