"""A session's state outside the server: arrays that can be kept in a file and imported again. Knows no channel."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from conveyor.payload import decode_named
from conveyor.tensors import Array, encode_tensor
from conveyor.v1 import conveyor_pb2 as pb

_PREFIX = "state."


@dataclass(frozen=True)
class SessionState:
    """All that it takes to go on elsewhere.

    Attributes:
        model: name of the model.
        version: that produced the state.
        position: how many steps have been applied.
        states: by name, each without the batch axis.
        digest: tells the model's file from any other; empty where it is not known, and then nothing is compared.
    """

    model: str
    version: int
    position: int
    states: dict[str, Array]
    digest: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz file, under exactly this name."""
        arrays: dict[str, Any] = {_PREFIX + name: array for name, array in self.states.items()}
        with open(path, "wb") as file:
            np.savez(file, model=self.model, version=self.version, position=self.position, digest=self.digest, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SessionState:
        """Reads what ``save`` wrote; never executes what a file holds.

        Raises:
            ValueError: the file is not such a state.
        """
        refusal = f"{os.fspath(path)!r} is not the state of a session"
        with open(path, "rb") as file:
            # NumPy would take anything else for a pickle, and tell how to load it unsafely.
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{refusal}: expected a file that SessionState.save wrote")
            file.seek(0)
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    states = {name.removeprefix(_PREFIX): arrays[name] for name in arrays if name.startswith(_PREFIX)}
                    # Files of before there was one have none.
                    digest = str(arrays["digest"]) if "digest" in arrays else ""
                    return cls(str(arrays["model"]), int(arrays["version"]), int(arrays["position"]), states, digest)
            except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(f"{refusal}: {error}") from error


def encode_state(state: SessionState) -> pb.SessionState:
    """Writes the state for the wire."""
    tensors = [encode_tensor(name, array) for name, array in state.states.items()]
    return pb.SessionState(
        model=state.model, version=state.version, position=state.position, states=tensors, digest=state.digest
    )


def decode_state(message: pb.SessionState) -> SessionState:
    """Reads the state from the wire.

    Raises:
        ProtocolError: the bytes of a tensor do not fit its shape.
    """
    states = decode_named(message.states)
    return SessionState(message.model, message.version, message.position, states, message.digest)
