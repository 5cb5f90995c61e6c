"""A model that was exported for both devices, loaded on either: one model, whose states go from one to the other.

CUDA's place is taken by this machine's memory, and its provider's by the CPU's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.model_file import make_model_files
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec
from service.graphs.placement import Device
from service.settings import Settings
from service.states.device import HostDevice
from service.versions import loading
from service.versions.loading import Loaded, load_model
from tests.unit.models.drawn import draw_weights


@pytest.mark.parametrize(
    "layer",
    [Layer("lstm_peephole", 3, 4), Layer("gru", 3, 4, reset="before"), Layer("lstm", 3, 4, activation="relu")],
    ids=["peepholes", "reset before", "relu"],
)
def test_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    """Each device takes its own file, as the same model; half a sequence on one and half on the other is the whole."""
    monkeypatch.setattr(loading, "why_no_cuda", lambda gpu_id: None)
    monkeypatch.setattr(loading, "CudaDevice", lambda gpu_id: HostDevice())
    spec = ModelSpec((layer,), head_size=2)
    module = SequenceModel.from_weights(spec, draw_weights(spec.weight_shapes, dtype=np.float32))
    own, others = make_model_files(module)
    path = tmp_path / "model/1/model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(own.content)
    path.with_name("model.cuda.onnx").write_bytes(others["cuda"].content)

    def loaded(device: Device) -> Loaded:
        return load_model(path, Settings(device=device, threads=1))

    cpu, cuda = loaded("cpu"), loaded("cuda")
    assert [(one.choice.device, one.choice.file) for one in (cpu, cuda)] == [
        ("cpu", "model.onnx"),
        ("cuda", "model.cuda.onnx"),
    ]
    assert cpu.graph.digest == cuda.graph.digest
    x = np.random.default_rng(0).standard_normal((8, 1, 3)).astype(np.float32)
    states = {s.input: np.zeros([size or 1 for size in s.shape], np.float32) for s in own.manifest.states}
    whole, last = cpu.graph.run({"x": x, "lengths": np.array([8], np.int32), **states})
    half = np.array([4], np.int32)
    for first, second in ((cpu, cuda), (cuda, cpu)):
        begun, between = first.graph.run({"x": x[:4], "lengths": half, **states})
        carried = {s.input: state for s, state in zip(own.manifest.states, between, strict=True)}
        ended, after = second.graph.run({"x": x[4:], "lengths": half, **carried})
        joined = np.concatenate([begun[0], ended[0]])
        for ours, expected in zip([joined, *after], [whole[0], *last], strict=True):
            assert np.abs(ours.astype(np.float64) - expected.astype(np.float64)).max() < 4e-6
