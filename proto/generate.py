"""Writes the Python stubs of the wire contracts; with ``--check``, says whether those that are committed are stale.

Owns the call of protoc and the list of what it makes. Run it with the pinned grpcio-tools, so that everybody gets the
same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Contract:
    """One .proto and where its stubs go.

    Attributes:
        name: of the .proto, without its ending.
        source: the folder that it lies in.
        package: the folder of its stubs, which import each other by that path.
    """

    name: str
    source: str
    package: str

    @property
    def stubs(self) -> list[str]:
        """What protoc makes of it."""
        return [f"{self.package}/{self.name}_pb2{ending}" for ending in (".py", ".pyi", "_grpc.py")]


CONTRACTS = (
    Contract("conveyor", "proto/conveyor/v1", "conveyor/v1"),
    # Not in conveyor: a client may have tritonclient beside it, and a process takes one package `inference`.
    Contract("inference", "proto/inference", "service/wire/inference_stubs"),
)


def generate(folder: Path) -> None:
    """Writes the stubs below ``folder``.

    Raises:
        RuntimeError: protoc refused a contract; it has printed why.
    """
    for contract in CONTRACTS:
        arguments = [f"--proto_path={contract.package}={ROOT / contract.source}"]
        arguments += [f"--proto_path={files('grpc_tools') / '_proto'}"]
        arguments += [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", *arguments, f"{contract.package}/{contract.name}.proto"]) != 0:
            raise RuntimeError(f"protoc refused {contract.source}/{contract.name}.proto")


def stale() -> list[str]:
    """Names the committed stubs that differ from what the contracts give now, or are missing."""
    stubs = [stub for contract in CONTRACTS for stub in contract.stubs]
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {stub: (Path(folder) / stub).read_bytes() for stub in stubs}
    return [stub for stub in stubs if not (ROOT / stub).is_file() or (ROOT / stub).read_bytes() != fresh[stub]]


def main() -> int:
    """Generates or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a committed stub is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        print(f"wrote the stubs to {' and '.join(contract.package for contract in CONTRACTS)}")
        return 0
    if outdated := stale():
        print(f"stale: {', '.join(outdated)}; run `make proto` and commit", file=sys.stderr)
        return 1
    print("the stubs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
