"""Bytes to arrays and back, each checked against what the model takes.

Owns shapes, byte counts and what is done with NaN, whatever message the bytes came in. Whatever does not fit raises
InvalidRequest, which says what was wrong and what was expected. Must not know the doors' messages.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest
from service.manifest import Manifest, StateSpec, TensorSpec
from service.wire.assembly import Joined

Array = NDArray[np.generic]
Spec = TypeVar("Spec", TensorSpec, StateSpec)

MOST_TENSORS = 1024
"""In one request: to look at each of the millions that fit into a message would hold everybody up."""
MOST_AXES = 32
"""Whatever has more is of the wrong shape, however many they are."""

_LARGEST_SIZE = 2**31


class Tensor(NamedTuple):
    """A tensor as it came, through whatever door.

    Attributes:
        name: the caller's name for it.
        dtype: NumPy's name; empty for none that the door knows.
        shape: as the caller says.
        data: the elements in row-major order, little-endian; or makes them of what came, which may take a while and is
            to be asked only of a tensor whose shape is known to be right.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | Callable[[], bytes]

    @property
    def size(self) -> int:
        """Bytes that it holds, in the message or beside it."""
        return len(self.data) if isinstance(self.data, bytes) else 8 * math.prod(self.shape)

    def array(self, what: str) -> Array:
        """Read the elements.

        Args:
            what: this is, for the error.

        Raises:
            InvalidRequest: if they are not as many as the shape says.
        """
        data = self.data if isinstance(self.data, bytes) else self.data()
        little = little_endian(self.dtype)
        expected = math.prod(self.shape) * little.itemsize
        if len(data) != expected:
            raise InvalidRequest(
                f"{what} holds {len(data)} bytes; expected {expected} for shape {_show(self.shape)} of {self.dtype}"
            )
        array: Array = np.frombuffer(data, little).reshape(self.shape)
        return array


@functools.lru_cache(64)
def little_endian(dtype: str) -> np.dtype[np.generic]:
    """Return the type of the elements on the wire."""
    return np.dtype(dtype).newbyteorder("<")


