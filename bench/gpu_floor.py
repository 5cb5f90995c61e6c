"""The least time that a device can take for a tick: what has to be moved, or computed, at the rates it was seen at.

Owns how bytes and operations of a tick are counted. Must not know how rates are measured, or ticks.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu_cases import Case, Stack

ITEM_BYTES = 4
"""Of a float32."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device was seen to do, in the same run.

    Attributes:
        memory_bytes_per_s: read and written, of a large copy within the device's memory.
        operations_per_s: multiplications and additions of a large product in float32, without TF32.
        up_bytes_per_s: of a large copy from pinned host memory to the device.
        down_bytes_per_s: of one back.
    """

    memory_bytes_per_s: float
    operations_per_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float


def weight_bytes(stack: Stack) -> int:
    """W, R and one bias of every layer; a peephole's three vectors too."""
    peepholes = 3 if stack.cell == "lstm_peephole" else 0
    below, count = stack.input_size, 0
    for _ in range(stack.layers):
        count += stack.hidden_size * (stack.gates * (below + stack.hidden_size + 1) + peepholes)
        below = stack.hidden_size
    return count * ITEM_BYTES


def state_bytes(stack: Stack) -> int:
    """The states of one row."""
    return stack.states * stack.layers * stack.hidden_size * ITEM_BYTES


def operations(case: Case) -> int:
    """Multiplications and additions of the matrix products of a tick; what is done to each gate's value is left out."""
    below, count = case.stack.input_size, 0
    for _ in range(case.stack.layers):
        count += 2 * case.stack.gates * case.stack.hidden_size * (below + case.stack.hidden_size)
        below = case.stack.hidden_size
    return count * case.rows * case.steps


def moved_bytes(case: Case) -> int:
    """Weights read once, states read once and written once: however many steps a tick has, no device moves less."""
    return weight_bytes(case.stack) + 2 * case.rows * state_bytes(case.stack)


def floor_s(case: Case, rates: Rates) -> float:
    """The device's floor: the bytes at the memory's rate, or the operations at theirs, whichever takes longer."""
    return max(moved_bytes(case) / rates.memory_bytes_per_s, operations(case) / rates.operations_per_s)


def link_s(case: Case, rates: Rates) -> float:
    """The least time for x up and y down, which go at once: the longer of the two."""
    cells = case.rows * case.steps * ITEM_BYTES
    up, down = cells * case.stack.input_size, cells * case.stack.hidden_size
    return max(up / rates.up_bytes_per_s, down / rates.down_bytes_per_s)
