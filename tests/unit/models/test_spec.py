"""The vocabulary of models: sizes, shapes of weights, and settings that no cell has."""

from __future__ import annotations

from typing import Any

import pytest

from models.spec import Layer, ModelSpec


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (Layer("rnn", 2, 3), {"W_x": (3, 2), "W_h": (3, 3), "b": (3,)}),
        (Layer("rnn", 2, 3, bias=False), {"W_x": (3, 2), "W_h": (3, 3)}),
        (Layer("lstm", 2, 3), {"W_x": (12, 2), "W_h": (12, 3), "b": (12,)}),
        (Layer("lstm_peephole", 2, 3), {"W_x": (12, 2), "W_h": (12, 3), "b": (12,), "V": (9,)}),
        (Layer("lstm_coupled", 2, 3), {"W_x": (9, 2), "W_h": (9, 3), "b": (9,)}),
        (Layer("lstm_coupled", 2, 3, peepholes=True), {"W_x": (9, 2), "W_h": (9, 3), "b": (9,), "V": (6,)}),
        (Layer("gru", 2, 3), {"W_x": (9, 2), "W_h": (9, 3), "b": (9,)}),
        (Layer("gru", 2, 3, reset="after"), {"W_x": (9, 2), "W_h": (9, 3), "b": (9,), "b_h": (3,)}),
        (Layer("gru", 2, 3, reset="after", bias=False), {"W_x": (9, 2), "W_h": (9, 3)}),
    ],
)
def test_weight_shapes_of_a_layer(layer: Layer, shapes: dict[str, tuple[int, ...]]) -> None:
    """Each cell has the weights that the table in ``models.spec`` lists."""
    assert layer.weight_shapes == shapes


def test_weight_shapes_of_a_model() -> None:
    """Names carry the layer, the direction, the learned states, the embedding and the head."""
    spec = ModelSpec(
        (
            Layer("lstm", 2, 3, bidirectional=True, bias=False, learned_initial_state=True),
            Layer("gru", 6, 4, bias=False),
        ),
        vocabulary_size=7,
        head_size=5,
    )
    direction = {"W_x": (12, 2), "W_h": (12, 3), "h0": (3,), "c0": (3,)}
    assert spec.weight_shapes == {
        **{f"layers.0.{name}": shape for name, shape in direction.items()},
        **{f"layers.0.reverse.{name}": shape for name, shape in direction.items()},
        "layers.1.W_x": (12, 6),
        "layers.1.W_h": (12, 4),
        "embedding": (7, 2),
        "head.W": (5, 4),
        "head.b": (5,),
    }


def test_sizes_and_kinds() -> None:
    """What a layer and a model say of their outputs and states."""
    both_ways, one_way = Layer("lstm", 2, 3, bidirectional=True), Layer("gru", 6, 4)
    assert (both_ways.output_size, both_ways.has_cell_state) == (6, True)
    assert (one_way.output_size, one_way.has_cell_state) == (4, False)
    mixed = ModelSpec((both_ways, one_way))
    assert (mixed.output_size, mixed.streamable, mixed.uniform) == (4, False, False)
    alike = ModelSpec((Layer("lstm", 2, 3), Layer("lstm_coupled", 3, 3)), head_size=5)
    assert (alike.output_size, alike.streamable, alike.uniform) == (5, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": "elman"}, "unknown cell 'elman'; expected one of rnn, lstm"),
        ({"hidden_size": 0}, "sizes must be positive"),
        ({"input_size": -1}, "sizes must be positive"),
        ({"peepholes": True}, "cell 'lstm' has no form with peepholes"),
        ({"reset": "after"}, "'after' is for gru alone"),
        ({"cell": "gru", "reset": "during"}, "reset='during'"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
    ],
)
def test_refused_layers(arguments: dict[str, Any], message: str) -> None:
    """A layer that no equation describes is refused."""
    with pytest.raises(ValueError, match=message):
        Layer(**{"cell": "lstm", "input_size": 2, "hidden_size": 3, **arguments})


def test_refused_models() -> None:
    """A model needs layers, and each has to take what the one below gives."""
    with pytest.raises(ValueError, match="at least one layer"):
        ModelSpec(())
    with pytest.raises(ValueError, match="takes 3 values, the one below gives 6"):
        ModelSpec((Layer("lstm", 2, 3, bidirectional=True), Layer("lstm", 3, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_size": 0}, "head_size must be positive, .*; got 0"),
        ({"head_size": -2}, "head_size must be positive, .*; got -2"),
        ({"vocabulary_size": 0}, "vocabulary_size must be positive, .*; got 0"),
        ({"head_on": "first"}, "unknown head_on 'first'; expected every or last"),
    ],
)
def test_refused_ends(arguments: dict[str, Any], message: str) -> None:
    """What stands before and after the layers has a size, or is not there."""
    with pytest.raises(ValueError, match=message):
        ModelSpec((Layer("lstm", 2, 3),), **arguments)
