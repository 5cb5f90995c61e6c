"""The model that a user names on the command line: ``package.module:attribute``, and weights from a file.

Owns importing and calling what was named, and every way in which that can go wrong. Must not know how to export.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from export.errors import ExportError
from models.checkpoint import load_arrays


def load_named(name: str) -> nn.Module:
    """Import ``package.module:attribute``: a module of torch's, or a callable without arguments that returns one.

    Modules are looked for in the working folder first, then where Python looks.

    Raises:
        ExportError: there is no such module or attribute, it raised, or it is something else.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ExportError(f"model {name!r}: expected package.module:callable")
    if module_name.endswith(".py"):
        raise ExportError(f"model {name!r}: a module is named as it is imported: {module_name[:-3]}:{attribute}")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ExportError(f"model {name!r}: no module named {error.name!r} from {folder}") from error
    except Exception as error:
        raise ExportError(f"model {name!r}: importing {module_name} raised {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ExportError(f"model {name!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ExportError(f"model {name!r} is a {type(found).__name__}, expected a callable that returns a module")
        try:
            found = found()
        except Exception as error:
            raise ExportError(f"model {name!r} raised {_told(error)}") from error
    if not isinstance(found, nn.Module):
        raise ExportError(f"model {name!r} returned a {type(found).__name__}, expected a torch module")
    return found


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Give a model the weights of a checkpoint, by the names of its own state dict, in its own dtype.

    The model stays the one that was named, with whatever it is beside its weights.

    Raises:
        ExportError: the file cannot be read, or holds other weights or other numbers than floating point.
    """
    try:
        arrays = load_arrays(path)
        for name, array in arrays.items():
            if array.dtype.kind != "f":
                raise ValueError(f"{name} is {array.dtype}, expected floating point")
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"weights: {' '.join(str(error).split())}") from error
    return model


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
