"""Files that people write in YAML: read with care, and each mistake told with its place.

Owns what holds of all of them: no aliases, no key twice, keys as they are written, no key that nobody knows. Must not
know what any of them says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from reprlib import repr as abridged
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

MAX_BYTES = 1 << 20
"""The limit on such a file."""

_TOLD = 5
"""How many mistakes are told at once."""


class Section(BaseModel):
    """A mapping with keys that are known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        known = ", ".join(cls.model_fields)
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping with some of the keys {known}")
        if unknown := [key for key in value if key not in cls.model_fields]:
            close = difflib.get_close_matches(str(unknown[0]), cls.model_fields, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown key {abridged(unknown[0])}, expected some of {known}{meant}")
        return value


Form = TypeVar("Form", bound=Section)


def parse_yaml(form: type[Form], text: bytes | str) -> Form:
    """Read a file's text.

    Args:
        form: what it has to hold; an empty file holds the defaults.
        text: the file's.

    Raises:
        ValueError: it is no YAML, or not of the form; the text is one line that names each place.
    """
    try:
        content = yaml.load(text, _Loader)
        return form.model_validate({} if content is None else content)
    except ValidationError as error:
        raise ValueError("; ".join(map(_told, error.errors()[:_TOLD]))) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _told(error: Mapping[str, Any]) -> str:
    """One mistake: where it is, what was expected, and what was there."""
    said = str(error["msg"]).removeprefix("Value error, ").replace("Field required", "is missing")
    said = (
        said.replace("Input should be", "expected").replace("a valid tuple", "a list").replace("a valid list", "a list")
    )
    said = said.replace("expected greater", "expected a number greater").replace("a valid integer", "a whole number")
    if error["type"] == "dict_type":
        said = "expected a mapping, as in {key: value}"
    if error["type"] not in ("missing", "value_error"):
        said += f", got {abridged(error['input'])}"
    return f"{_place(error['loc'])}{said}"


def _place(path: Sequence[str | int]) -> str:
    """The way to a value in the file, as in ``states[0].initial: ``; the file itself is nothing."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return f"{''.join(parts).removeprefix('.')}: " if parts else ""


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which can blow a small file up, with keys as they are written and each only once."""

    # Its own table: that of YAML 1.1, which PyYAML reads, takes 1e-3 and .5e1 for text.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and form
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not taken, {self.peek_event().start_mark}")  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        # Tensors are called 1, on or no too, which YAML would read as a number and as bools.
        mapping: dict[Hashable, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is a name, {key.start_mark}")
            if key.value in mapping:
                raise yaml.YAMLError(f"{key.value!r} stands twice, {key.start_mark}")
            mapping[key.value] = self.construct_object(value, deep=True)
        return mapping


# The core schema of YAML 1.2, section 10.3.2, but for whole numbers.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$
        |[-+]?[0-9]+[eE][-+]?[0-9]+$
        |[-+]?\.(inf|Inf|INF)$
        |\.(nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
