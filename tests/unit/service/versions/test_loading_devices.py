"""Which device a model is loaded on: what is chosen, why, by which file, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from structlog.testing import capture_logs

from service.engines.provider import NotOnCuda, why_no_cuda
from service.engines.resident_engine import ResidentEngine
from service.engines.stepping import RowByRow
from service.errors import LoadError
from service.graphs.onnx_file import seal
from service.graphs.placement import Choice, choose
from service.settings import Settings
from service.states.device import HostDevice
from service.versions import loading
from service.versions.audit import audit
from service.versions.loading import in_brief, load_model
from service.versions.tuner import tuned
from tests.graphs import HIDDEN, write_lstm

NO_CUDA = why_no_cuda()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """CUDA starts, and its device is this machine's own memory; the files that were to run there."""
    opened: list[Path] = []

    class Opened(ResidentEngine):
        def __init__(self, path: Path, *given: Any, **more: Any) -> None:
            super().__init__(path, *given, **more)
            opened.append(path)

    monkeypatch.setattr(loading, "why_no_cuda", lambda gpu_id: None)
    monkeypatch.setattr(loading, "CudaDevice", lambda gpu_id: HostDevice())
    monkeypatch.setattr(loading, "ResidentEngine", Opened)
    return opened


def peephole(path: Path) -> Path:
    """Give the LSTM of a file peepholes of zeros, which change nothing but where it runs."""
    model = onnx.load(path)
    (lstm,) = (node for node in model.graph.node if node.op_type == "LSTM")
    lstm.name = "lstm/peeping"
    lstm.input.append("P")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3 * HIDDEN), np.float32), "P"))
    onnx.save(model, path)
    return path


def rewritten(path: Path, name: str, change: Callable[[Any], None] = lambda model: None) -> Path:
    """A copy of a model's file beside it, changed."""
    model = onnx.load(path)
    model.producer_name = name
    change(model)
    written = path.with_name(name)
    onnx.save(model, written)
    return written


@pytest.mark.parametrize(
    ("asked", "against", "fallback", "chosen"),
    [
        ("cpu", None, "refuse", Choice("cpu", "asked for")),
        ("auto", None, "refuse", Choice("cuda", "CUDA runs all of its recurrent path")),
        ("auto", "no driver", "refuse", Choice("cpu", "no driver")),
        ("auto", "no driver", "allow", Choice("cpu", "no driver")),
        ("cuda", None, "allow", Choice("cuda", "asked for")),
        ("cuda", "no driver", "allow", Choice("cpu", "no driver", fallback=True)),
    ],
)
def test_choices(asked: Any, against: str | None, fallback: Any, chosen: Choice) -> None:
    """What is asked for and what CUDA cannot make the choice; only where CUDA was asked for is the CPU a fallback."""
    assert choose(asked, against, fallback) == chosen


@pytest.mark.parametrize(
    ("said", "where", "remedies"),
    [
        ([], "--device cuda", ", or --device auto, or --fallback allow"),
        (["fallback"], "--device cuda", ", or --device auto"),
        (["device"], "device: cuda in model.yaml", ", or --fallback allow"),
        (["device", "fallback"], "device: cuda in model.yaml", ""),
    ],
)
def test_no_choice_is_left(said: list[str], where: str, remedies: str) -> None:
    """CUDA by name, and it does not run: refused, with the reason, who asked for it, and only what helps there."""
    with pytest.raises(LoadError) as refused:
        choose("cuda", "no driver", said=said)
    assert str(refused.value) == (
        f"CUDA was asked for and does not run it: no driver. It was asked for by {where}; to run it on the CPU "
        f"instead, say device: auto or fallback: allow in model.yaml{remedies}"
    )


