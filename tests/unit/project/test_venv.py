"""scripts/venv.sh makes the environment when it must, leaves it alone when it may, and says what is wrong.

The Python here is a stand-in, a shell script that answers what the setup asks of it and notes when it is told to make
an environment or to install; so nothing is downloaded and the real environment is not touched.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

STAND_IN = """#!/bin/sh
case "$*" in
    *"sys.version.split"*) echo "{version}" ;;
    *"sys.version_info < (3, 11)"*) exit {too_old} ;;
    *"import ensurepip, venv"*) exit {no_venv} ;;
    "-m venv --clear .venv") echo venv >> "{notes}"; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip install"*)
        echo pip >> "{notes}"
        if [ -e "{notes}.offline" ]; then echo "ERROR: no route to the index" >&2; exit 1; fi ;;
    *) echo "unexpected: $*" >> "{notes}"; exit 99 ;;
esac
"""


class Checkout:
    """A folder with the setup script, a pyproject.toml and a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "venv.sh", self.folder / "scripts")
        (self.folder / "pyproject.toml").write_text("[project]\n")
        self.python = folder / "python"
        self.notes = folder / "notes"
        self.install_python("3.12.1")

    def install_python(self, version: str, *, too_old: bool = False, no_venv: bool = False) -> None:
        """Puts a Python of that version in place."""
        facts = {"version": version, "too_old": int(too_old), "no_venv": int(no_venv), "notes": self.notes}
        self.python.write_text(STAND_IN.format_map(facts))
        self.python.chmod(0o755)

    def set_up(self, python: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the script; ``done`` then tells what it did."""
        self.notes.write_text("")
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": python or str(self.python)}
        script = self.folder / "scripts" / "venv.sh"
        return subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, check=False)

    @property
    def done(self) -> list[str]:
        """What the last run did: made the environment, installed into it."""
        return self.notes.read_text().split("\n")[:-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout where nothing was set up before."""
    return Checkout(tmp_path)


def test_sets_up_once(checkout: Checkout) -> None:
    """The first run makes and fills the environment and says so; the second does nothing and says nothing."""
    first = checkout.set_up()
    assert (first.returncode, checkout.done) == (0, ["venv", "pip"])
    assert "Setting up .venv with Python 3.12.1" in first.stdout
    second = checkout.set_up()
    assert (second.returncode, second.stdout, checkout.done) == (0, "", [])


def test_follows_pyproject(checkout: Checkout) -> None:
    """A changed pyproject.toml installs into the environment that is there; a touched one does nothing."""
    checkout.set_up()
    (checkout.folder / "pyproject.toml").touch()
    assert (checkout.set_up().returncode, checkout.done) == (0, [])
    (checkout.folder / "pyproject.toml").write_text("[project]\nname = 'conveyor'\n")
    assert (checkout.set_up().returncode, checkout.done) == (0, ["pip"])


def test_starts_over_after_a_failed_install(checkout: Checkout) -> None:
    """An installation that broke off fails with pip's reason and what to do; nothing passes for complete."""
    offline = checkout.notes.with_name("notes.offline")
    offline.touch()
    failed = checkout.set_up()
    assert failed.returncode == 1
    assert "ERROR: no route to the index" in failed.stderr
    assert "Run the same command again" in failed.stderr
    offline.unlink()
    assert (checkout.set_up().returncode, checkout.done) == (0, ["venv", "pip"])


def test_a_python_with_a_space_in_its_path(checkout: Checkout) -> None:
    """The Python that was asked for is one path, whatever is in it."""
    folder = checkout.python.parent / "a folder"
    folder.mkdir()
    python = checkout.python.rename(folder / "python")
    assert (checkout.set_up(str(python)).returncode, checkout.done) == (0, ["venv", "pip"])


@pytest.mark.parametrize("damage", ["moved", "no Python in it", "another Python in it"])
def test_starts_over_when_damaged(checkout: Checkout, damage: str) -> None:
    """An environment that was moved, or whose Python is gone or was replaced, is made anew."""
    checkout.set_up()
    if damage == "moved":
        checkout.folder = checkout.folder.rename(checkout.folder.with_name("elsewhere"))
    elif damage == "no Python in it":
        (checkout.folder / ".venv" / "bin" / "python").unlink()
    else:
        checkout.install_python("3.13.0")
        shutil.copy(checkout.python, checkout.folder / ".venv" / "bin" / "python")
    assert (checkout.set_up().returncode, checkout.done) == (0, ["venv", "pip"])


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ({"too_old": True}, "Too old:"),
        ({"no_venv": True}, "apt-get install python3-venv"),
        (None, "No Python was found under: no-such-python"),
    ],
)
def test_says_which_python_is_missing(checkout: Checkout, python: dict[str, bool] | None, says: str) -> None:
    """Without a fit Python it changes nothing and says what was found and what is needed."""
    if python is not None:
        checkout.install_python("3.9.2", **python)
    result = checkout.set_up(None if python is not None else "no-such-python")
    assert (result.returncode, checkout.done) == (1, [])
    assert "Python 3.11 or later" in result.stderr
    assert says in result.stderr
