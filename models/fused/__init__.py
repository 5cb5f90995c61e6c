"""Recurrent models in torch with fused gates: to be trained, and to be exported.

Owns the torch modules. Must not know ONNX or the service.
"""

from __future__ import annotations

from models.fused.model import SequenceModel

__all__ = ["SequenceModel"]