@pytest.mark.skipif(NO_CUDA is None, reason="CUDA starts here")
@pytest.mark.parametrize(
    ("flags", "yaml", "says"),
    [
        ({}, "", Choice("cpu", str(NO_CUDA))),
        ({"device": "cuda"}, "device: cpu", Choice("cpu", "asked for")),
        ({"device": "cuda"}, "device: auto", Choice("cpu", str(NO_CUDA))),
        ({"device": "cuda", "fallback": "allow"}, "", Choice("cpu", str(NO_CUDA), fallback=True)),
        ({"device": "cuda"}, "fallback: allow", Choice("cpu", str(NO_CUDA), fallback=True)),
        ({"device": "cpu"}, "{device: cuda, fallback: allow}", Choice("cpu", str(NO_CUDA), fallback=True)),
        ({"device": "cuda"}, "", None),
        ({"device": "cpu"}, "device: cuda", None),
        ({"device": "cuda", "fallback": "allow"}, "fallback: refuse", None),
    ],
)
def test_without_cuda(tmp_path: Path, flags: dict[str, Any], yaml: str, says: Choice | None) -> None:
    """A model's own word goes before the server's; what is chosen is said once, and a fallback loudly."""
    path = write_lstm(tmp_path)
    (path.parent.parent / "model.yaml").write_text(yaml)
    settings = Settings(threads=1, tune_s=0, **flags)
    if says is None:
        with pytest.raises(LoadError, match=f"does not run it: {re.escape(str(NO_CUDA))}") as refused:
            load_model(path, settings)
        assert ("--device auto" in str(refused.value)) == ("device" not in yaml)
        assert ("--fallback allow" in str(refused.value)) == ("fallback" not in yaml)
        return
    with capture_logs() as logs:
        loaded, _ = tuned(path, settings)
        load_model(path, settings, threads=2, before=loaded)
    assert (loaded.choice, loaded.provider) == (says, "CPUExecutionProvider")
    (line,) = [one for one in logs if "device" in one]
    reason = in_brief(says.reason, settings, line["log_level"])
    assert (line["log_level"], line["reason"]) == ("warning" if says.fallback else "info", reason)


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_what_the_machine_lacks_is_told_once(monkeypatch: pytest.MonkeyPatch, level: Any) -> None:
    """In full in a line of its own, and before the first line that points to it, of the same level."""
    why = "no NVIDIA driver (libcuda.so.1: cannot open shared object file): a machine needs one"
    monkeypatch.setattr(loading, "why_no_cuda", lambda gpu_id: why)
    monkeypatch.setattr(loading, "_told", set())
    refused = f"CUDA does not run it: {why}. Say device: auto"
    with capture_logs() as logs:
        said = [in_brief(text, Settings(), level) for text in (why, refused, "peepholes", refused, why)]
        in_brief(why, Settings(), "info")
    brief = "no NVIDIA driver, see 'CUDA does not start' above"
    assert said == [brief, f"CUDA does not run it: {brief}", "peepholes", f"CUDA does not run it: {brief}", brief]
    told = [(one["event"], one["log_level"], one["reason"]) for one in logs]
    assert told == [
        ("CUDA does not start", level, why),
        ("CUDA does not start", level, f"{why}. Say device: auto"),
        *([] if level == "info" else [("CUDA does not start", "info", why)]),
    ]


def test_an_obstacle(tmp_path: Path, cuda: list[Path]) -> None:
    """A node that cuDNN does not run is named, with the attribute, before anything is started."""
    path = peephole(write_lstm(tmp_path))
    names = r"node 'lstm/peeping' \(LSTM\) would run on the CPU: peepholes \(input P\): cuDNN has none"
    with pytest.raises(LoadError, match=rf"does not run it: {names}; python -m export writes model\.cuda\.onnx"):
        load_model(path, Settings(device="cuda"))
    choice = load_model(path, Settings(device="auto")).choice
    assert (choice.device, choice.fallback) == ("cpu", False)
    assert "peepholes (input P)" in choice.reason
    assert cuda == []


