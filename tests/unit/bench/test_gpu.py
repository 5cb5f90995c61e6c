"""The benchmark on a device: floors counted by hand, ticks timed by a test's clock, targets that judge the worst."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from bench import gpu
from bench import gpu_report as report
from bench.gpu_cases import LOWERED, SERVED, TICKS, Case, Stack
from bench.gpu_engine import Engine
from bench.gpu_floor import Rates, floor_s, link_s, moved_bytes, operations, state_bytes, weight_bytes
from bench.gpu_results import TARGETS, Measured, Results
from bench.gpu_timing import Ticks, measure
from service.engines.provider import why_no_cuda
from tests.graphs import INPUT

ROOT = Path(__file__).resolve().parents[3]
RATES = Rates(memory_bytes_per_s=1e9, operations_per_s=1e12, up_bytes_per_s=1e8, down_bytes_per_s=2e8)
SUBJECTS = {
    "ticks": ("engine", "engine_device", "torch", "torch_device"),
    "lowered": ("engine", "engine_cpu"),
    "served": ("service", "engine"),
}


def measured(part: str, cases: tuple[Case, ...], per_s: Callable[[Case, str], float]) -> list[Measured]:
    """Two runs of each subject of each case."""
    return [
        Measured(
            case,
            {
                subject: [{"steps_per_s": per_s(case, subject), "p50_ms": 1.0, "p99_ms": 2.0}] * 2
                for subject in SUBJECTS[part]
            },
        )
        for case in cases
    ]


def whole(per_s: Callable[[Case, str], float] = lambda case, subject: 100.0) -> Results:
    """Everything measured."""
    return Results(
        "cuda",
        {"cores": "2"},
        {"runs": 2},
        RATES,
        measured("ticks", TICKS, per_s),
        measured("lowered", LOWERED, per_s),
        measured("served", SERVED, per_s),
        took_s=60.0,
    )


def test_bytes_and_operations_are_those_counted_by_hand() -> None:
    """A GRU of two layers: three gates of H x (I + H) and a bias; states in and out; 2 operations a weight."""
    stack = Stack("gru", 256, 2)
    assert weight_bytes(stack) == 4 * (3 * 256 * (128 + 256 + 1) + 3 * 256 * (256 + 256 + 1))
    assert state_bytes(stack) == 4 * 2 * 256
    case = Case(stack, rows=10, steps=16)
    assert moved_bytes(case) == weight_bytes(stack) + 2 * 10 * state_bytes(stack)
    assert operations(case) == 2 * 10 * 16 * 3 * 256 * ((128 + 256) + (256 + 256))
    assert state_bytes(Stack("lstm", 256)) == 4 * 2 * 256
    assert weight_bytes(Stack("lstm_peephole", 256)) - weight_bytes(Stack("lstm", 256)) == 4 * 3 * 256


def test_the_floor_is_what_takes_longer() -> None:
    """Few rows: weights have to be moved. Many: products have to be computed. Copies are bound by the slower way."""
    stack = Stack("lstm", 1024)
    few, many = Case(stack, 1, 1), Case(stack, 8192, 16)
    assert floor_s(few, RATES) == moved_bytes(few) / 1e9 > operations(few) / 1e12
    assert floor_s(many, RATES) == operations(many) / 1e12 > moved_bytes(many) / 1e9
    assert link_s(many, RATES) == 4 * 8192 * 16 * 1024 / 2e8 > 4 * 8192 * 16 * 128 / 1e8


class Device:
    """A device whose ticks take a time, on a clock of its own; a wait takes as long as all that was launched."""

    def __init__(self, tick_s: Callable[[int], float], launch_s: float) -> None:
        self.now = self.until = 0.0
        self._tick_s = tick_s
        self._launch_s = launch_s
        self.launched = 0

    def launch(self) -> None:
        """Begin a tick behind those that run."""
        self.now += self._launch_s
        self.until = max(self.until, self.now) + self._tick_s(self.launched)
        self.launched += 1

    def wait(self) -> None:
        """Wait for all."""
        self.now = max(self.now, self.until)


def test_latency_is_of_a_tick_alone_and_throughput_of_many() -> None:
    """A launch of 1 ms and a tick of 10: 11 ms alone, and 100 ticks a second where launches overlap with ticks."""
    device = Device(lambda number: 0.01, launch_s=0.001)
    figures = measure(Ticks(device.launch, device.wait), 64, 10.0, lambda: device.now)
    assert figures["p50_ms"] == pytest.approx(11)
    assert figures["p99_ms"] == pytest.approx(11)
    assert figures["steps_per_s"] == pytest.approx(6400, rel=0.01)


def test_a_tick_in_fifty_that_is_slow_is_the_p99() -> None:
    """One tick of fifty takes ten times as long: not in the median, but in the p99."""
    device = Device(lambda number: 0.1 if number % 50 == 7 else 0.01, launch_s=0.0)
    figures = measure(Ticks(device.launch, device.wait), 1, 20.0, lambda: device.now)
    assert figures["p50_ms"] == pytest.approx(10)
    assert figures["p99_ms"] == pytest.approx(100)


def test_results_come_back_as_they_were() -> None:
    """What is written to JSON is read as the same cases and figures."""
    results = whole()
    results.ticks[0].missing["engine"] = "out of memory"
    assert Results.from_json(results.to_json()) == results


def test_every_target_finds_all_of_its_cases() -> None:
    """In a whole benchmark each target is judged by every shape that it is about; in an empty one by none."""
    for target in TARGETS:
        assert target.ratios(whole()).keys() == set(target.cases)
        assert target.line(Results("cuda", {}, {}, RATES))[2:] == ["not measured", ""]


def test_the_worst_shape_decides() -> None:
    """All shapes but one at 1.5 times torch, that one at half of it: it falls short, and says where."""
    bad = Case(Stack("gru", 512, 2), 1024, 16)

    def per_s(case: Case, subject: str) -> float:
        if not subject.startswith("engine"):
            return 100.0
        return 50.0 if case == bad else 150.0

    on_device = TARGETS[0].line(whole(per_s))
    assert on_device[3] == "falls short"
    assert "0.5 at worst (GRU 128->512 x 2, 1,024 rows, 16 steps a tick)" in on_device[2]
    assert "119 of 120 shapes reach it" in on_device[2]
    assert TARGETS[0].line(whole(lambda case, subject: 90.0 if "engine" in subject else 100.0))[3] == "reached"


def test_few_rows_are_not_held_against_the_target() -> None:
    """Below 64 rows the engine may be slower than torch."""
    results = whole(lambda case, subject: 1.0 if case.rows < 64 and "engine" in subject else 100.0)
    assert TARGETS[0].line(results)[3] == "reached"


def test_a_shape_that_failed_leaves_the_target_open() -> None:
    """What could not be measured, for want of memory say, does not count as reached."""
    results = whole()
    lost = next(one for one in results.ticks if one.case.rows == 8192)
    del lost.runs["engine_device"]
    lost.missing["engine_device"] = "out of memory"
    assert TARGETS[0].line(results)[3] == "incomplete"


def test_pages_and_pictures_show_what_was_measured(tmp_path: Path) -> None:
    """Each stack and case is on the page, with a picture for each cell; a run without a GPU claims no target."""
    results = whole()
    few = replace(results, ticks=[one for one in results.ticks if one.case.stack.hidden_size == 256])
    assert [path.name for path in report.draw(few, tmp_path)] == ["lstm.svg", "gru.svg"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    page = report.page(results, ["lstm.svg"])
    assert "![lstm](lstm.svg)" in page
    assert page.count("## ") == 12 + len(LOWERED) + len(SERVED)
    assert all(target.what in page for target in TARGETS)
    results.device = "cpu"
    assert "Not run on a GPU" in report.page(results, [])
    assert not any(target.what in report.page(results, []) for target in TARGETS)


def test_a_line_says_what_was_not_measured() -> None:
    """Where a subject failed its line says why, and the others stand."""
    one = Measured(LOWERED[0], {"engine_cpu": [{"steps_per_s": 5.0}]}, {"engine": "no kernel"})
    lines = report.other_lines(one)
    assert ["engine on the device", "not measured: no kernel"] in lines
    assert math.isnan(one.ratio("engine", "engine_cpu"))


def test_without_a_gpu_it_says_what_is_missing_and_writes_nothing(tmp_path: Path) -> None:
    """Figures for the documents come from a GPU: with the CPU they may not be written there."""
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--write", str(tmp_path / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--write is for what ran on a GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(why_no_cuda() is None, reason="CUDA starts here")
def test_without_a_gpu_it_says_first_what_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not which torch there is; and offers what runs without one."""
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    assert gpu.main() == 1
    said = capsys.readouterr().err
    assert f"CUDA does not start here: {why_no_cuda()}\n" in said
    assert said.endswith("python -m bench.gpu --quick --device cpu\n")


def test_on_the_cpu_it_says_first_that_figures_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before anything is measured."""
    # The logs of other tests stay as they are.
    monkeypatch.setattr("structlog.configure", lambda **given: None)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "cpu", "--folder", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "figures mean nothing" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("copies", [True, False], ids=["with copies", "on the device"])
@pytest.mark.parametrize("stand_in", [True, False], ids=["as on a device", "on the host"])
def test_the_engine_s_ticks_step(lstm_repository: Path, stand_in: bool, copies: bool) -> None:
    """Ticks of the engine run, as often as they are launched, and again for another shape."""
    engine = Engine(lstm_repository / "lstm" / "1" / "model.onnx", "cpu", 1, 5, stand_in)
    stack = cast(Stack, SimpleNamespace(input_size=INPUT))
    for rows, steps in ((3, 1), (5, 4)):
        figures = measure(engine.ticks(Case(stack, rows, steps), copies), rows * steps, 0.02)
        assert figures["steps_per_s"] > 0
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
