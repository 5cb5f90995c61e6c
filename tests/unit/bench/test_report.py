"""Results come back from their file as they were, every target finds its figures, and pages show what was found."""

from __future__ import annotations

import io
import re
from itertools import chain
from pathlib import Path

import pytest
from rich.console import Console

from bench import __main__ as program
from bench import plots, report
from bench.cases import CURVES, GROUPS
from bench.measure import Measured, Point, expected_s
from bench.results import Results
from bench.servers import Settings
from bench.situations import SITUATIONS
from bench.targets import TARGETS

PAGE = Path(__file__).parents[3] / "docs/performance.md"
FIGURES = {"steps_per_s": 2.0, "cpu_us_per_step": 3.0, "p50_ms": 4.0, "p99_ms": 5.0, "rows_per_tick": 6.0}


@pytest.fixture
def results() -> Results:
    """A whole benchmark's, each figure made up."""
    return Results(
        host={"cores": "2"},
        settings={"runs": 3},
        event_loops={"conveyor": "asyncio"},
        parity={
            "LSTM 128->512 x 2": {"outputs": 1e-6, "states": 2e-6},
            "LSTM 128->512 x 2 int8": {"outputs": 0.01, "states": 0.02},
        },
        cases=[(case, [Measured(one, [dict(FIGURES)]) for one in case.subjects]) for case in chain(*GROUPS)],
        curves=[(curve, [Point(one, 500, dict(FIGURES)) for one in curve.subjects]) for curve in CURVES],
        situations={
            "streams beside batches": [{"p99_ratio": 1.5, "wasted": 0.01, "batch_alone_wasted": 0.06}],
            "overload": [
                {"4x.in_time": 0.8, "4x.refusal_p99_ms": 40.0},
                {"4x.in_time": 0.9, "4x.refusal_p99_ms": 60.0, "growth": 0.0},
                {"4x.in_time": 1.0, "4x.refusal_p99_ms": 55.0, "growth": 0.001},
            ],
            "resident sessions": [{"ratio": 1.0}],
        },
        took_s=500.0,
    )


def test_results_come_back_as_they_were(results: Results) -> None:
    """What is written to JSON is read as the same cases, curves and figures."""
    assert Results.from_json(results.to_json()) == results


def test_every_target_rests_on_something_measured(results: Results) -> None:
    """Each target finds its figure in a whole benchmark, and none in an empty one."""
    lines = {target.what: target.line(results) for target in TARGETS}
    assert [what for what, line in lines.items() if line[2] == "not measured"] == []
    assert {target.line(Results({}, {}))[2] for target in TARGETS} == {"not measured"}
    wasted = next(line for what, line in lines.items() if "thrown away" in what)
    assert wasted[2:] == ["6.0%", "falls short"]
    in_time = next(line for what, line in lines.items() if "answered in time" in what)
    assert in_time[2:] == ["0.9", "reached"]
    int8 = next(line for what, line in lines.items() if "int8" in what)
    errors = "outputs 1.0e-02 off, 1.0e-06 in float32; states 2.0e-02 off, 2.0e-06 in float32"
    assert int8[2] == f"1 (a bare server: 1; the graph alone: 1; {errors})"


def test_a_bare_server_stands_beside_every_target_of_cost(results: Results) -> None:
    """Each says what the bare server comes to by the same measure, and nothing of it where it was not measured."""
    for _, measured in results.cases:
        for one in measured:
            if one.subject == "bare":
                one.runs[0] |= {"cpu_us_per_step": 1.5, "steps_per_s": 5.0}
    cost = [target for target in TARGETS if "CPU per step" in target.what]
    assert len(cost) == 4
    assert {target.line(results)[2] for target in cost} == {"1 (a bare server: 0.5)"}
    rate = next(target for target in TARGETS if "over the loop's" in target.what)
    assert rate.line(results)[2] == "1 (a bare server: 2.5)"
    results.cases = [(case, [one for one in measured if one.subject != "bare"]) for case, measured in results.cases]
    assert {target.line(results)[2] for target in cost} == {"1"}


def test_what_a_target_rests_on_is_run_every_time() -> None:
    """Cases that a target takes figures from are marked, so that they are medians of several runs."""
    unmarked = Results(
        {},
        {},
        cases=[
            (case, [Measured(one, [dict(FIGURES)]) for one in case.subjects])
            for case in chain(*GROUPS)
            if not case.target
        ],
    )
    assert {target.line(unmarked)[2] for target in TARGETS} == {"not measured"}


def test_everything_fits_into_ten_minutes() -> None:
    """What the progress line expects of a whole benchmark leaves room in ten minutes."""
    settings = Settings(Path())
    total_s = sum(expected_s(case, settings) for case in chain(*GROUPS))
    total_s += sum(expected_s(curve, settings) for curve in CURVES)
    total_s += sum(situation.expected_s(settings) for situation in SITUATIONS.values())
    assert 300 < total_s < 570


def test_the_page_is_written_anew_between_its_marks(results: Results) -> None:
    """Generated parts hold what was found, each once however often it is written; the rest stays as it was."""
    page = PAGE.read_text()
    written = report.fill(page, results, "performance", ["latency.svg"])
    assert report.fill(written, results, "performance", ["latency.svg"]) == written
    assert "| falls short |" in written
    assert "![latency](performance/latency.svg)" in written
    assert written.count("<!-- generated: ") == len(re.findall(r"<!-- generated: \w+ -->\n", page)) == 3
    by_hand = re.compile(r"<!-- generated: \w+ -->.*?<!-- end -->", re.DOTALL)
    assert by_hand.sub("", written) == by_hand.sub("", page)


def test_a_run_that_came_to_nothing_is_told(results: Results) -> None:
    """A subject that was not measured says why, and one that lost runs says how many."""
    lines = report.case_lines([Measured("triton", [], 3, "Triton: \n signal 11"), Measured("loop", [dict(FIGURES)], 2)])
    assert lines[0][1] == "not measured: signal 11"
    assert lines[1][-1] == "1, 2 failed"
    results.missing["overload"] = "it did not start"
    assert report.situation_lines(results, "overload") == [["not measured", "it did not start", ""]]


def test_pictures_are_the_same_for_the_same_figures(results: Results, tmp_path: Path) -> None:
    """The three pictures are drawn, and drawn again are the same to the byte."""
    results.cases, results.curves = results.cases[:3], results.curves[:1]
    first = {path.name: path.read_bytes() for path in plots.draw(results, tmp_path)}
    assert sorted(first) == ["cost.svg", "latency.svg", "rows.svg"]
    assert {path.name: path.read_bytes() for path in plots.draw(results, tmp_path)} == first
    assert plots.draw(Results({}, {}), tmp_path) == []


@pytest.mark.parametrize("judge", [True, False])
def test_a_quick_benchmark_judges_no_target(results: Results, tmp_path: Path, judge: bool) -> None:
    """Its figures are written, and neither the terminal nor a page says what they reach."""
    page = tmp_path / "performance.md"
    page.write_text("<!-- generated: targets -->\n<!-- end -->\n")
    console = Console(record=True, quiet=False, width=140, file=io.StringIO())
    program._write(results, tmp_path / "performance", console, judge)
    assert ("falls short" in console.export_text()) == ("falls short" in page.read_text()) == judge
    assert (tmp_path / "performance/results.json").is_file()
