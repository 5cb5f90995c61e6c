"""Checkpoints: plain arrays come in from four kinds of file, and nothing else does, least of all code."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from models.checkpoint import load_arrays
from models.weights import Array

ARRAYS: dict[str, Array] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([0.5, -2], np.float16),
    "ids": np.array([[1, 2]], np.int64),
    "mask": np.array([True, False]),
}


class Malicious:
    """Unpickled, it writes a file: what an attacker's code would do, made visible."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _save(path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(ARRAYS, path)
    elif path.suffix == ".npz":
        np.savez(path, **ARRAYS)  # type: ignore[arg-type]
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            for name, array in ARRAYS.items():
                file[name] = array
    else:
        torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.h5", "a.hdf5", "a.pt", "a.pth", "a.ckpt", "A.PT"])
def test_arrays_come_back_as_saved(tmp_path: Path, name: str) -> None:
    """Names, dtypes, shapes and values, from each kind of file; a suffix may be in capitals."""
    _save(tmp_path / name)
    loaded = load_arrays(tmp_path / name)
    assert loaded.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert loaded[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded[key], array)


def test_a_module_s_state_dict(tmp_path: Path) -> None:
    """A state dict with parameters, alone or beside other things under one of the usual keys."""
    module = torch.nn.LSTM(2, 3)
    torch.save(dict(module.named_parameters()), tmp_path / "alone.pt")
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "beside.pt")
    torch.save({"epoch": 3, "model_state_dict": module.state_dict()}, tmp_path / "tutorial.pt")
    for name in ("alone.pt", "beside.pt", "tutorial.pt"):
        loaded = load_arrays(tmp_path / name)
        assert {key: array.shape for key, array in loaded.items()} == {
            key: tuple(tensor.shape) for key, tensor in module.state_dict().items()
        }


def _torch(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _hdf5(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["object in .npz", "pickle as .npz", "pickle as .npy in .npz"])
@pytest.mark.parametrize("suffix", [".npz", ".h5", ".pt", ".pth", ".safetensors"])
def test_no_pickle_is_executed_from_numpy_s_forms(tmp_path: Path, kind: str, suffix: str) -> None:
    """A pickle in any of the forms that NumPy would load is refused under every suffix, and does not run."""
    trap = tmp_path / "ran"
    code = pickle.dumps(Malicious(trap))
    as_member = io.BytesIO()
    with zipfile.ZipFile(as_member, "w") as archive:
        archive.writestr("w.npy", code)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(
        {
            "object in .npz": _npz(w=np.array([Malicious(trap)], dtype=object)),
            "pickle as .npz": code,
            "pickle as .npy in .npz": as_member.getvalue(),
        }[kind]
    )
    with pytest.raises(ValueError, match=path.name):
        load_arrays(path)
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["value", "state_dict", "whole", "pickle", "legacy"])
@pytest.mark.parametrize("suffix", [".npz", ".h5", ".pt", ".pth", ".safetensors"])
def test_no_pickle_is_executed_from_torch_s_forms(tmp_path: Path, kind: str, suffix: str) -> None:
    """A torch file with more than tensors in it, new or old, is refused under every suffix, and does not run."""
    trap = tmp_path / "ran"
    malicious = Malicious(trap)
    path = tmp_path / f"a{suffix}"
    if kind == "legacy":
        torch.save({"w": malicious}, path, _use_new_zipfile_serialization=False)
    else:
        content = {"value": {"w": malicious}, "state_dict": {"state_dict": {"w": malicious}}}.get(kind, malicious)
        path.write_bytes(pickle.dumps(malicious) if kind == "pickle" else _torch(content))
    with pytest.raises(ValueError, match=path.name):
        load_arrays(path)
    assert not trap.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """The malicious pickle does run where pickles are run; otherwise the tests above would show nothing."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))  # noqa: S301 our own, on purpose
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pkl",
            b"",
            r"a.pkl: unknown kind of checkpoint; expected one of .safetensors, .npz, .h5, .*, .ckpt",
        ),
        ("a.npy", b"", "unknown kind"),
        ("a", b"", "unknown kind"),
        ("a.keras", b"PK", "a.keras: a .keras file is a zip archive; unzip it, and name its model.weights.h5"),
        ("a.pt", b"", "not a zip file"),
        ("a.npz", b"PK\x03\x04 and no more", "not a zip file"),
        ("a.safetensors", b"\xff" * 64, "cannot be loaded"),
        ("a.h5", b"\x89HDF\r\n\x1a\n and no more", "cannot be loaded"),
        ("a.npz", _npz(w=np.array(["text"])), "'w' is not an array of booleans, integers or floating point"),
        ("a.npz", _npz(w=np.array([1j])), "'w' is not an array"),
        ("a.pt", _torch(torch.zeros(3)), "expected a dict of tensors"),
        ("a.pt", _torch({"w": torch.zeros(3), "epoch": 3}), "expected a dict of tensors"),
        ("a.pt", _torch({"w": torch.zeros(3).to_sparse()}), "sparse"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Other files, damaged files, and arrays that are no numbers are refused, saying what was expected."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_arrays(tmp_path / name)


def test_torch_s_advice_is_not_passed_on(tmp_path: Path) -> None:
    """The text of torch suggests ``weights_only=False``; ours does not."""
    (tmp_path / "a.pt").write_bytes(_torch(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="save the state dict alone") as refusal:
        load_arrays(tmp_path / "a.pt")
    assert "weights_only" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".h5", ".pt"])
def test_size_limit_on_the_file(tmp_path: Path, suffix: str) -> None:
    """A file over the limit is refused before it is read."""
    _save(path := tmp_path / f"a{suffix}")
    size = path.stat().st_size
    assert load_arrays(path, max_bytes=size)
    with pytest.raises(ValueError, match=f"{size} bytes, the limit is {size - 1}"):
        load_arrays(path, max_bytes=size - 1)


def test_size_limit_on_what_unfolds(tmp_path: Path) -> None:
    """Small files that unfold are held to the limit: compressed, claiming a shape, or one value seen many times."""
    np.savez_compressed(tmp_path / "zeros.npz", w=np.zeros(10**6))
    torch.save({"w": torch.zeros(1).expand(10**9, 10**6)}, tmp_path / "expanded.pt")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**6)})
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue())
    with h5py.File(tmp_path / "zeros.h5", "w") as file:
        file.create_dataset("w", data=np.zeros(10**6), compression="gzip")
        file.create_dataset("never written", (10**9, 10**6), "f4", chunks=(1000, 1000))
    for name, message in (
        ("zeros.npz", "limit is 100000"),
        ("zeros.h5", "limit is 100000"),
        ("expanded.pt", "limit is 100000"),
        ("claim.npz", "allocate"),
    ):
        with pytest.raises(ValueError, match=message):
            load_arrays(tmp_path / name, max_bytes=100_000)


def test_an_hdf5_file_reads_no_other(tmp_path: Path) -> None:
    """Links are not followed; an array whose values stand in another file is refused."""
    _save(tmp_path / "secret.h5")
    (tmp_path / "secret.bin").write_bytes(bytes(8))
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["own"] = np.ones(2)
        file["group/b"] = np.ones(3)
        file["external"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "w")
        file["soft"] = h5py.SoftLink("/own")
    assert load_arrays(tmp_path / "links.h5").keys() == {"own", "group/b"}
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset("w", (2,), "f4", external=[(str(tmp_path / "secret.bin"), 0, 8)])
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "w", (2, 3))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("w", layout)
    for name in ("raw.h5", "virtual.h5"):
        with pytest.raises(ValueError, match=f"{name}: .*'w' keeps its values in another file"):
            load_arrays(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is told as such."""
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "a.npz")


