"""Messages that are none: bytes that cannot be read as the message that a call takes.

gRPC would end the call with UNKNOWN and the name of a Python class. Here the call gets a ``Malformed`` in the message's
place, and says so itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands where a message should have been."""

    size: int

    @property
    def error(self) -> InvalidRequest:
        """What the caller is told."""
        return InvalidRequest(f"the {self.size} bytes that were sent are not the message that this call takes")
