"""What an installation of the project gives to whoever imports it, and what the Makefile says is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WHERE = "import importlib.util; print(importlib.util.find_spec('conveyor').origin)"
BUILD = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"


def test_a_script_beside_the_checkout_finds_the_package(tmp_path: Path) -> None:
    """An editable installation of a checkout called ``conveyor`` is found beside it, in it, and elsewhere."""
    checkout, wheels, site = tmp_path / "conveyor", tmp_path / "wheels", tmp_path / "site"
    checkout.mkdir()
    wheels.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "conveyor", checkout / "conveyor", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=checkout, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    # -S and addsitedir: only what this installation put there, as site-packages would have it.
    code = f"import site; site.addsitedir({str(site)!r}); {WHERE}"
    for folder in (tmp_path, checkout, wheels):
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(checkout / "conveyor" / "__init__.py")


def test_every_target_is_there() -> None:
    """What make lists can be run: none is marked as missing, and what those for a GPU run is in the checkout."""
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([\w-]+) +\S", listed, re.MULTILINE)
    assert {"demo", "test", "lint", "bench", "proto", "test-gpu", "bench-gpu"} <= set(targets)
    assert "not in this version yet" not in listed
    assert all((ROOT / path).exists() for path in ("scripts/gpu.sh", "tests/gpu", "bench/gpu.py", "bench/__main__.py"))
