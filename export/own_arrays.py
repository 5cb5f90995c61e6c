"""Arrays of nobody's layout: each named by the part that it plays in the equations, as textbook programs have them.

Owns the parts, and the way from them to one layer's canonical weights. Must not know files, nor other layers.

========  =====================================================================================================
part      what it is, for a gate; ``[in, out]`` with product ``x @ W``, ``[out, in]`` with ``W @ x``
========  =====================================================================================================
``W_x``   the matrix of the input
``W_h``   the matrix of the state
``W_xh``  both side by side, for ``[x, h]``, in the place of ``W_x`` and ``W_h``
``W_hx``  the same for ``[h, x]``
``b``     the bias ``[H]``
``b_h``   a second bias ``[H]``; inside the reset of a GRU with reset after, elsewhere added to the first
``V``     the peephole ``[H]``, of the gates that see the cell state
========  =====================================================================================================

Each part is one array that stacks all gates along the axis ``out``, in the order that the spec says, or one array for
each gate. Vectors may be rows or columns, ``[1, H]`` or ``[H, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from export.errors import ExportError
from export.named_arrays import NamedArrays
from export.weights_spec import Direction, LayerSource, gate_sets
from models.spec import GATES, PEEPHOLES, PREFIXES, Layer
from models.weights import Array, check_shapes

PARTS = ("W_x", "W_h", "W_xh", "W_hx", "b", "b_h", "V")

ByGate = dict[str, Array]


def read_own_arrays(source: LayerSource, arrays: NamedArrays) -> tuple[Layer, dict[str, Array]]:
    """Read one layer whose arrays are named one by one.

    Returns:
        The layer, and its canonical weights.

    Raises:
        ExportError: an array is missing or does not fit.
        ValueError: there is no such layer, or its directions differ.
    """
    if source.cell == "gru" and source.reset is None:
        raise ExportError("reset is missing: the arrays do not tell whether it is before or after the product with W_h")
    where = [source] if source.backward is None else [source, source.backward]
    directions = [_Direction(source, each, arrays).read() for each in where]
    first = directions[0]
    layer = Layer(
        source.cell,
        input_size=first["W_x"].shape[1],
        hidden_size=first["W_h"].shape[1],
        bidirectional=len(directions) == 2,
        peepholes=source.cell == "lstm_coupled" and "V" in first,
        reset=source.reset or "before",
        activation=source.activation,
        bias="b" in first,
    )
    weights = {
        prefix + name: array
        for prefix, direction in zip(PREFIXES, directions, strict=False)
        for name, array in direction.items()
    }
    check_shapes(weights, layer.weight_shapes)
    return layer, weights


@dataclass(frozen=True)
class _Direction:
    """One direction about to be read."""

    source: LayerSource
    where: Direction
    arrays: NamedArrays

    def read(self) -> dict[str, Array]:
        """Its canonical weights."""
        named = self.where.arrays
        if unknown := sorted(named.keys() - set(PARTS)):
            raise ExportError(f"arrays: unknown part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        matrices = named.keys() & {"W_x", "W_h", "W_xh", "W_hx"}
        if matrices not in ({"W_x", "W_h"}, {"W_xh"}, {"W_hx"}):
            raise ExportError(
                f"arrays: of matrices there are {', '.join(sorted(matrices)) or 'none'}; expected W_x and W_h, or one "
                "of W_xh and W_hx, where each is for [x, h] or [h, x] side by side"
            )
        I, H = self._sizes()
        W_x, W_h = self._matrices(I, H)
        parts = {"W_x": W_x, "W_h": W_h}
        # In a GRU with reset after, an array of H numbers is the one bias that has to be a second one.
        inside = ("h",) if self.source.reset == "after" and self._is_one_vector("b_h", H) else self._gates
        b = self._by_gate("b", self._gates, self._vector(H))
        b_h = self._by_gate("b_h", inside, self._vector(H))
        parts["V"] = self._by_gate("V", self._seeing, self._vector(H))
        for name in ("W_x", "W_h", "V"):
            wanted = self._seeing if name == "V" and name in named else () if name == "V" else self._gates
            if missing := [gate for gate in wanted if gate not in parts[name]]:
                raise ExportError(f"arrays.{name}: gate {missing[0]} is missing, expected {' '.join(wanted)}")
        for by_gate in (*parts.values(), b, b_h):
            if self.source.cell == "lstm_coupled" and "i" in by_gate:
                by_gate["f"] = -by_gate.pop("i")  # f = 1 - i, and 1 - sigmoid(a) = sigmoid(-a)

        cell, zeros = self.source.cell, np.zeros(H)
        canonical = {name: np.concatenate([parts[name][gate] for gate in GATES[cell]]) for name in ("W_x", "W_h")}
        if b or b_h:
            own = {"h"} if self.source.reset == "after" else set()
            sums = [b.get(g, zeros) + (zeros if g in own else b_h.get(g, zeros)) for g in GATES[cell]]
            canonical["b"] = np.concatenate(sums)
            if own:
                canonical["b_h"] = b_h.get("h", zeros)
        if parts["V"]:
            canonical["V"] = np.concatenate([parts["V"][gate] for gate in PEEPHOLES[cell]])
        return canonical

    @property
    def _gates(self) -> tuple[str, ...]:
        """The gates as the file has them: in the order of the spec, or any where nothing is stacked."""
        if self.source.gates is not None:
            return tuple(self.source.gates)
        *_, other = gate_sets(self.source.cell)
        named = [names for names in self.where.arrays.values() if isinstance(names, dict)]
        return other if any("i" in names for names in named) else GATES[self.source.cell]

    @property
    def _seeing(self) -> tuple[str, ...]:
        """Those of them that can see the cell state."""
        seeing = PEEPHOLES.get(self.source.cell, ())
        return tuple(gate for gate in self._gates if gate in seeing or (gate == "i" and seeing))

    def _sizes(self) -> tuple[int, int]:
        """I and H: as the spec has them, or as the matrices have."""
        source = self.source
        if "W_h" in self.where.arrays:
            H = source.hidden_size or min(self._first("W_h").shape)
            width = H * self._stacked("W_x")
            I = source.input_size or self._first("W_x").size // width
        else:
            (joined,) = self.where.arrays.keys() & {"W_xh", "W_hx"}
            shape = self._first(joined).shape
            wide, out = shape if source.product == "x @ W" else shape[::-1]
            H = source.hidden_size or out // self._stacked(joined)
            I = source.input_size or wide - H
            if min(I, H) < 1:
                raise ExportError(
                    f"arrays.{joined}: its shape is {list(shape)}, where with product {source.product} the axis of "
                    f"[x, h] should be {'first' if source.product == 'x @ W' else 'last'}, and longer than H"
                )
        return max(I, 1), H

    def _matrices(self, I: int, H: int) -> tuple[ByGate, ByGate]:
        """``W_x[H, I]`` and ``W_h[H, H]`` of each gate."""
        named = self.where.arrays
        if "W_h" in named:
            W_x = self._by_gate("W_x", self._gates, self._matrix(I, H, "I"))
            return W_x, self._by_gate("W_h", self._gates, self._matrix(H, H, "H"))
        (joined,) = named.keys() & {"W_xh", "W_hx"}
        both = self._by_gate(joined, self._gates, self._matrix(I + H, H, "I + H"))
        cut, x_first = (I, True) if joined == "W_xh" else (H, False)
        parts = {gate: (W[:, :cut], W[:, cut:]) for gate, W in both.items()}
        W_x = {gate: pair[0 if x_first else 1] for gate, pair in parts.items()}
        return W_x, {gate: pair[1 if x_first else 0] for gate, pair in parts.items()}

    def _by_gate(self, part: str, gates: tuple[str, ...], read: Callable[[str, str, int], Array]) -> ByGate:
        """One part's array of each gate; nothing where the spec does not name it."""
        names = self.where.arrays.get(part)
        if names is None:
            return {}
        if not gates:
            raise ExportError(f"arrays.{part}: a cell {self.source.cell} has no peepholes")
        if isinstance(names, dict):
            if unknown := sorted(names.keys() - set(gates)):
                raise ExportError(f"arrays.{part}: unknown gate {unknown[0]!r}, expected some of {' '.join(gates)}")
            return {gate: read(part, name, 1) for gate, name in names.items()}
        if "{gate}" in names:
            return {gate: read(part, names.replace("{gate}", gate), 1) for gate in gates}
        if len(gates) > 1 and self.source.gates is None:
            example = " ".join(GATES[self.source.cell])
            raise ExportError(
                f"arrays.{part}: gates is missing, the order in which {names!r} stacks them; {example}, for example"
            )
        return dict(zip(gates, np.split(read(part, names, len(gates)), len(gates)), strict=True))

    def _matrix(self, wide: int, H: int, axis: str) -> Callable[[str, str, int], Array]:
        def read(part: str, name: str, gates: int) -> Array:
            array, out = self._take(name), gates * H
            by_row = self.source.product == "x @ W"
            expected = (wide, out) if by_row else (out, wide)
            if array.shape != expected:
                what = f"{gates} * H" if gates > 1 else "H"
                says = f"[{axis}, {what}]" if by_row else f"[{what}, {axis}]"
                other = "W @ x" if by_row else "x @ W"
                hint = f"; it would fit product: {other}" if array.shape == expected[::-1] else ""
                raise ExportError(
                    f"arrays.{part}: {name!r} has shape {list(array.shape)}, expected {list(expected)}, {says} with "
                    f"product {self.source.product}{hint}"
                )
            return array.T if by_row else array

        return read

    def _vector(self, H: int) -> Callable[[str, str, int], Array]:
        def read(part: str, name: str, gates: int) -> Array:
            array = self._take(name)
            if array.size != gates * H or max(array.shape, default=1) != array.size:
                raise ExportError(f"arrays.{part}: {name!r} has shape {list(array.shape)}, expected [{gates * H}]")
            return array.reshape(-1)

        return read

    def _is_one_vector(self, part: str, H: int) -> bool:
        names = self.where.arrays.get(part)
        return isinstance(names, str) and "{gate}" not in names and self._take(names).size == H

    def _stacked(self, part: str) -> int:
        """How many gates one array of the part holds."""
        names = self.where.arrays[part]
        return len(self._gates) if isinstance(names, str) and "{gate}" not in names else 1

    def _first(self, part: str) -> Array:
        """A matrix of the part: the only one, or that of a first gate."""
        names = self.where.arrays[part]
        name = next(iter(names.values())) if isinstance(names, dict) else names.replace("{gate}", self._gates[0])
        array = self._take(name)
        if array.ndim != 2 or not array.size:
            raise ExportError(f"arrays.{part}: {name!r} has shape {list(array.shape)}, expected a matrix")
        return array

    def _take(self, name: str) -> Array:
        return self.arrays.take((self.where.prefix or "") + name)
