"""What can go wrong with an export, as a user is told of it; knows the manifest's parity and nothing else.

::

    ExportError               the text says what was wrong and what was expected
    └── VerificationFailed    the graph is not what it was exported from, or the file not what it says of itself
"""

from __future__ import annotations

from service.manifest import Parity


class ExportError(Exception):
    """The export cannot be done as it was asked for."""


class VerificationFailed(ExportError):
    """The graph, the module and the reference differ by more than the bound, or the file is not what it says it is.

    Attributes:
        parity: everything that was compared; None where it did not come to that.
    """

    def __init__(self, says: str, parity: Parity | None = None) -> None:
        self.parity = parity
        super().__init__(says)