def test_what_onnxruntime_finds(tmp_path: Path, cuda: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file shows nothing and the session does not start on CUDA, that is the reason."""

    class Refused(ResidentEngine):
        def __init__(self, path: Path, *given: Any, **more: Any) -> None:
            super().__init__(path, *given, **more)
            raise NotOnCuda(path.name, "node 'a' (Tanh) is run by CPUExecutionProvider")

    monkeypatch.setattr(loading, "ResidentEngine", Refused)
    path = write_lstm(tmp_path)
    with pytest.raises(LoadError, match=r"does not run it: node 'a' \(Tanh\) is run by"):
        load_model(path, Settings(device="cuda"))
    assert load_model(path, Settings()).choice == Choice("cpu", "node 'a' (Tanh) is run by CPUExecutionProvider")


def test_the_file_for_cuda(tmp_path: Path, cuda: list[Path]) -> None:
    """On CUDA the file that was exported for it runs, as the same model; on the CPU the model's own."""
    path = write_lstm(tmp_path)
    own = load_model(path, Settings(device="cpu"))
    plain = load_model(path, Settings(device="cuda"))
    assert (plain.choice.file, plain.choice.digest, cuda) == ("model.onnx", "", [path])
    peephole(path)
    other = rewritten(plain.path, "model.cuda.onnx", lambda model: model.graph.node[0].input.pop())
    on_cpu = load_model(path, Settings(device="cpu"))
    on_cuda = load_model(path, Settings(device="auto"))
    assert cuda == [path, other]
    assert (on_cuda.choice.device, on_cuda.choice.file) == ("cuda", "model.cuda.onnx")
    assert on_cpu.choice.file == own.choice.file == "model.onnx"
    # Its sessions are those of the model, whichever file runs; but another file is something else to run.
    assert on_cuda.graph.digest == on_cpu.graph.digest != own.graph.digest
    rewritten(other, other.name, lambda model: model.metadata_props.add(key="again"))
    changed = load_model(path, Settings(device="auto"))
    assert changed.graph.digest == on_cuda.graph.digest
    assert changed.choice.digest != on_cuda.choice.digest


@pytest.mark.parametrize(
    ("says", "instead", "what"),
    [
        ('"name":"h"', '"name":"hidden"', "states"),
        ('"weights_digest":null', '"weights_digest":"of others"', "weights_digest"),
    ],
)
def test_the_file_for_cuda_is_of_another_model(
    tmp_path: Path, cuda: list[Path], says: str, instead: str, what: str
) -> None:
    """Refused, and what they differ in is named."""
    path = write_lstm(tmp_path)

    def change(model: Any) -> None:
        (entry,) = model.metadata_props
        assert says in entry.value
        entry.value = entry.value.replace(says, instead)

    rewritten(path, "model.cuda.onnx", change)
    with pytest.raises(LoadError, match=rf"model\.cuda\.onnx is not of the same model as model\.onnx: .* in {what};"):
        load_model(path, Settings(device="auto"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["model.onnx", "model.cuda.onnx"])
def test_a_damaged_file(tmp_path: Path, cuda: list[Path], name: str, device: Any) -> None:
    """Is refused by name, if it is read at all; on CUDA both files are, which have to be one model."""
    path = write_lstm(tmp_path)
    for file in (path, rewritten(path, "model.cuda.onnx")):
        file.write_bytes(seal(file.read_bytes()))
    settings = Settings(threads=1, device=device)
    load_model(path, settings)
    damaged = bytearray(path.with_name(name).read_bytes())
    damaged[len(damaged) // 3] ^= 1
    path.with_name(name).write_bytes(damaged)
    if (name, device) == ("model.cuda.onnx", "cpu"):
        load_model(path, settings)
        return
    with pytest.raises(LoadError, match=rf"^{re.escape(name)} is not what was written: "):
        load_model(path, settings)


@pytest.mark.parametrize("without", ["model.onnx", "model.cuda.onnx", "both"])
def test_nothing_tells_whose_file_for_cuda_it_is(tmp_path: Path, cuda: list[Path], without: str) -> None:
    """Where one of the two has no manifest inside, nothing holds them together: refused."""
    path = write_lstm(tmp_path)
    other = rewritten(path, "model.cuda.onnx")
    for file in (path, other):
        if without in (file.name, "both"):
            rewritten(file, file.name, lambda model: model.ClearField("metadata_props"))
    (tmp_path / "lstm/model.yaml").write_text(
        "inputs: {x: {time_axis: 0, batch_axis: 1}, lengths: {role: lengths}}\n"
        "states: [{input: h0, output: hT, batch_axis: 1}, {input: c0, output: cT, batch_axis: 1}]\n"
        "outputs: {y: {time_axis: 0, batch_axis: 1}}\n"
        if without == "both"
        else ""
    )
    named = "model.onnx" if without == "both" else without
    with pytest.raises(LoadError, match=rf"^{named} has no manifest inside, so that nothing tells whether model\.onnx"):
        load_model(path, Settings(device="auto"))
    other.unlink()
    if without == "both":
        assert load_model(path, Settings(device="auto")).choice.device == "cuda"


def test_an_empty_file_for_cuda(tmp_path: Path, cuda: list[Path]) -> None:
    """Is named, so that nobody looks into model.onnx."""
    path = write_lstm(tmp_path)
    path.with_name("model.cuda.onnx").touch()
    with pytest.raises(LoadError, match=r"^model\.cuda\.onnx has no manifest inside"):
        load_model(path, Settings(device="cuda"))


def test_data_beside_the_file_for_cuda(tmp_path: Path, cuda: list[Path]) -> None:
    """Makes its digest too: other data is something else to run."""
    path = write_lstm(tmp_path)
    model = onnx.load(path)
    onnx.save(model, path.with_name("model.cuda.onnx"), save_as_external_data=True, location="data", size_threshold=0)
    first = load_model(path, Settings(device="cuda")).choice
    data = path.with_name("data")
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert load_model(path, Settings(device="cuda")).choice.digest != first.digest


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.onnx", r"; python -m export writes model\.cuda\.onnx beside it"),
        (
            "model.float32.onnx",
            r"--precision float32 --output model\.float32\.onnx --overwrite writes model\.float32\.cuda\.onnx",
        ),
    ],
)
def test_how_to_make_the_file_for_cuda(tmp_path: Path, cuda: list[Path], name: str, hint: str) -> None:
    """What is said to do writes the file that is looked for; to one that was not exported here nothing is said."""
    path = peephole(write_lstm(tmp_path))
    rewritten(path, name)
    (tmp_path / "lstm/model.yaml").write_text("precision: float32" if name != path.name else "")
    with pytest.raises(LoadError, match=hint):
        load_model(path, Settings(device="cuda"))


def test_there_is_no_file_for_cuda_in_int8(tmp_path: Path, cuda: list[Path]) -> None:
    """So none is promised."""
    path = peephole(write_lstm(tmp_path))

    def quantize(model: Any) -> None:
        node = model.graph.node.add(op_type="DynamicQuantizeLinear", input=["P"], output=["q", "scale", "zero"])
        assert node.name == ""

    rewritten(path, path.name, quantize)
    with pytest.raises(LoadError) as refused:
        load_model(path, Settings(device="cuda"))
    assert "peepholes" in str(refused.value)
    assert "python -m export" not in str(refused.value)


def test_the_file_for_cuda_of_a_precision(tmp_path: Path, cuda: list[Path]) -> None:
    """Each precision has its own; without one, CUDA runs the precision's file."""
    path = write_lstm(tmp_path)
    rewritten(path, "model.cuda.onnx")
    exact = rewritten(path, "model.float32.onnx")
    (tmp_path / "lstm/model.yaml").write_text("precision: float32")
    load_model(path, Settings(device="cuda"))
    own = rewritten(exact, "model.float32.cuda.onnx")
    load_model(path, Settings(device="cuda"))
    assert cuda == [exact, own]


@pytest.mark.parametrize(
    ("server", "yaml", "on"), [("on", "", True), ("off", "tf32: true", True), ("on", "tf32: false", False)]
)
def test_tf32_is_compared(
    tmp_path: Path, cuda: list[Path], monkeypatch: pytest.MonkeyPatch, server: Any, yaml: str, on: bool
) -> None:
    """With it, how far results are from those without it is measured at the load, said, and kept."""
    path = write_lstm(tmp_path)
    (tmp_path / "lstm/model.yaml").write_text(yaml)
    coarse = write_lstm(tmp_path / "coarse")
    rounded = vars(loading)["ResidentEngine"]

    class Rounded(rounded):  # type: ignore[misc, valid-type]
        def __init__(self, path: Path, *given: Any, **more: Any) -> None:
            super().__init__(to_tf32(coarse) if given[-1].tf32 else path, *given, **more)

    monkeypatch.setattr(loading, "ResidentEngine", Rounded)
    with capture_logs() as logs:
        choice = load_model(path, Settings(device="cuda", tf32=server)).choice
    compared = [one for one in logs if one["event"] == "TF32 compared"]
    assert choice.tf32 == on == bool(compared)
    if on:
        difference = choice.tf32_difference
        assert difference is not None
        assert 1e-6 < difference < 1e-2
        assert max(compared[0]["outputs"], compared[0]["states"]) == float(f"{difference:.2g}")
    else:
        assert choice.tf32_difference is None


def to_tf32(path: Path) -> Path:
    """Cut the weights of a file to 10 bits behind the point."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            cut = (array.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(cut, tensor.name))
    onnx.save(model, path)
    return path


def test_what_the_audit_finds(tmp_path: Path, cuda: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that would have to run row by row is none for CUDA: the CPU runs it, where that may be."""

    def finding(graph: Any, *given: Any) -> Any:
        found = audit(graph, *given)
        if isinstance(graph, ResidentEngine):
            return replace(found, graph=RowByRow(graph), warnings=("rows differ",))
        return found

    monkeypatch.setattr(loading, "audit", finding)
    path = write_lstm(tmp_path)
    assert load_model(path, Settings(device="auto")).choice == Choice("cpu", "rows differ")
    with pytest.raises(LoadError, match="does not run it: rows differ"):
        load_model(path, Settings(device="cuda"))


@pytest.mark.parametrize(("settings", "fallback"), [({}, False), ({"device": "cuda", "fallback": "allow"}, True)])
def test_what_fails_in_its_first_run(
    tmp_path: Path, cuda: list[Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fallback: bool
) -> None:
    """Is no more for CUDA than what is refused when it is opened; by name alone it is refused."""

    class NoKernel(ResidentEngine):
        def run(self, feeds: Any) -> Any:
            raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(loading, "ResidentEngine", NoKernel)
    path = write_lstm(tmp_path)
    choice = load_model(path, Settings(**settings)).choice
    assert (choice.device, choice.fallback, choice.file) == ("cpu", fallback, "model.onnx")
    assert "no kernel image is available" in choice.reason
    with pytest.raises(LoadError, match=r"CUDA was asked for and does not run it: .*no kernel image"):
        load_model(path, Settings(device="cuda"))


@pytest.mark.parametrize("by", ["rows", "cells"])
def test_tf32_may_differ_by_size(tmp_path: Path, cuda: list[Path], monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """One row in whole float32 and several in TF32, or one step and several, are one model with TF32 on."""
    coarse = to_tf32(write_lstm(tmp_path / "coarse"))

    class BySize(ResidentEngine):
        def __init__(self, path: Path, *given: Any, **more: Any) -> None:
            super().__init__(path, *given, **more)
            self._coarse = ResidentEngine(coarse, *given, **more) if given[-1].tf32 else None

        def run(self, feeds: Any) -> Any:
            steps, rows = feeds["x"].shape[:2]
            large = rows > 1 if by == "rows" else rows * steps > 4
            return self._coarse.run(feeds) if self._coarse is not None and large else super().run(feeds)

    monkeypatch.setattr(loading, "ResidentEngine", BySize)
    path = write_lstm(tmp_path)
    loaded = load_model(path, Settings(device="cuda", tf32="on"))
    assert (loaded.choice.device, loaded.choice.tf32, loaded.warnings) == ("cuda", True, ())


@pytest.mark.parametrize("fails", ["opened", "run"])
def test_tf32_that_cannot_be_compared(
    tmp_path: Path, cuda: list[Path], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """A device without memory for a second copy serves the first, and the log says what is not known of it."""

    class Small(ResidentEngine):
        def __init__(self, path: Path, *given: Any, **more: Any) -> None:
            super().__init__(path, *given, **more)
            self._tf32 = given[-1].tf32
            if not self._tf32 and fails == "opened":
                raise NotOnCuda(path.name, "out of memory")

        def run(self, feeds: Any) -> Any:
            if not self._tf32:
                raise RuntimeError("out of memory")
            return super().run(feeds)

    monkeypatch.setattr(loading, "ResidentEngine", Small)
    with capture_logs() as logs:
        choice = load_model(write_lstm(tmp_path), Settings(tf32="on")).choice
    assert (choice.device, choice.tf32, choice.tf32_difference) == ("cuda", True, None)
    (said,) = [one for one in logs if one["event"] == "TF32 not compared"]
    assert "out of memory" in said["reason"]
