"""Arrays from elsewhere, drawn at random, and the files and specs that tests write of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]
Arrays = dict[str, Array]

I, H = 3, 4


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Weights of these shapes, float32."""
    random = np.random.default_rng(seed)
    return {name: random.uniform(-0.8, 0.8, shape).astype(np.float32) for name, shape in shapes.items()}


def gates(letters: str, inputs: int = I, units: int = H, seed: int = 0, **more: tuple[int, ...]) -> Arrays:
    """``W[I, H]``, ``U[H, H]`` and ``b[H]`` of each gate, and what there is beside them."""
    shapes = {"W": (inputs, units), "U": (units, units), "b": (units,)}
    return drawn({part + gate: shape for part, shape in shapes.items() for gate in letters} | more, seed)


def joined(w: Arrays, form: str, letters: str, axis: int) -> Array:
    """The arrays of several gates in one."""
    return np.concatenate([w[form + letter] for letter in letters], axis=axis)


def save(path: Path, arrays: Arrays) -> None:
    """Write arrays in the form that the file's name says."""
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".pt":
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    else:
        np.savez(path, **arrays)  # type: ignore[arg-type]


def write(folder: Path, spec: str, **files: Arrays) -> Path:
    """Write a spec, and a file of arrays for each keyword: ``w_npz`` is w.npz."""
    for name, arrays in files.items():
        save(folder / name.replace("_", "."), arrays)
    path = folder / "spec.yaml"
    path.write_text(spec)
    return path


LSTM = gates("ifgo")
KERAS = {
    "kernel": joined(LSTM, "W", "ifgo", 1),
    "recurrent_kernel": joined(LSTM, "U", "ifgo", 1),
    "bias": joined(LSTM, "b", "ifgo", 0),
}
"""The same LSTM, as Keras has it: i f c o."""
