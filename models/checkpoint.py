"""Weights from a file: safetensors, NumPy's .npz, HDF5 or torch's own, and never by way of pickle.

Owns what has to hold of a file before its arrays are handed on: its kind, its size, and that there is nothing in it but
plain arrays. Must not know what they are the weights of. torch is imported only for a torch file.

A pickle is a program, and to load one is to run it. safetensors and HDF5 have none; .npz is read with
``allow_pickle=False``; a torch file with ``weights_only=True``, whose unpickler builds tensors and plain containers and
refuses all else. Before that its pickle is read through, and refused if it names what could take memory that the file
does not hold. What an HDF5 file only points at, in another file, is not followed.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.weights import Array

MAX_BYTES = 4 * 2**30
"""The default limit on a file, and on all of its arrays together."""

_NUMBERS = "biuf"
"""The kinds of dtypes that are taken, as NumPy calls them."""

_IN_STATE_DICTS = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state|sparse_tensor)"
    r"|torch (\w+Storage|Size|device|b?float\d*|u?int\d*|bool|double|half|long|short)"
    r"|torch\.serialization _get_layout|collections (OrderedDict|Counter|defaultdict)|builtins (set|complex)"
    r"|_codecs encode"
)
"""What the pickles of state dicts name. Torch's unpickler also calls bytearray, torch.FloatTensor and their like, which
make as many bytes as they are told."""

_NO_STATE_DICT = "damaged, or more than tensors and plain containers in it; save the state dict alone"

_SAFETENSORS = {
    **{
        f"{kind}{bits}": f"<{letter}{bits // 8}"
        for kind, letter in (("I", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    "BOOL": "?",
    "BF16": "<u2",
}
"""The dtypes of safetensors as NumPy has them; bfloat16 as its bits."""


def load_arrays(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """Load named arrays from a checkpoint.

    Args:
        path: a .safetensors, .npz, .h5, .hdf5, .pt, .pth or .ckpt file. A torch file holds a dict of tensors, or has
            one as "state_dict" or "model_state_dict"; an array in HDF5 is named by its path,
            "layers/lstm/cell/vars/0", and what is no array of numbers there, a text say, is left out.
        max_bytes: limit on the file, and on all of its arrays together.

    Returns:
        The arrays under their names, in the dtypes of the file: booleans, integers or floating point. NumPy has no
        bfloat16: those are float32, the same numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged or too large, or there is more in it than such arrays.
    """
    path = Path(path)
    load = _LOADERS.get(path.suffix.lower())
    if path.suffix.lower() == ".keras":
        raise ValueError(f"{path.name}: a .keras file is a zip archive; unzip it, and name its model.weights.h5")
    if load is None:
        raise ValueError(f"{path.name}: unknown kind of checkpoint; expected one of {', '.join(_LOADERS)}")
    _check_size(path.name, path.stat().st_size, max_bytes)
    try:
        entries = load(path, max_bytes)
    except Exception as error:  # whatever a library raises at bytes that it cannot make sense of
        raise ValueError(f"{path.name}: cannot be loaded: {error}") from error
    for name, array in entries.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in _NUMBERS:
            raise ValueError(f"{path.name}: {name!r} is not an array of booleans, integers or floating point")
    return entries


def _load_safetensors(path: Path, max_bytes: int) -> dict[str, Any]:
    from safetensors import deserialize

    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    return {name: _from_safetensors(**entry) for name, entry in entries}


def _from_safetensors(dtype: str, shape: list[int], data: bytes) -> Array:
    if dtype not in _SAFETENSORS:
        raise ValueError(f"an array is {dtype}, expected one of {', '.join(_SAFETENSORS)}")
    array = np.frombuffer(data, _SAFETENSORS[dtype]).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="))


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
        datasets = {
            name: dataset
            for name, dataset in datasets.items()
            if dataset.shape is not None and dataset.dtype.kind in _NUMBERS
        }
        _check_size("unpacked", sum(dataset.nbytes for dataset in datasets.values()), max_bytes)
        for name, dataset in datasets.items():
            if dataset.external or dataset.is_virtual:
                raise ValueError(f"{name!r} keeps its values in another file")
        return {name: np.asarray(dataset[()]) for name, dataset in datasets.items()}


def _load_torch(path: Path, max_bytes: int) -> dict[str, Any]:
    import torch

    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip file, which torch writes since version 1.6; load and save the state dict anew")
    _check_archive(path, max_bytes)
    _check_pickles(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:  # not in torch's words: they advise to load it unsafely
        raise ValueError(_NO_STATE_DICT) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content.get("model_state_dict", content))
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError("expected a dict of tensors, or one under the key 'state_dict'")
    _check_size(path.name, sum(tensor.nbytes for tensor in content.values()), max_bytes)
    return {str(name): _from_torch(tensor.detach()) for name, tensor in content.items()}


def _from_torch(tensor: Any) -> Array:
    import torch

    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
    return array


def _check_pickles(path: Path) -> None:
    """Refuse a torch file before it is loaded if what it names does not stand in state dicts."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.lower().endswith(".pkl"):
                for operation, named, _ in pickletools.genops(archive.read(entry)):
                    if operation.name == "STACK_GLOBAL" or (
                        operation.name in ("GLOBAL", "INST") and not _IN_STATE_DICTS.fullmatch(str(named))
                    ):
                        raise ValueError(_NO_STATE_DICT)


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
    ".ckpt": _load_torch,
}
