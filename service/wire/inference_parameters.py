"""The parameters of the Open Inference Protocol, each read as what it should be.

A parameter that is not there gives None or False; one of another kind, or beyond its range, raises InvalidRequest,
which says what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from service.errors import InvalidRequest
from service.wire.inference_stubs import inference_pb2 as pb

T = TypeVar("T")
Parameters: TypeAlias = Mapping[str, pb.InferParameter]

_LONGEST_VALUE = 1024
"""Characters in a list for one value; an id has up to 128."""


def flag(parameters: Parameters, name: str) -> bool:
    """Read a truth value."""
    return bool(_read(parameters, name, lambda value: value if isinstance(value, bool) else None, "a bool"))


def integer(parameters: Parameters, name: str, lowest: int, highest: int) -> int | None:
    """Read an integer."""
    number = _read(parameters, name, lambda value: value if _is_integer(value) else None, "an integer")
    if number is not None and not lowest <= number <= highest:
        raise InvalidRequest(f"parameter {name!r} is {number}; expected {lowest} to {highest}")
    return number


def identity(parameters: Parameters, name: str) -> str | None:
    """Read a sequence's id as text; empty for 0, which is none."""
    return _read(parameters, name, as_identity, "an integer or a string")


def as_identity(value: Any) -> str | None:
    """Return an id as text; empty for 0, which is none; None for what is no id."""
    if isinstance(value, str):
        return value
    return (str(value) if value else "") if _is_integer(value) else None


def many(parameters: Parameters, name: str, kinds: tuple[type, ...], most: int) -> list[Any] | None:
    """Read a JSON list of strings or integers."""

    def values(text: Any) -> list[Any] | None:
        try:
            # One that is longer than any such list is not parsed, so that it holds nobody up.
            parsed = json.loads(text) if isinstance(text, str) and len(text) <= most * _LONGEST_VALUE else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(parsed, list) or len(parsed) > most:
            return None
        return parsed if all(isinstance(value, kinds) and not isinstance(value, bool) for value in parsed) else None

    what = " or ".join({str: "strings", int: "integers"}[kind] for kind in kinds)
    return _read(parameters, name, values, f"a string with a JSON list of up to {most} {what}")


def _read(parameters: Parameters, name: str, take: Callable[[Any], T | None], expected: str) -> T | None:
    # Looking a key of a map field up would put it there.
    if name not in parameters:
        return None
    choice = parameters[name].WhichOneof("parameter_choice")
    value = None if choice is None else take(getattr(parameters[name], choice))
    if value is None:
        raise InvalidRequest(f"parameter {name!r} is {'empty' if choice is None else choice}; expected {expected}")
    return value


def _is_integer(value: Any) -> bool:
    # To Python a truth value is an integer too.
    return isinstance(value, int) and not isinstance(value, bool)
