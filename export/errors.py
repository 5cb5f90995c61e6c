"""What can go wrong with an export, as a user is told of it. Knows no library."""

from __future__ import annotations


class ExportError(Exception):
    """The export cannot be done as it was asked for; the text says what was wrong and what was expected."""
