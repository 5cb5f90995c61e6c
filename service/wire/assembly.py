"""Messages written by hand: the elements of their tensors are copied once, to where they stand in what is sent.

The stubs' library would copy them several times over and let nobody else run meanwhile; NumPy's copies do. Owns the two
rules of Protocol Buffers that this takes. Must not know which messages there are. Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

_LENGTH_DELIMITED = 2
_SMALL_BYTES = 32 * 1024
"""Below it copying everything twice is cheaper than finding the places."""


class Joined(NamedTuple):
    """A tensor, as the rows that it is to be made of.

    Attributes:
        dtype: of the elements; they are written little-endian.
        shape: of the whole.
        rows: in their order.
        pitch: bytes from where a row begins to where the next one does, with zeros between them; 0 for one right behind
            the other.
    """

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    rows: Sequence[Array]
    pitch: int = 0

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    def data(self) -> bytes:
        """Return the whole."""
        little = self.dtype.newbyteorder("<")
        rows = [row.astype(little, copy=False).tobytes() for row in self.rows]
        return b"".join([row.ljust(self.pitch, b"\0") for row in rows] if self.pitch else rows)

    def write(self, buffer: memoryview, begin: int) -> None:
        """Copy the rows to where they belong, in a buffer of zeros."""
        little = self.dtype.newbyteorder("<")
        for row in self.rows:
            np.ndarray(row.shape, little, buffer, begin)[...] = row
            begin += self.pitch or row.nbytes


Part: TypeAlias = bytes | Joined


@dataclass(frozen=True, slots=True)
class Written:
    """A message that is bytes already.

    Attributes:
        data: as they are sent.
    """

    data: bytes

    def ByteSize(self) -> int:
        """How large it is."""
        return len(self.data)


def size(parts: Sequence[Part]) -> int:
    """Bytes of parts, one behind the other."""
    return sum(len(part) if isinstance(part, bytes) else part.size for part in parts)


def field(number: int, parts: Sequence[Part]) -> list[Part]:
    """Make parts a field of a message, which is a string, bytes or a message itself."""
    return [varint(number << 3 | _LENGTH_DELIMITED) + varint(size(parts)), *parts]


def assemble(parts: Sequence[Part]) -> Written:
    """Write parts one behind the other."""
    total = size(parts)
    if total < _SMALL_BYTES:
        return Written(b"".join([part if isinstance(part, bytes) else part.data() for part in parts]))
    whole = io.BytesIO(bytes(total))
    with whole.getbuffer() as buffer:
        at = 0
        for part in parts:
            if isinstance(part, bytes):
                buffer[at : at + len(part)] = part
                at += len(part)
            else:
                part.write(buffer, at)
                at += part.size
    # Nobody else holds the bytes that it was made of: it gives these, and no copy.
    return Written(whole.getvalue())


@functools.lru_cache(1024)
def varint(number: int) -> bytes:
    """Return a number of at least 0 as it stands in a message."""
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])
