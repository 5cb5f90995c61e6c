"""A manifest promises nothing that cannot be: batch and time are free axes, of a state the batch alone."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.manifest import Manifest, StateSpec, TensorSpec

X = {"name": "x", "dtype": "float32", "shape": [None, None, 3], "batch_axis": 1, "time_axis": 0}
H = {"name": "h", "input": "h0", "output": "hT", "dtype": "float32", "shape": [1, None, 5], "batch_axis": 1}
WHOLE = {"inputs": [X], "outputs": [X | {"name": "y"}], "states": [H], "streamable": True}


def test_json_there_and_back() -> None:
    """What export writes is what the server reads; axes that are free stay free."""
    manifest = Manifest.model_validate(WHOLE | {"made_with": {"torch": "2"}, "lengths": "lengths"})
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.inputs[0].tail == (3,)
    assert manifest.states[0].tail == (1, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_axis": 3}, "axis 3 must exist"),
        ({"batch_axis": 2}, "axis 2 must exist .* and be free"),
        ({"time_axis": 2}, "axis 2 must exist .* and be free"),
        ({"time_axis": 1}, "batch and time cannot be the same axis"),
        ({"batch_axis": -1}, "greater than or equal to 0"),
        ({"dtype": "bfloat16"}, "Input should be 'float32'"),
        ({"shape": [None, None, 0]}, "greater than or equal to 1"),
        ({"below": 0}, "greater than or equal to 1"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
    ],
    ids=lambda case: str(case),
)
def test_tensors_that_cannot_be(change: dict[str, Any], says: str) -> None:
    """Refused, with the reason."""
    TensorSpec.model_validate(X)
    with pytest.raises(ValidationError, match=says):
        TensorSpec.model_validate(X | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_axis": 0}, "must be null at axis 0 alone"),
        ({"shape": [None, None, 5]}, "must be null at axis 1 alone"),
        ({"shape": [1, 2, 5]}, "must be null at axis 1 alone"),
        ({"time_axis": 0}, "Extra inputs are not permitted"),
    ],
    ids=lambda case: str(case),
)
def test_states_that_cannot_be(change: dict[str, Any], says: str) -> None:
    """Refused, with the reason."""
    StateSpec.model_validate(H)
    with pytest.raises(ValidationError, match=says):
        StateSpec.model_validate(H | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": []}, "at least 1 item"),
        ({"outputs": []}, "at least 1 item"),
        ({"format": 2}, "Input should be 1"),
        ({"precision": "int4"}, "Input should be 'float32'"),
        ({"streamable": None}, "valid boolean"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
    ],
    ids=lambda case: str(case),
)
def test_manifests_that_cannot_be(change: dict[str, Any], says: str) -> None:
    """Refused, with the reason; a format of the future too."""
    Manifest.model_validate(WHOLE)
    with pytest.raises(ValidationError, match=says):
        Manifest.model_validate(WHOLE | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": [X, X]}, "graph input 'x' stands twice"),
        ({"lengths": "h0"}, "graph input 'h0' stands twice"),
        ({"outputs": [X, X]}, "output 'x' stands twice"),
        ({"states": [H, H | {"name": "c", "input": "c0"}]}, "a state's output 'hT' stands twice"),
        ({"states": [H | {"name": "y"}], "outputs": [X | {"name": "y"}]}, "a state is called 'y', and so is an input"),
        ({"states": [H | {"name": "h0"}], "outputs": [X | {"name": "h0"}]}, "a state is called 'h0', and so is an"),
        ({"outputs": [X | {"name": "sequence_start"}]}, "a tensor is called 'sequence_start', which means something"),
        ({"states": [H, H | {"input": "c0", "output": "cT"}]}, "state 'h' stands twice"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_names_that_stand_twice(change: dict[str, Any], says: str) -> None:
    """Two tensors of one name could not be told apart by a caller."""
    with pytest.raises(ValidationError, match=says):
        Manifest.model_validate(WHOLE | change)
