"""Memory that is taken from the system when it is first written, and can be given back piece by piece.

Owns what depends on the system: address space, pages. Must not know what lies in it.
"""

from __future__ import annotations

import mmap
import sys

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE

# Elsewhere the calls below mean other things or are missing. Zeros cost nothing before they are written there either,
# but what has been written is not given back.
_LINUX = sys.platform == "linux"
# Without it the system may refuse to reserve more than it has. Python has a name for it from 3.13 on.
_MAP_NORESERVE = 0x4000


class Reserved:
    """Address space of a fixed size, full of zeros, that costs memory only where it has been written.

    Attributes:
        bytes: all of it, from the first page on.

    Args:
        size: in bytes, at least 1.

    Raises:
        MemoryError: if the system has no such address space.
    """

    def __init__(self, size: int) -> None:
        try:
            if _LINUX:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
                self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
            else:
                self.bytes = np.zeros(size, np.uint8)
        except (OSError, OverflowError, ValueError, MemoryError) as error:
            raise MemoryError(f"cannot reserve {size} bytes of address space: {error}") from error

    def give_back(self, start: int, stop: int) -> None:
        """Let the system have the whole pages between two bytes again; they hold zeros then, or what they held."""
        start, stop = -(-start // PAGE_BYTES) * PAGE_BYTES, stop // PAGE_BYTES * PAGE_BYTES
        if start < stop and _LINUX:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
