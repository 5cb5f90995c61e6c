"""The documents name what is there: tests, files, settings and their defaults."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

from service.graphs.description import Description, Initial, InputDescription, OutputDescription, StateDescription
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/client.md",
    "docs/guarantees.md",
    "docs/models.md",
    "docs/operating.md",
    "docs/performance.md",
    "docs/weights.md",
    "docs/protocol.md",
]
UNITS = {"": 1, "MiB": 2**20, "GiB": 2**30}


def test_every_test_named_is_there() -> None:
    """Each ``tests/...::test_...`` in the guarantees is a test in that file."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 30
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or f"def {name}(" not in (ROOT / path).read_text()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    """Each relative link and picture is a file of the project."""
    path = ROOT / document
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).is_file()] == []


def test_limits_have_the_defaults_that_are_named() -> None:
    """The table of limits has every limit but those of a tick, with its default."""
    table = re.findall(r"`--([\w-]+)` \| ([\d,]+) ?(\w*) \|", (ROOT / "docs/guarantees.md").read_text())
    named = {flag.replace("-", "_"): int(number.replace(",", "")) * UNITS[unit] for flag, number, unit in table}
    limits = {name for name in Settings.model_fields if name.startswith("max_") and "tick" not in name}
    assert named.keys() == limits | {"idle_timeout_s", "load_timeout_s"}
    assert named == {name: Settings.model_fields[name].default for name in named}


@pytest.mark.parametrize("folder", ["", "versions", "ticks", "engines", "graphs", "states"])
def test_every_room_is_in_the_table(folder: str) -> None:
    """Each module of the server, and no other, has its one line, in the order that imports are held to."""
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.partition(f"### `{folder}/`" if folder else "## The rooms of the server")[2].partition("\n##")[0]
    first_columns = [line.split("|")[1] for line in table.splitlines() if line.startswith(("| `", "| [`"))]
    rooms = re.findall(r"`(\w+)(?:\.py|/)`", " ".join(first_columns))
    modules = {path.stem for path in (ROOT / "service" / folder).glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (ROOT / "service" / folder).glob("*/__init__.py")}
    assert sorted(rooms) == sorted(modules | packages)
    container = f"service.{folder}".rstrip(".")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == [container])
    level = {room: number for number, layer in enumerate(layers) for room in layer.replace(" ", "").split("|")}
    assert [level[room] for room in rooms] == sorted(level[room] for room in rooms)


def test_every_metric_is_in_the_table() -> None:
    """By the name under which it is scraped, with its labels, and no other."""
    rows = re.findall(r"^\| `(conveyor_\w+)` \| ([\w, ]*) ?\|", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    named = {name: tuple(re.findall(r"\w+", labels)) for name, labels in rows}
    metrics = [each for each in vars(Metrics()).values() if isinstance(each, MetricWrapperBase)]
    have = {each._name + "_total" * isinstance(each, Counter): each._labelnames for each in metrics}
    assert named == have


def test_every_key_is_in_the_table() -> None:
    """Each thing that model.yaml can say of a model, an input, a state and an output is in the table of keys."""
    text = (ROOT / "docs/models.md").read_text()
    table = " ".join(line for line in text.splitlines() if line.startswith("| `"))
    for section in (Description, InputDescription, StateDescription, OutputDescription, Initial):
        missing = [key for key in section.model_fields if not re.search(rf"\b{key}\b", table)]
        assert missing == [], section.__name__


def test_what_has_not_run_on_a_gpu_is_said() -> None:
    """As long as no results of a GPU are in the checkout, the page says so; with results it links to them instead."""
    page = (ROOT / "docs/performance.md").read_text()
    have = (ROOT / "docs/performance/gpu/results.json").is_file()
    assert ("**Nothing here has run on a GPU.**" in page) is not have
    assert ("(performance/gpu/README.md)" in page) is have
