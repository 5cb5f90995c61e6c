"""Bytes to arrays and back, each checked against what the model takes.

Owns dtypes, shapes, byte counts and what is done with NaN. Whatever does not fit raises InvalidRequest, which says what
was wrong and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from conveyor.v1 import conveyor_pb2 as pb
from service.errors import InvalidRequest
from service.manifest import Manifest, StateSpec, TensorSpec

Array = NDArray[np.generic]
Spec = TypeVar("Spec", TensorSpec, StateSpec)

DATA_TYPES: dict[str, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "float64": pb.DATA_TYPE_FLOAT64,
    "int64": pb.DATA_TYPE_INT64,
    "int32": pb.DATA_TYPE_INT32,
    "int8": pb.DATA_TYPE_INT8,
    "bool": pb.DATA_TYPE_BOOL,
}
_LARGEST_SIZE = 2**31
_NAMES = {value: name for name, value in DATA_TYPES.items()}
_LITTLE = {value: np.dtype(name).newbyteorder("<") for name, value in DATA_TYPES.items()}


def encode(name: str, array: Array) -> pb.Tensor:
    """Return an array as a message."""
    data_type = DATA_TYPES[array.dtype.name]
    return pb.Tensor(
        name=name, data_type=data_type, shape=array.shape, data=array.astype(_LITTLE[data_type], copy=False).tobytes()
    )


class Codec:
    """Reads the tensors that one model takes.

    Args:
        manifest: of the model.
        max_steps: most steps of one sequence or chunk.
        max_batch: most sequences of one batch.
        max_bytes: most bytes of the arrays in one reply.
        finite: whether NaN and infinity are refused.
    """

    def __init__(self, manifest: Manifest, max_steps: int, max_batch: int, max_bytes: int, finite: bool) -> None:
        self.max_steps = max_steps
        self.max_batch = max_batch
        self.max_bytes = max_bytes
        self._manifest = manifest
        self._finite = finite

    def chunk(self, tensors: Sequence[pb.Tensor]) -> list[Array]:
        """Read a chunk's inputs.

        Returns:
            One array [T, ...] an input, T alike.
        """
        arrays = [
            self._read(tensor, f"input {spec.name!r}", spec.dtype, (None, *spec.tail), "T")
            for spec, tensor in self._pair(self._manifest.inputs, tensors, "input")
        ]
        steps = len(arrays[0])
        for spec, array in zip(self._manifest.inputs, arrays, strict=True):
            self._check_steps(len(array))
            if len(array) != steps or (spec.time_axis is None and steps != 1):
                raise InvalidRequest(
                    f"input {spec.name!r} has {len(array)} steps; expected {1 if spec.time_axis is None else steps}"
                )
            self._check_values(array, f"input {spec.name!r}", spec.below)
        self.check_reply(1, steps)
        return arrays

    def batch(self, tensors: Sequence[pb.Tensor], lengths: Sequence[int]) -> tuple[list[Array], list[int]]:
        """Read a batch's inputs.

        Returns:
            One array [N, T, ...] an input, N and T alike, and the length of each row.
        """
        arrays = [
            self._read(tensor, f"input {spec.name!r}", spec.dtype, (None, None, *spec.tail), "N, T")
            for spec, tensor in self._pair(self._manifest.inputs, tensors, "input")
        ]
        rows, steps = arrays[0].shape[:2]
        if rows < 1:
            raise InvalidRequest("the batch has no rows (N = 0); expected at least 1")
        if rows > self.max_batch:
            raise InvalidRequest(f"the batch has {rows} rows; this server takes up to {self.max_batch}")
        self._check_steps(steps)
        for spec, array in zip(self._manifest.inputs, arrays, strict=True):
            if array.shape[:2] != (rows, steps):
                raise InvalidRequest(
                    f"input {spec.name!r} is {_show(array.shape)}; expected [{rows}, {steps}, ...] as the first"
                )
        if lengths and len(lengths) != rows:
            raise InvalidRequest(f"there are {len(lengths)} lengths for {rows} rows; expected one a row, or none")
        for row, length in enumerate(lengths):
            if not 1 <= length <= steps:
                raise InvalidRequest(f"row {row} has length {length}; expected 1 to {steps}")
        lengths = list(lengths) or [steps] * rows
        valid = np.arange(steps) < np.array(lengths)[:, None]
        for spec, array in zip(self._manifest.inputs, arrays, strict=True):
            # What stands in the padding is nobody's business: it goes nowhere.
            self._check_values(array if valid.all() else array[valid], f"input {spec.name!r}", spec.below)
        return arrays, lengths

    def states(self, tensors: Sequence[pb.Tensor], rows: int | None) -> list[Array] | None:
        """Read states to begin from.

        Args:
            tensors: none, or one a state of the model.
            rows: N where they are [N, ...]; None where they have no batch axis.

        Returns:
            One array a state; None if there were none.
        """
        if not tensors:
            return None
        batch = () if rows is None else (rows,)
        arrays = []
        for spec, tensor in self._pair(self._manifest.states, tensors, "state"):
            what = f"state {spec.name!r}"
            array = self._read(tensor, what, spec.dtype, (*batch, *spec.tail), "")
            self._check_values(array, what)
            arrays.append(array)
        return arrays

    def check_reply(self, rows: int, steps: int, states: bool = False) -> None:
        """Refuse what could not be answered, before it is run.

        Args:
            rows: how many are to be answered at once.
            steps: of the longest.
            states: whether the final states are to be sent too.
        """
        size = rows * self._manifest.reply_bytes(steps, states)
        if size > self.max_bytes:
            raise InvalidRequest(
                f"the reply would hold {size} bytes; this server sends up to {self.max_bytes}: "
                "send fewer rows, or fewer steps"
            )

    def _pair(self, specs: Sequence[Spec], tensors: Sequence[pb.Tensor], kind: str) -> Iterable[tuple[Spec, pb.Tensor]]:
        if len(specs) == 1 and len(tensors) == 1 and tensors[0].name in ("", specs[0].name):
            return ((specs[0], tensors[0]),)
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) != len(tensors) or by_name.keys() != {spec.name for spec in specs}:
            raise InvalidRequest(
                f"{kind}s {[tensor.name[:64] for tensor in tensors][:16]} were given; "
                f"expected each of {[spec.name for spec in specs]} once"
            )
        return [(spec, by_name[spec.name]) for spec in specs]

    def _read(self, tensor: pb.Tensor, what: str, dtype: str, sizes: tuple[int | None, ...], free: str) -> Array:
        if tensor.data_type != DATA_TYPES[dtype]:
            raise InvalidRequest(f"{what} is {_NAMES.get(tensor.data_type, 'of no known dtype')}; expected {dtype}")
        shape = tuple(tensor.shape)
        if len(shape) != len(sizes) or any(
            not 0 <= size < _LARGEST_SIZE or (want is not None and size != want)
            for size, want in zip(shape, sizes, strict=True)
        ):
            fixed = [str(size) for size in sizes if size is not None]
            raise InvalidRequest(
                f"{what} has shape {_show(shape)}; expected [{', '.join([free] * bool(free) + fixed)}]"
            )
        little = _LITTLE[tensor.data_type]
        expected = math.prod(shape) * little.itemsize
        if len(tensor.data) != expected:
            raise InvalidRequest(
                f"{what} holds {len(tensor.data)} bytes; expected {expected} for shape {_show(shape)} of {dtype}"
            )
        array: Array = np.frombuffer(tensor.data, little).reshape(shape)
        return array

    def _check_values(self, array: Array, what: str, below: int | None = None) -> None:
        if array.dtype.kind == "f":
            if self._finite and not np.isfinite(array).all():
                raise InvalidRequest(f"{what} holds NaN or infinity; expected finite numbers")
        elif array.dtype.kind == "b":
            if (array.view(np.uint8) > 1).any():
                raise InvalidRequest(f"{what} holds a byte over 1; expected 0 or 1 in each element of a bool")
        elif below is not None and array.size:
            lowest, highest = int(array.min()), int(array.max())
            if lowest < 0 or highest >= below:
                raise InvalidRequest(f"{what} holds {lowest if lowest < 0 else highest}; expected 0 to {below - 1}")

    def _check_steps(self, steps: int) -> None:
        if steps < 1:
            raise InvalidRequest("there are no steps (T = 0); expected at least 1")
        if steps > self.max_steps:
            raise InvalidRequest(
                f"there are {steps} steps; this server takes up to {self.max_steps} in one sequence or chunk"
            )


def _show(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"