def to_bytes(array: Array) -> bytes:
    """Return an array's elements as they stand on the wire."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


class Batch(NamedTuple):
    """What a batch goes in as.

    Attributes:
        rows: for each its inputs, one array [T_n, ...] an input of the model.
        steps: T of the whole, at least the longest T_n; None where the rows stand one behind the other.
    """

    rows: list[list[Array]]
    steps: int | None


def join(rows: Sequence[Array], spec: TensorSpec, steps: int | None) -> Joined:
    """Put the rows of one output together.

    Args:
        rows: each [T_n, ...], or [...] where the output has no time axis.
        spec: of the output.
        steps: T, at least the longest T_n; None for rows without padding.

    Returns:
        [N, T, ...], zero beyond each row's end, or [sum of T_n, ...]; [N, ...] without a time axis.

    Raises:
        InvalidRequest: if the rows' features differ in size, as they may where the model leaves it open.
    """
    if len({row.shape[spec.time_axis is not None :] for row in rows}) > 1:
        raise InvalidRequest(f"the rows of output {spec.name!r} differ in the size of their features; send them apart")
    if spec.time_axis is None:
        return stack(rows)
    dtype, tail = rows[0].dtype, rows[0].shape[1:]
    if steps is None:
        return Joined(dtype, (sum(map(len, rows)), *tail), rows)
    return Joined(dtype, (len(rows), steps, *tail), rows, steps * math.prod(tail) * dtype.itemsize)


def stack(rows: Sequence[Array]) -> Joined:
    """Put arrays of one shape together, as [N, ...]."""
    return Joined(rows[0].dtype, (len(rows), *rows[0].shape), rows)


class Codec:
    """Reads the tensors that one model takes.

    Args:
        manifest: of the model.
        max_steps: most steps of one sequence or chunk.
        max_batch: most sequences of one batch.
        max_bytes: most bytes of one tensor, and of the arrays in one reply.
        finite: whether NaN and infinity are refused.
        one_step: whether the sequences of a batch come without a time axis, one step each.
    """

    def __init__(
        self,
        manifest: Manifest,
        max_steps: int,
        max_batch: int,
        max_bytes: int,
        finite: bool,
        one_step: bool = False,
    ) -> None:
        self.max_steps = max_steps
        self.max_batch = max_batch
        self.max_bytes = max_bytes
        self._manifest = manifest
        self._finite = finite
        self._one_step = one_step
        first = manifest.inputs[0]
        # Where a model has one input, and all but its steps is known, most chunks are told to be right at one glance.
        self._only = first if len(manifest.inputs) == 1 and None not in (first.time_axis, *first.tail) else None
        self._what = f"input {first.name!r}"
        self._step_bytes = manifest.step_bytes

    def chunk(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Read a chunk's inputs.

        Returns:
            One array [T, ...] an input, T alike.
        """
        seen = self._glance(tensors, ())
        if seen is not None:
            self._check_values(seen, self._what, self._manifest.inputs[0].below)
            return [seen]
        pairs = self._pair(self._manifest.inputs, tensors, "input")
        shapes = [self._shape(tensor, f"input {spec.name!r}", spec, (None,), "T") for spec, tensor in pairs]
        steps = shapes[0][0]
        for (spec, _), shape in zip(pairs, shapes, strict=True):
            length = shape[0]
            self._check_steps(length)
            if length != steps or (spec.time_axis is None and steps != 1):
                raise InvalidRequest(
                    f"input {spec.name!r} has {length} steps; expected {1 if spec.time_axis is None else steps}"
                )
        self.check_reply(1, steps)
        arrays = []
        for spec, tensor in pairs:
            array = tensor.array(f"input {spec.name!r}")
            self._check_values(array, f"input {spec.name!r}", spec.below)
            arrays.append(array)
        return arrays

    def block(self, tensors: Sequence[Tensor], rows: int) -> tuple[list[Array], dict[int, Exception]]:
        """Read the inputs of a block of chunks.

        Args:
            tensors: the inputs.
            rows: N, how many chunks there are.

        Returns:
            One array [N, T, ...] an input, T alike; and what is wrong with single rows, by their indices.
        """
        seen = self._glance(tensors, (rows,))
        if seen is not None and self._wrong(seen, self._what, self._manifest.inputs[0].below) is None:
            return [seen], {}
        pairs, shapes = self._alike(tensors, (None, None), "N, T")
        if shapes[0][0] != rows:
            raise InvalidRequest(f"input {pairs[0][0].name!r} is {_show(shapes[0])}; expected [{rows}, T, ...]")
        steps = shapes[0][1]
        self._check_steps(steps)
        for spec, _ in pairs:
            if spec.time_axis is None and steps != 1:
                raise InvalidRequest(f"input {spec.name!r} has {steps} steps; expected 1")
        self.check_reply(rows, steps)
        arrays = []
        wrong: dict[int, Exception] = {}
        for spec, tensor in pairs:
            what = f"input {spec.name!r}"
            array = tensor.array(what)
            arrays.append(array)
            if self._wrong(array, what, spec.below) is not None:
                told = {n: self._wrong(row, what, spec.below) for n, row in enumerate(array)}
                wrong = {n: error for n, error in told.items() if error is not None} | wrong
        return arrays, wrong

    def batch(self, tensors: Sequence[Tensor], lengths: Sequence[int], states: bool = False) -> Batch:
        """Read a batch's inputs, each [N, T, ...].

        Args:
            tensors: the inputs.
            lengths: how many steps of each row are valid; empty for all.
            states: whether the final states are to be sent too.
        """
        axes = "N" if self._one_step else "N, T"
        free = (None,) if self._one_step else (None, None)
        pairs, shapes = self._alike(tensors, free, axes)
        rows, steps = shapes[0][0], 1 if self._one_step else shapes[0][1]
        self._check_rows(rows)
        self._check_steps(steps)
        if lengths and len(lengths) != rows:
            raise InvalidRequest(f"there are {len(lengths)} lengths for {rows} rows; expected one a row, or none")
        for row, length in enumerate(lengths):
            if not 1 <= length <= steps:
                raise InvalidRequest(f"row {row} has length {length}; expected 1 to {steps}")
        self.check_reply(rows, steps, states)
        lengths = list(lengths) or [steps] * rows
        valid = np.arange(steps) < np.array(lengths)[:, None]
        arrays = []
        for spec, tensor in pairs:
            array = tensor.array(f"input {spec.name!r}")
            if self._one_step:
                array = array[:, None]
            # What stands in the padding is nobody's business: it goes nowhere.
            self._check_values(array if valid.all() else array[valid], f"input {spec.name!r}", spec.below)
            arrays.append(array)
        return Batch([[array[n, :length] for array in arrays] for n, length in enumerate(lengths)], steps)

    def ragged(self, tensors: Sequence[Tensor], lengths: Sequence[int], states: bool = False) -> Batch:
        """Read a batch's inputs, each [sum of lengths, ...].

        Args:
            tensors: the inputs.
            lengths: how many steps each row has.
            states: whether the final states are to be sent too.
        """
        self._check_rows(len(lengths))
        for row, length in enumerate(lengths):
            self._check_steps(length, f"row {row}: ")
        pairs, shapes = self._alike(tensors, (None,), "sum of lengths")
        total = sum(lengths)
        if shapes[0][0] != total:
            raise InvalidRequest(
                f"input {pairs[0][0].name!r} is {_show(shapes[0])}; expected [{total}, ...], the sum of the lengths"
            )
        self._check_reply(sum(self._manifest.reply_bytes(length, states) for length in lengths))
        arrays = []
        for spec, tensor in pairs:
            array = tensor.array(f"input {spec.name!r}")
            self._check_values(array, f"input {spec.name!r}", spec.below)
            arrays.append(array)
        ends = np.cumsum(lengths).tolist()
        return Batch(
            [[array[end - length : end] for array in arrays] for length, end in zip(lengths, ends, strict=True)], None
        )

    def states(self, tensors: Sequence[Tensor], rows: int | None) -> list[Array] | None:
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
            self._shape(tensor, what, spec, batch, "")
            array = tensor.array(what)
            self._check_values(array, what)
            arrays.append(array)
        return arrays

    def _glance(self, tensors: Sequence[Tensor], lead: tuple[int, ...]) -> Array | None:
        """Read the one input of a chunk, or of a block of chunks, if all but its values is as it mostly is.

        Args:
            tensors: the inputs.
            lead: the sizes of the axes before time.

        Returns:
            [*lead, T, ...]; None if it has to be looked at more closely.
        """
        spec, axis = self._only, len(lead)
        if spec is None or len(tensors) != 1:
            return None
        name, dtype, shape, data = tensors[0]
        if (
            dtype != spec.dtype
            or len(shape) <= axis
            or shape[:axis] != lead
            or shape[axis + 1 :] != spec.tail
            or not 1 <= shape[axis] <= self.max_steps
            or name not in ("", spec.name)
            or not isinstance(data, bytes)
            or not len(data) == math.prod(lead) * shape[axis] * self._step_bytes <= self.max_bytes
        ):
            return None
        self.check_reply(math.prod(lead), shape[axis])
        array: Array = np.frombuffer(data, little_endian(dtype)).reshape(shape)
        return array

    def check_reply(self, rows: int, steps: int, states: bool = False) -> None:
        """Refuse what could not be answered, before it is run.

        Args:
            rows: how many are to be answered at once.
            steps: of the longest.
            states: whether the final states are to be sent too.
        """
        self._check_reply(rows * self._manifest.reply_bytes(steps, states))

    def _check_reply(self, size: int) -> None:
        if size > self.max_bytes:
            raise InvalidRequest(
                f"the reply would hold {size} bytes; this server sends up to {self.max_bytes}: "
                "send fewer rows, or fewer steps"
            )

    def _alike(
        self, tensors: Sequence[Tensor], free: tuple[None, ...], axes: str
    ) -> tuple[Sequence[tuple[TensorSpec, Tensor]], list[tuple[int, ...]]]:
        """Find each input of the model among tensors, and their shapes, whose first axes must be alike."""
        pairs = self._pair(self._manifest.inputs, tensors, "input")
        shapes = [self._shape(tensor, f"input {spec.name!r}", spec, free, axes) for spec, tensor in pairs]
        for (spec, _), shape in zip(pairs, shapes, strict=True):
            if shape[: len(free)] != shapes[0][: len(free)]:
                first = ", ".join(map(str, shapes[0][: len(free)]))
                raise InvalidRequest(f"input {spec.name!r} is {_show(shape)}; expected [{first}, ...] as the first")
        return pairs, shapes

    def _pair(self, specs: Sequence[Spec], tensors: Sequence[Tensor], kind: str) -> Sequence[tuple[Spec, Tensor]]:
        if len(specs) == 1 and len(tensors) == 1 and tensors[0].name in ("", specs[0].name):
            return ((specs[0], tensors[0]),)
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) != len(tensors) or by_name.keys() != {spec.name for spec in specs}:
            raise InvalidRequest(
                f"{kind}s {[tensor.name[:64] for tensor in tensors][:16]} were given; "
                f"expected each of {[spec.name for spec in specs]} once"
            )
        return [(spec, by_name[spec.name]) for spec in specs]

    def _shape(
        self, tensor: Tensor, what: str, spec: TensorSpec | StateSpec, lead: tuple[int | None, ...], free: str
    ) -> tuple[int, ...]:
        """Check what a tensor says of itself, and return its shape, before its elements are looked at."""
        tail = spec.tail
        sizes = (*lead, *tail)
        if tensor.dtype != spec.dtype:
            raise InvalidRequest(f"{what} is {tensor.dtype or 'of no known dtype'}; expected {spec.dtype}")
        shape = tensor.shape
        free_sizes = (shape if None in tail else shape[: len(lead)]) or (0,)
        if (
            len(shape) != len(sizes)
            or not 0 <= min(free_sizes) <= max(free_sizes) < _LARGEST_SIZE
            or (shape != sizes and any(want not in (None, size) for size, want in zip(shape, sizes, strict=True)))
        ):
            fixed = [str(size) for size in sizes if size is not None]
            raise InvalidRequest(
                f"{what} has shape {_show(shape)}; expected [{', '.join([free] * bool(free) + fixed)}]"
            )
        if (size := math.prod(shape) * little_endian(spec.dtype).itemsize) > self.max_bytes:
            raise InvalidRequest(
                f"{what} has shape {_show(shape)}, which is {size} bytes; this server takes up to {self.max_bytes}"
            )
        return shape

    def _check_values(self, array: Array, what: str, below: int | None = None) -> None:
        if (error := self._wrong(array, what, below)) is not None:
            raise error

    def _wrong(self, array: Array, what: str, below: int | None = None) -> InvalidRequest | None:
        """Say what is wrong with an array's elements."""
        if array.dtype.kind == "f":
            # Of few numbers those that are finite are counted in half the time that it takes to ask for all.
            if self._finite and np.count_nonzero(np.isfinite(array)) != array.size:
                return InvalidRequest(f"{what} holds NaN or infinity; expected finite numbers")
        elif array.dtype.kind == "b":
            if (array.view(np.uint8) > 1).any():
                return InvalidRequest(f"{what} holds a byte over 1; expected 0 or 1 in each element of a bool")
        elif below is not None and array.size:
            lowest, highest = int(array.min()), int(array.max())
            if lowest < 0 or highest >= below:
                wrong = lowest if lowest < 0 else highest
                return InvalidRequest(f"{what} holds {wrong}; expected 0 to {below - 1}")
        return None

    def _check_rows(self, rows: int) -> None:
        if rows < 1:
            raise InvalidRequest("the batch has no rows (N = 0); expected at least 1")
        if rows > self.max_batch:
            raise InvalidRequest(f"the batch has {rows} rows; this server takes up to {self.max_batch}")

    def _check_steps(self, steps: int, where: str = "") -> None:
        if steps < 1:
            raise InvalidRequest(f"{where}there are no steps (T = {steps}); expected at least 1")
        if steps > self.max_steps:
            raise InvalidRequest(
                f"{where}there are {steps} steps; this server takes up to {self.max_steps} in one sequence or chunk"
            )


def _show(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"