def test_torch_is_imported_only_for_torch_files(tmp_path: Path) -> None:
    """Reading .npz and .safetensors needs no torch."""
    _save(tmp_path / "a.npz")
    _save(tmp_path / "a.safetensors")
    script = (
        "import sys; from models.checkpoint import load_arrays; [load_arrays(path) for path in sys.argv[1:]];"
        "sys.exit('torch' in sys.modules)"
    )
    paths = [str(tmp_path / "a.npz"), str(tmp_path / "a.safetensors")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, cwd=Path(__file__).parents[3])


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    """To float32, which holds every number of it, from either kind of file that can hold it."""
    numbers = torch.tensor([[1.0, -2.5, 3e38], [1e-40, 0.1, float("-inf")]]).bfloat16()
    torch.save({"w": numbers}, tmp_path / "a.pt")
    safetensors.torch.save_file({"w": numbers}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        (array,) = load_arrays(tmp_path / name).values()
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, numbers.float().numpy())


def test_safetensors_of_every_dtype(tmp_path: Path) -> None:
    """Each comes back as NumPy's own reader gives it; one that NumPy lacks is refused by name."""
    dtypes = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    arrays = {dtype: np.arange(6).reshape(2, 3).astype(dtype) for dtype in dtypes}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    loaded = load_arrays(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    safetensors.torch.save_file({"w": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="F8_E4M3, expected one of"):
        load_arrays(tmp_path / "b.safetensors")


def test_what_lightning_writes(tmp_path: Path) -> None:
    """A .ckpt holds the state dict beside counters and settings."""
    module = torch.nn.LSTM(2, 3)
    content = {"epoch": 3, "state_dict": module.state_dict(), "hyper_parameters": {"rate": 1e-3}, "callbacks": {}}
    torch.save(content, tmp_path / "a.ckpt")
    assert load_arrays(tmp_path / "a.ckpt").keys() == module.state_dict().keys()


def test_an_old_torch_file(tmp_path: Path) -> None:
    """The form before version 1.6 is refused in words that say what to do."""
    torch.save({"w": torch.zeros(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not a zip file, which torch writes since version 1\.6; load and save the"):
        load_arrays(tmp_path / "a.pt")


def test_what_is_no_array_stands_in_nobodys_way(tmp_path: Path) -> None:
    """A text, or a dataset without a value, leaves the arrays beside it in an HDF5 file as they are."""
    (tmp_path / "a.h5").write_bytes(_hdf5(w=np.ones(3), vocabulary=["a", "b"], empty=h5py.Empty("f4"), text="text"))
    assert load_arrays(tmp_path / "a.h5").keys() == {"w"}


@pytest.mark.parametrize("name", ["builtins\nbytearray", "torch\nFloatTensor", "torch.storage\nUntypedStorage"])
@pytest.mark.parametrize("member", ["data.pkl", "DATA.PKL"])
def test_a_pickle_takes_no_memory_that_its_file_does_not_hold(
    tmp_path: Path, name: str, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that make as many bytes as they are told, which torch's unpickler would make, are refused before it."""
    code = b"\x80\x02c" + name.encode() + b"\nJ" + (1 << 29).to_bytes(4, "little") + b"\x85R0}."
    with zipfile.ZipFile(io.BytesIO(_torch({}))) as whole, zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for entry in whole.namelist():
            folder, _, last = entry.rpartition("/")
            pickled = last == "data.pkl"
            archive.writestr(f"{folder}/{member}" if pickled else entry, code if pickled else whole.read(entry))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has loaded it"))
    with pytest.raises(ValueError, match="save the state dict alone"):
        load_arrays(tmp_path / "a.pt")
