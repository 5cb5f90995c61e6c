"""scripts/gpu.sh puts onnxruntime-gpu in the place of onnxruntime where there is a device, and else changes nothing.

The Python here is a stand-in, a shell script with a list of what is installed; nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

STAND_IN = """#!/bin/sh
installed="{folder}/installed"
case "$*" in
    *"distribution(sys.argv[1])"*) for name; do :; done; grep -qx "$name" "$installed" ;;
    "-m pip uninstall --yes onnxruntime onnxruntime-gpu") sed -i "/^onnxruntime/d" "$installed" ;;
    "deploy/requirements.py gpu") echo onnxruntime-gpu; echo cupy-cuda13x ;;
    "-m pip install"*)
        if [ -e "{folder}/offline" ]; then echo "ERROR: no route to the index" >&2; exit 1; fi
        for name; do :; done; cat "$name" >> "$installed" ;;
    *) echo "unexpected: $*" >> "$installed"; exit 99 ;;
esac
"""


class Checkout:
    """A folder with the script, an environment whose Python is a stand-in, and a device, or none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        (folder / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "gpu.sh", folder / "scripts")
        python = folder / ".venv" / "bin" / "python"
        python.write_text(STAND_IN.format(folder=folder))
        python.chmod(0o755)
        self.device = folder / "nvidia0"

    def run(self) -> subprocess.CompletedProcess[str]:
        """Run the script."""
        command = ["sh", str(self.folder / "scripts" / "gpu.sh"), str(self.folder / "dxg"), str(self.device)]
        return subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)

    @property
    def installed(self) -> list[str]:
        """What is installed."""
        return sorted((self.folder / "installed").read_text().split())

    @installed.setter
    def installed(self, names: list[str]) -> None:
        (self.folder / "installed").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout as scripts/venv.sh leaves it."""
    made = Checkout(tmp_path)
    made.installed = ["numpy", "onnxruntime"]
    return made


def test_without_a_device_nothing_changes(checkout: Checkout) -> None:
    """It says that there is none, and which files it looked for, and is no error: tests are skipped, not failed."""
    done = checkout.run()
    assert (done.returncode, checkout.installed) == (0, ["numpy", "onnxruntime"])
    assert f"No NVIDIA device on this machine ({checkout.folder / 'dxg'} {checkout.device})" in done.stdout


def test_with_a_device_one_takes_the_place_of_the_other(checkout: Checkout) -> None:
    """Onnxruntime goes, onnxruntime-gpu and CuPy come; a second run does nothing and says nothing."""
    checkout.device.touch()
    assert checkout.run().returncode == 0
    assert checkout.installed == ["cupy-cuda13x", "numpy", "onnxruntime-gpu"]
    again = checkout.run()
    assert (again.returncode, again.stdout) == (0, "")
    assert checkout.installed == ["cupy-cuda13x", "numpy", "onnxruntime-gpu"]


def test_both_side_by_side_are_put_right(checkout: Checkout) -> None:
    """Where pip has put onnxruntime beside it, both go and the one for the GPU is installed anew."""
    checkout.device.touch()
    checkout.installed = ["cupy-cuda13x", "onnxruntime", "onnxruntime-gpu"]
    assert checkout.run().returncode == 0
    assert "onnxruntime" not in checkout.installed
    assert checkout.installed.count("onnxruntime-gpu") == 1


def test_a_failed_install_is_told_and_tried_again(checkout: Checkout) -> None:
    """It fails with pip's reason and what to do; the next run goes on."""
    checkout.device.touch()
    offline = checkout.folder / "offline"
    offline.touch()
    failed = checkout.run()
    assert failed.returncode == 1
    assert "ERROR: no route to the index" in failed.stderr
    assert "Run the same command again" in failed.stderr
    offline.unlink()
    assert checkout.run().returncode == 0
    assert "onnxruntime-gpu" in checkout.installed
