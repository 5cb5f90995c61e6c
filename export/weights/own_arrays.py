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

from dataclasses import dataclass

import numpy as np

from export.errors import ExportError
from export.weights.named_arrays import NamedArrays
from export.weights.spec import Direction, LayerSource, gate_sets
from models.spec import GATES, PEEPHOLES, PREFIXES, Layer
from models.weights import Array, check_shapes

PARTS = ("W_x", "W_h", "W_xh", "W_hx", "b", "b_h", "V")
MATRICES = set(PARTS[:4])

SEEING = {"rnn": "", "lstm": "", "lstm_peephole": "ifo", "lstm_coupled": "ifo", "gru": ""}
"""The gates that can see the cell state, as files have them."""

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
        named, cell = self.where.arrays, self.source.cell
        if unknown := sorted(named.keys() - set(PARTS)):
            raise ExportError(f"arrays: unknown part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        if (matrices := named.keys() & MATRICES) not in ({"W_x", "W_h"}, {"W_xh"}, {"W_hx"}):
            raise ExportError(
                f"arrays: of matrices there are {', '.join(sorted(matrices)) or 'none'}; expected W_x and W_h, or one "
                "of W_xh and W_hx, where each is for [x, h] or [h, x] side by side"
            )
        I, H = self._sizes()
        W_x, W_h = self._matrices(I, H)
        after = self.source.reset == "after"
        # One vector is of the candidate, whose second bias alone has to be kept apart.
        of_one = after and self._stacked("b_h") > 1 and self._take(str(named["b_h"])).size == H
        b = self._by_gate("b", self._gates, H)
        b_h = self._by_gate("b_h", ("h",) if of_one else self._gates, H)
        V = self._by_gate("V", tuple(gate for gate in self._gates if gate in SEEING[cell]), H)

        canonical = {"W_x": _stack("W_x", W_x, GATES[cell]), "W_h": _stack("W_h", W_h, GATES[cell])}
        if b or b_h:
            zeros, second = np.zeros(H), dict(b_h)
            if after:
                canonical["b_h"] = second.pop("h", zeros)
            canonical["b"] = np.concatenate([b.get(g, zeros) + second.get(g, zeros) for g in GATES[cell]])
        if V or cell == "lstm_peephole":
            canonical["V"] = _stack("V", V, PEEPHOLES[cell])
        return canonical

    @property
    def _gates(self) -> tuple[str, ...]:
        """The gates as the file has them: in the order of the spec, or in any where nothing is stacked."""
        if self.source.gates is not None:
            return tuple(self.source.gates)
        *_, last = gate_sets(self.source.cell)
        named = [names for names in self.where.arrays.values() if isinstance(names, dict)]
        return last if any("i" in names for names in named) else GATES[self.source.cell]

    def _sizes(self) -> tuple[int, int]:
        """I and H: as the spec has them, or as the matrices have."""
        source = self.source
        if "W_h" in self.where.arrays:
            H = source.hidden_size or min(self._first("W_h").shape)
            return source.input_size or max(1, self._first("W_x").size // (H * self._stacked("W_x"))), H
        (joined,) = self.where.arrays.keys() & MATRICES
        shape = self._first(joined).shape
        wide, out = shape if source.product == "x @ W" else shape[::-1]
        H = source.hidden_size or out // self._stacked(joined)
        I = source.input_size or wide - H
        if min(I, H) < 1 or out % self._stacked(joined):
            form = "[I + H, H]" if source.product == "x @ W" else "[H, I + H]"
            with_product = f"for each gate with product {source.product}"
            raise ExportError(f"arrays.{joined}: the shape is {list(shape)}, expected {form} {with_product}")
        return I, H

    def _matrices(self, I: int, H: int) -> tuple[ByGate, ByGate]:
        """``W_x[H, I]`` and ``W_h[H, H]`` of each gate."""
        if "W_h" in self.where.arrays:
            return self._by_gate("W_x", self._gates, H, wide=I), self._by_gate("W_h", self._gates, H, wide=H)
        (joined,) = self.where.arrays.keys() & MATRICES
        both = self._by_gate(joined, self._gates, H, wide=I + H)
        if joined == "W_xh":
            return {gate: W[:, :I] for gate, W in both.items()}, {gate: W[:, I:] for gate, W in both.items()}
        return {gate: W[:, H:] for gate, W in both.items()}, {gate: W[:, :H] for gate, W in both.items()}

    def _by_gate(self, part: str, gates: tuple[str, ...], H: int, wide: int | None = None) -> ByGate:
        """One part's array of each gate, ``[H, wide]`` or ``[H]``; nothing where the spec does not name the part."""
        names = self.where.arrays.get(part)
        if names is None:
            return {}
        if not gates:
            raise ExportError(f"arrays.{part}: a cell {self.source.cell} has no peepholes")
        stacks: dict[tuple[str, ...], str]
        if isinstance(names, dict):
            if unknown := sorted(names.keys() - set(gates)):
                raise ExportError(f"arrays.{part}: unknown gate {unknown[0]!r}, expected some of {' '.join(gates)}")
            stacks = {(gate,): name for gate, name in names.items()}
        elif "{gate}" in names:
            stacks = {(gate,): names.replace("{gate}", gate) for gate in gates}
        else:
            stacks = {gates: names}
            if len(gates) > 1 and self.source.gates is None:
                raise ExportError(
                    f"arrays.{part}: gates is missing, the order in which {names!r} stacks them; "
                    f"{' '.join(gates)}, for example"
                )
        by_gate: ByGate = {}
        for stacked, name in stacks.items():
            array = self._fitting(part, name, len(stacked), H, wide)
            by_gate |= zip(stacked, np.split(array, len(stacked)), strict=True)
        if self.source.cell == "lstm_coupled" and "i" in by_gate:
            by_gate["f"] = -by_gate.pop("i")  # f = 1 - i, and 1 - sigmoid(a) = sigmoid(-a)
        return by_gate

    def _fitting(self, part: str, name: str, gates: int, H: int, wide: int | None) -> Array:
        """An array of one or more gates, if it has the shape that it should have: ``[gates * H, wide]``."""
        array, out = self._take(name), gates * H
        wrong = f"arrays.{part}: {name!r} has shape {list(array.shape)}, expected "
        if wide is None:
            if array.size != out or max(array.shape, default=0) != out:
                raise ExportError(f"{wrong}[{out}]")
            return array.reshape(-1)
        by_row = self.source.product == "x @ W"
        expected = (wide, out) if by_row else (out, wide)
        if array.shape != expected:
            other = "W @ x" if by_row else "x @ W"
            hint = f"; it would fit product: {other}" if array.shape == expected[::-1] else ""
            raise ExportError(f"{wrong}{list(expected)} with product {self.source.product}{hint}")
        return array.T if by_row else array

    def _stacked(self, part: str) -> int:
        """How many gates one array of the part holds."""
        names = self.where.arrays.get(part, {})
        return 1 if isinstance(names, dict) or "{gate}" in names else len(self._gates)

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


def _stack(part: str, by_gate: ByGate, gates: tuple[str, ...]) -> Array:
    """The arrays of all gates in one, in canonical order."""
    if missing := [gate for gate in gates if gate not in by_gate]:
        raise ExportError(f"arrays.{part}: gate {missing[0]} is missing, expected {' '.join(gates)}")
    return np.concatenate([by_gate[gate] for gate in gates])
