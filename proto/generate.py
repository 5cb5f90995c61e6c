"""Writes the Python stubs of the wire contract into conveyor/v1; with ``--check``, says whether those there are stale.

Owns the call of protoc and the list of what it makes. Run it with the pinned grpcio-tools, so that everybody gets the
same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "conveyor/v1/conveyor.proto"
STUBS = ("conveyor_pb2.py", "conveyor_pb2.pyi", "conveyor_pb2_grpc.py")


def generate(folder: Path) -> None:
    """Writes the stubs below ``folder``, as ``conveyor/v1/*``.

    Raises:
        RuntimeError: protoc refused the contract; it has printed why.
    """
    arguments = [f"--proto_path={ROOT / 'proto'}", f"--proto_path={files('grpc_tools') / '_proto'}"]
    arguments += [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *arguments, SOURCE]) != 0:
        raise RuntimeError(f"protoc refused proto/{SOURCE}")


def stale() -> list[str]:
    """Names the committed stubs that differ from what the contract gives now, or are missing."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {name: (Path(folder) / "conveyor/v1" / name).read_bytes() for name in STUBS}
    here = ROOT / "conveyor" / "v1"
    return [name for name in STUBS if not (here / name).is_file() or (here / name).read_bytes() != fresh[name]]


def main() -> int:
    """Generates or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a committed stub is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        print(f"wrote {', '.join(STUBS)} to conveyor/v1")
        return 0
    outdated = stale()
    if outdated:
        print(f"stale in conveyor/v1: {', '.join(outdated)}; run `make proto` and commit", file=sys.stderr)
        return 1
    print("the stubs in conveyor/v1 are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
