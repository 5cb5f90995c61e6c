"""What can go wrong with an export, as a user is told of it; knows the manifest's parity and nothing else.

::

    ExportError               the text says what was wrong and what was expected
    └── VerificationFailed    the graph is not what it was exported from; nothing was written
"""

from __future__ import annotations

from service.manifest import Parity


class ExportError(Exception):
    """The export cannot be done as it was asked for."""


class VerificationFailed(ExportError):
    """The graph and the reference, or the graph and itself, differ by more than the bound.

    Attributes:
        parity: everything that was compared.
    """

    def __init__(self, parity: Parity) -> None:
        self.parity = parity
        failed = [row for row in parity.rows if not row.within]
        worst = max(failed, key=lambda row: max(row.outputs, row.states))
        error = max(worst.outputs, worst.states)
        super().__init__(
            f"verification failed in {len(failed)} of {len(parity.rows)} rows; at worst, in {worst.case!r} with batch "
            f"{worst.batch} and {worst.steps} steps, the error is {error:.1e} and the bound {worst.bound:.1e}"
        )
