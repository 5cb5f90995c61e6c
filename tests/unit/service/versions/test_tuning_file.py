"""The file of what was measured: for whom it holds, how it is written, and what is said of one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.versions import tuning_file
from service.versions.tuning import Measurement
from service.versions.tuning_file import Subject, Unusable, read, write

HERE = Subject(
    digest="ab12",
    row_by_row=False,
    provider="CPUExecutionProvider",
    onnxruntime="1.31.1",
    cpu="a processor",
    cores=2,
    counts=(1, 2),
)
MEASURED = (Measurement(threads=1, rows=64, steps=1, seconds=4.5e-3, cpu_s=4.4e-3),)
OTHERS = (Measurement(threads=2, rows=1, steps=1, seconds=1e-3, cpu_s=0.0),)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """To the bit, and its folder is made; nothing else is left there."""
    path = tmp_path / "lstm/1/tuning.json"
    assert read(path, HERE) == ()
    write(path, HERE, MEASURED)
    assert read(path, HERE) == MEASURED
    write(path, HERE, OTHERS)
    assert read(path, HERE) == OTHERS
    assert [file.name for file in path.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "cd34"},
        {"row_by_row": True},
        {"provider": "CUDAExecutionProvider"},
        {"onnxruntime": "1.32.0"},
        {"cpu": "another"},
        {"cores": 4},
        {"counts": (1, 2, 4)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_file_or_machine(tmp_path: Path, change: dict[str, Any]) -> None:
    """Is measured anew, and then both are kept."""
    path = tmp_path / "tuning.json"
    other = HERE.model_copy(update=change)
    write(path, HERE, MEASURED)
    assert read(path, other) == ()
    write(path, other, OTHERS)
    assert (read(path, HERE), read(path, other)) == (MEASURED, OTHERS)


def test_many_machines(tmp_path: Path) -> None:
    """The newest eight are kept."""
    path = tmp_path / "tuning.json"
    machines = [HERE.model_copy(update={"cores": cores}) for cores in range(1, 11)]
    for machine in machines:
        write(path, machine, MEASURED)
    assert [bool(read(path, machine)) for machine in machines] == [False] * 2 + [True] * 8


def changed(**change: Any) -> str:
    """A file's text with something else in its one measurement."""
    one = MEASURED[0].model_dump() | change
    return json.dumps({"format": 1, "records": [{"subject": HERE.model_dump(), "measured": [one]}]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "EOF"),
        ("[1, 2", "EOF"),
        ('{"format": 2}', "format: Input should be 1"),
        ('{"records": [{}]}', r"records\.0\.subject: Field required"),
        ('{"more": 1}', "more: Extra inputs"),
        (changed(seconds=0), r"greater than or equal to 0\.000000001"),
        (changed(seconds=-1), "greater than or equal to 0"),
        (changed(seconds=float("nan")), "finite"),
        (changed(seconds=float("inf")), "finite"),
        (changed(seconds=1e300), "less than or equal to 86400"),
        (changed(threads=64), r"measured with 64 threads; there were to be \[1, 2\]"),
        (changed(threads=10**9), "less than or equal to 65536"),
        (changed(rows="64"), "valid integer"),
        ("{}" + " " * (1 << 20), "larger than 1048576 bytes"),
        ("\x00\xff", "expected value"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    """Is told with the place, and written anew."""
    path = tmp_path / "tuning.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(Unusable, match=said):
        read(path, HERE)
    write(path, HERE, MEASURED)
    assert read(path, HERE) == MEASURED


def test_no_file_at_all(tmp_path: Path) -> None:
    """A folder of its name, and a place below a file, are neither read nor written."""
    (tmp_path / "tuning.json").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "tuning.json", tmp_path / "file/1/tuning.json"):
        with pytest.raises(Unusable):
            read(path, HERE)
        with pytest.raises(Unusable):
            write(path, HERE, MEASURED)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "tuning.json"]


def test_this_machine() -> None:
    """It has a name and a core."""
    assert tuning_file.cpu_name()
    assert tuning_file.cores() >= 1
