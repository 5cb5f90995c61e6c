"""Arrays in a library's layout: found in a file by the names that the library gives them.

Owns those names. Must not know how layouts are converted (``models.layouts`` does), nor other layers.

Keras names an array by its place in the model. The last part of the name is ``kernel`` or ``kernel:0``; or, in a
.weights.h5 file of Keras 3, ``vars/0``, where the kernel, the recurrent kernel and the bias come in this order. The
directions of a Bidirectional layer have parts that start with ``forward`` and ``backward``. In torch's layout a prefix
is that of a whole module, with all of its layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from export.errors import ExportError
from export.weights.named_arrays import NamedArrays
from export.weights.spec import Direction, LayerSource
from models.layouts import LAYOUTS, LayoutName, array_shapes, convert
from models.spec import GATES, Layer
from models.state_dicts import from_torch_state_dict
from models.weights import Array, Weights

NAMES = {
    "torch": r"(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?",
    "keras": r"(reverse\.)?(kernel|recurrent_kernel|bias)",
    "onnx": r"[WRBP]",
    "fused": r"(reverse\.)?(W_x|W_h|b|b_h|V)",
    "matrices": r"(reverse\.)?[UWV]_[ifcorzh]",
}
"""What a layout's names look like."""

KERAS = ("kernel", "recurrent_kernel", "bias")
BIASES = {"keras": "bias", "onnx": "B", "fused": "b", "matrices": "", "torch": "bias_ih_l0"}


def read_library_arrays(source: LayerSource, arrays: NamedArrays) -> tuple[list[Layer], dict[str, Array]]:
    """Read one layer, or all layers of a torch module.

    Returns:
        The layers, and their canonical weights under ``layers.0.W_x``.

    Raises:
        ExportError: an array is missing or does not fit.
        ValueError: the layout cannot hold such a layer.
    """
    assert source.layout is not None
    places = find_arrays(source, source.layout, arrays)
    if source.backward is not None:
        form = LAYOUTS[source.layout].backward
        if form is None:
            raise ExportError(f"backward: in layout {source.layout} one array holds both directions")
        backward = find_arrays(source.backward, source.layout, arrays)
        places |= {form.format(part.removeprefix("reverse.")): name for part, name in backward.items()}
    taken = {part: arrays.take(name) for part, name in places.items()}
    if source.layout == "torch":
        layers, weights = from_torch_state_dict(taken, prefix="", activation=source.activation)
        if layers[0].cell != source.cell:
            raise ExportError(f"cell: the spec says {source.cell}, the arrays are those of torch's {layers[0].cell}")
        return layers, weights
    layer = _layer(source, taken)
    _check_arrays(taken, array_shapes(layer, source.layout), places)
    fused = convert(taken, layer, source=source.layout, target="fused")
    return [layer], {f"layers.0.{name}": array for name, array in fused.items()}


def find_arrays(where: Direction, layout: LayoutName, arrays: NamedArrays) -> dict[str, str]:
    """The names in the file of a layout's arrays.

    Args:
        where: the spec's part that says where they are.
        layout: a name in ``models.layouts``.
        arrays: the file's.

    Returns:
        Each name in the file, under the layout's own (of layer 0, with torch's cells too).

    Raises:
        ExportError: none is there, or several could be the same.
    """
    prefix = where.prefix or ""
    found: dict[str, str] = {}
    if where.arrays:
        for part, name in where.arrays.items():
            if not isinstance(name, str) or not re.fullmatch(NAMES[layout], part):
                raise ExportError(f"arrays.{part}: expected a name of layout {layout}, and the name of one array")
            found[_numbered(layout, part)] = prefix + name
        return found
    if where.prefix is None and layout == "torch":
        prefix = _only_module(arrays)
    for part, name in _candidates(layout, prefix, arrays):
        if part in found:
            raise ExportError(f"prefix: both {found[part]!r} and {name!r} could be {part!r}; expected a longer prefix")
        found[part] = name
    if not found:
        raise ExportError(f"prefix: nothing in layout {layout} stands under {prefix!r}; there are {arrays}")
    return found


