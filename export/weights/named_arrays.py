"""The arrays of the files that a spec names, handed out by name: what is there, what was used, what is left over.

Owns the files' arrays and what has to hold of each: numbers, finite, found under its name. Must not know what they are
the weights of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from export.errors import ExportError
from models.checkpoint import load_arrays
from models.weights import Array

SHOWN = 12
"""How many names an error lists."""


class NamedArrays:
    """Arrays under their names in the files.

    Args:
        paths: the files.

    Raises:
        ExportError: a file cannot be read, or two of them have an array of one name.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._arrays: dict[str, Array] = {}
        self._used: set[str] = set()
        for path in paths:
            try:
                arrays = load_arrays(path)
            except (OSError, ValueError) as error:
                raise ExportError(f"weights: {' '.join(str(error).split())}") from error
            if twice := sorted(arrays.keys() & self._arrays.keys()):
                raise ExportError(f"weights: {path.name} has {twice[0]!r}, and so has a file before it")
            self._arrays |= arrays
        # Counters, learning rates and the seeds of random generators stand in files too, and are weights of nothing.
        self.names = [name for name, array in self._arrays.items() if array.dtype.kind == "f" and array.ndim]

    def take(self, name: str) -> Array:
        """One array, in float64, in which it is itself to the bit.

        Raises:
            ExportError: there is none, or it holds something else than finite floating point numbers.
        """
        if name not in self._arrays:
            like = get_close_matches(name, self.names, n=1)
            raise ExportError(
                f"there is no array {name!r}" + (f"; did you mean {like[0]!r}?" if like else f"; there are {self}")
            )
        array = self._arrays[name]
        if array.dtype.kind != "f":
            raise ExportError(f"{name!r} is {array.dtype}, expected floating point")
        if not np.isfinite(array).all():
            raise ExportError(f"{name!r} holds NaN or infinity, expected finite numbers")
        self._used.add(name)
        return array.astype(np.float64)

    def below(self, path: str) -> dict[str, str]:
        """The names under a path whose parts are set apart by slashes, each by what stands after the path."""
        folder = path.rstrip("/") + "/" if path else ""
        return {name.removeprefix(folder): name for name in self.names if name.startswith(folder)}

    def check_all_used(self, ignore: Sequence[str]) -> None:
        """See that no array was forgotten.

        Args:
            ignore: the names that may be left over, with ``*`` and ``?`` as in a shell.

        Raises:
            ExportError: some have no place in the model, and nobody said so.
        """
        left = [name for name in self.names if name not in self._used]
        if left := [name for name in left if not any(fnmatchcase(name, pattern) for pattern in ignore)]:
            raise ExportError(
                f"arrays are left over: {self._listed(left)}; expected each to be of use in the spec, or under 'ignore'"
            )

    def __str__(self) -> str:
        return self._listed(self.names)

    def _listed(self, names: Sequence[str]) -> str:
        listed = ", ".join(f"{name} {list(self._arrays[name].shape)}" for name in names[:SHOWN])
        return listed + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") if names else "none"
