"""Where onnxruntime runs a node, told from the graph alone: on CUDA, on the CPU, or nowhere; and a model, for it.

Owns what is known of the recurrent operators and of control flow; every other operator has a kernel on both, as far
as this room knows. Owns too what follows from it for a model: pure. Must not know how a node was read. The rules are
those of onnxruntime 1.31, and of cuDNN behind its CUDA provider; its own record of a session has the last word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from service.errors import LoadError

RECURRENT = ("LSTM", "GRU", "RNN")
CONTROL_FLOW = ("If", "Loop", "Scan")
CPU_ONLY = ("DynamicQuantizeLSTM", "AttnLSTM")
"""Recurrent operators of the domain com.microsoft, which CUDA has no kernel for."""

Device = Literal["cpu", "cuda"]
Attribute = int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | None

Asked = Literal["auto", "cpu", "cuda"]

_ACTIVATIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
_CPU_DTYPES = ("float32", "float16")
_PEEPHOLES = 7


@dataclass(frozen=True)
class Placement:
    """Where a node runs that is meant for a device.

    Attributes:
        runs_on: the device whose kernel takes it; None where no kernel does, so that the file cannot be loaded.
        reason: why not on the device it was meant for; None where it runs there.
    """

    runs_on: Device | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """On which device a model runs, and why.

    Attributes:
        device: that runs it.
        reason: why that one, for people.
        fallback: whether CUDA was asked for, and the CPU runs it.
        file: the name of the file that runs.
        digest: SHA-256 of it, or of those of it and of the files of its data, in hexadecimal; empty where that is the
            model's own file.
        tf32: whether products may round their factors to TF32.
        tf32_difference: how far outputs and states were from those without TF32 when it was loaded; None where that
            was not compared.
    """

    device: Device
    reason: str
    fallback: bool = False
    file: str = "model.onnx"
    digest: str = ""
    tf32: bool = False
    tf32_difference: float | None = None


def choose(
    asked: Asked,
    against_cuda: str | None,
    fallback: Literal["refuse", "allow"] = "refuse",
    said: Collection[str] = (),
) -> Choice:
    """Choose the device of a model.

    Args:
        asked: by its model.yaml, or by the server's settings.
        against_cuda: why CUDA does not run it; None where it does.
        fallback: what to do where CUDA was asked for and does not run it.
        said: by its model.yaml, which goes before the server's settings: ``device``, ``fallback``, both or neither.

    Raises:
        LoadError: if CUDA was asked for, does not run it, and nothing else may.
    """
    if asked == "cpu":
        return Choice("cpu", "asked for")
    if against_cuda is None:
        return Choice("cuda", "asked for" if asked == "cuda" else "CUDA runs all of its recurrent path")
    if asked == "auto":
        return Choice("cpu", against_cuda)
    if fallback == "allow":
        return Choice("cpu", against_cuda, fallback=True)
    flags = [flag for name, flag in (("device", "--device auto"), ("fallback", "--fallback allow")) if name not in said]
    raise LoadError(
        f"CUDA was asked for and does not run it: {against_cuda}. It was asked for by "
        f"{'device: cuda in model.yaml' if 'device' in said else '--device cuda'}; to run it on the CPU instead, say "
        f"device: auto or fallback: allow in model.yaml{''.join(f', or {flag}' for flag in flags)}"
    )


def place(
    operator: str,
    attributes: Mapping[str, Attribute],
    inputs: Sequence[str] = (),
    dtype: str | None = None,
    device: Device = "cuda",
) -> Placement:
    """Tell where a node runs.

    Args:
        operator: its type, ``LSTM`` say.
        attributes: as they stand in the file.
        inputs: the names of its inputs, in order; "" for one that is left out.
        dtype: of its input X, where that is known.
        device: the one it is meant for.
    """
    if operator in RECURRENT:
        if attributes.get("layout"):
            return Placement(None, "layout=1: onnxruntime has no kernel for it; expected time first, layout=0")
        if dtype == "bfloat16":
            return Placement(None, "bfloat16: onnxruntime has no kernel for it")
    why_not_cuda = _why_not_cuda(operator, attributes, inputs)
    if device == "cuda" and why_not_cuda is None:
        return Placement("cuda")
    if operator in RECURRENT and dtype not in (None, *_CPU_DTYPES):
        return Placement(None, "; ".join(filter(None, [f"{dtype}: the CPU has no kernel for it", why_not_cuda])))
    return Placement("cpu", why_not_cuda if device == "cuda" else None)


def _why_not_cuda(operator: str, attributes: Mapping[str, Attribute], inputs: Sequence[str]) -> str | None:
    if operator in CPU_ONLY:
        return f"{operator}: CUDA has no kernel for it"
    if operator not in RECURRENT:
        return None
    reasons = [
        f"{name}: cuDNN has none" for name in ("clip", "activation_alpha", "activation_beta") if name in attributes
    ]
    activations = attributes.get("activations")
    if isinstance(activations, Sequence) and not _usual(operator, [str(name).lower() for name in activations]):
        reasons.append(f"activations={','.join(map(str, activations))}: cuDNN has the usual ones alone")
    if operator == "LSTM" and attributes.get("input_forget"):
        reasons.append("input_forget=1: cuDNN does not couple gates")
    if operator == "LSTM" and len(inputs) > _PEEPHOLES and inputs[_PEEPHOLES]:
        reasons.append("peepholes (input P): cuDNN has none")
    if operator == "GRU" and attributes.get("linear_before_reset", 0) != 1:
        reasons.append("linear_before_reset=0: cuDNN resets after the recurrent product")
    return "; ".join(reasons) or None


def _usual(operator: str, activations: list[str]) -> bool:
    both_directions = 2 * _ACTIVATIONS[operator]
    return activations == both_directions[: len(activations)]