def _candidates(layout: LayoutName, prefix: str, arrays: NamedArrays) -> Iterator[tuple[str, str]]:
    """What the arrays under a prefix are in a layout, by their names; those that are nothing are left out."""
    if layout == "keras":
        for rest, name in arrays.below(prefix).items():
            if part := keras_part(rest, KERAS):
                backward = any(each.startswith("backward") for each in rest.split("/"))
                yield f"reverse.{part}" if backward else part, name
        return
    for name in arrays.names:
        rest = name.removeprefix(prefix).lstrip("./")
        if name.startswith(prefix) and re.fullmatch(NAMES[layout], rest):
            yield _numbered(layout, rest), name


def keras_part(path: str, parts: Sequence[str]) -> str | None:
    """Which of a Keras layer's parts, in the order of its variables, an array is by the end of its name."""
    *_, above, last = ("", *path.split("/"))
    last = last.partition(":")[0]
    if above == "vars" and last.isdecimal() and int(last) < len(parts):
        return parts[int(last)]
    return last if last in parts else None


def _numbered(layout: LayoutName, part: str) -> str:
    """The arrays of a torch cell are named as those of a module's only layer."""
    if layout != "torch" or re.search(r"_l\d", part):
        return part
    stem, reverse, _ = part.partition("_reverse")
    return f"{stem}_l0{reverse}"


def _only_module(arrays: NamedArrays) -> str:
    """The prefix of the only recurrent module among the arrays of a torch model."""
    found = [match[1] for match in (re.fullmatch(r"(.*)weight_ih(_l0)?", name) for name in arrays.names) if match]
    if len(found) != 1:
        raise ExportError(f"prefix is missing: there are recurrent modules under {found or 'none'}; there are {arrays}")
    return found[0]


def _layer(source: LayerSource, arrays: Weights) -> Layer:
    """The layer that the arrays are the weights of, where the layout is not torch's."""
    assert source.layout is not None
    layout = LAYOUTS[source.layout]
    gate = f"_{GATES[source.cell][0]}" if layout.apart else ""
    kernels, shapes = [layout.names[name] + gate for name in ("W_x", "W_h")], []
    for name in kernels:
        if name not in arrays or arrays[name].ndim != (3 if layout.backward is None else 2):
            got = f"has shape {list(arrays[name].shape)}" if name in arrays else "is missing"
            raise ExportError(f"layout {source.layout}: {name!r} {got}, expected a matrix for each direction")
        shapes.append(arrays[name].shape)
    return Layer(
        source.cell,
        input_size=source.input_size or shapes[0][-2 if layout.transposed else -1],
        hidden_size=source.hidden_size or shapes[1][-2 if layout.transposed else -1],
        bidirectional=shapes[0][0] == 2 if layout.backward is None else layout.backward.format(kernels[0]) in arrays,
        peepholes=source.cell == "lstm_coupled" and any(part in arrays for part in ("V", "V_f", "P")),
        reset=_reset(source, arrays),
        activation=source.activation,
        bias=BIASES[source.layout] in arrays,
    )


def _reset(source: LayerSource, arrays: Weights) -> Literal["before", "after"]:
    """Where the reset gate stands: as the spec says, or as the biases do."""
    if source.cell != "gru":
        return "before"
    if source.reset is not None:
        return source.reset
    if source.layout == "keras" and "bias" in arrays:
        return "after" if arrays["bias"].ndim == 2 else "before"
    if source.layout == "fused" and "b_h" in arrays:
        return "after"
    raise ExportError("reset is missing: these arrays do not tell whether it is before or after the product")


def _check_arrays(arrays: Weights, expected: Mapping[str, tuple[int, ...]], places: Mapping[str, str]) -> None:
    """See that the arrays are those of the layer; errors have the names of the file."""
    if missing := sorted(expected.keys() - arrays.keys()):
        raise ExportError(f"{missing[0]!r} is missing; of this layer there are {', '.join(sorted(places.values()))}")
    if unknown := sorted(arrays.keys() - expected.keys()):
        raise ExportError(f"{places[unknown[0]]!r} has no place: such a layer has {', '.join(sorted(expected))}")
    for part, shape in expected.items():
        if arrays[part].shape != shape:
            raise ExportError(
                f"{places[part]!r}, which is {part!r}, has shape {list(arrays[part].shape)}, expected {list(shape)}"
            )
