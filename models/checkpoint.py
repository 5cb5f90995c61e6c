"""Weights from a file: safetensors, NumPy's .npz, HDF5 or torch's own, and never by way of pickle.

Owns what has to hold of a file before its arrays are handed on: its kind, its size, and that there is nothing in it but
plain arrays. Must not know what they are the weights of. torch is imported only for a torch file.

A pickle is a program, and to load one is to run it. safetensors and HDF5 have none; .npz is read with
``allow_pickle=False``; a torch file with ``weights_only=True``, whose unpickler builds tensors and plain containers and
refuses all else. What an HDF5 file only points at, in another file, is not followed.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.weights import Array

MAX_BYTES = 4 * 2**30
"""The default limit on a file, and on all of its arrays together."""


def load_arrays(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """Load named arrays from a checkpoint.

    Args:
        path: a .safetensors, .npz, .h5, .hdf5, .pt or .pth file. A torch file holds a dict of tensors, or has one as
            "state_dict" or "model_state_dict"; an array in HDF5 is named by its path, "layers/lstm/cell/vars/0".
        max_bytes: limit on the file, and on all of its arrays together.

    Returns:
        The arrays under their names, in the dtypes of the file: booleans, integers or floating point.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged or too large, or there is more in it than such arrays.
    """
    path = Path(path)
    load = _LOADERS.get(path.suffix.lower())
    if load is None:
        raise ValueError(f"{path.name}: unknown kind of checkpoint; expected one of {', '.join(_LOADERS)}")
    _check_size(path.name, path.stat().st_size, max_bytes)
    try:
        entries = load(path, max_bytes)
    except Exception as error:  # whatever a library raises at bytes that it cannot make sense of
        raise ValueError(f"{path.name}: cannot be loaded: {error}") from error
    for name, array in entries.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise ValueError(f"{path.name}: {name!r} is not an array of booleans, integers or floating point")
    return entries


def _load_safetensors(path: Path, max_bytes: int) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)


def _load_npz(path: Path, max_bytes: int) -> dict[str, Any]:
    _check_archive(path, max_bytes)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _load_hdf5(path: Path, max_bytes: int) -> dict[str, Any]:
    import h5py

    with h5py.File(path, "r") as file:
        datasets: dict[str, Any] = {}
        # visititems follows no link, neither within the file nor out of it.
        file.visititems(lambda name, item: datasets.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        _check_size("unpacked", sum(dataset.nbytes for dataset in datasets.values()), max_bytes)
        for name, dataset in datasets.items():
            if dataset.external or dataset.is_virtual:
                raise ValueError(f"{name!r} keeps its values in another file")
        return {name: np.asarray(dataset[()]) for name, dataset in datasets.items()}


def _load_torch(path: Path, max_bytes: int) -> dict[str, Any]:
    import torch

    _check_archive(path, max_bytes)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:  # not in torch's words: they advise to load it unsafely
        raise ValueError(
            "damaged, or more than tensors and plain containers in it; save the state dict alone"
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content.get("model_state_dict", content))
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError("expected a dict of tensors, or one under the key 'state_dict'")
    _check_size(path.name, sum(tensor.nbytes for tensor in content.values()), max_bytes)
    return {str(name): tensor.detach().numpy().copy() for name, tensor in content.items()}


def _check_archive(path: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(path) as archive:
        _check_size("unpacked", sum(entry.file_size for entry in archive.infolist()), max_bytes)


def _check_size(what: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ValueError(f"{what}: {size_bytes} bytes, the limit is {max_bytes}")


_LOADERS = {
    ".safetensors": _load_safetensors,
    ".npz": _load_npz,
    ".h5": _load_hdf5,
    ".hdf5": _load_hdf5,
    ".pt": _load_torch,
    ".pth": _load_torch,
}
