"""Settings: which source wins, what is said of wrong values, and that --help lists every one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from service.settings import Settings, load, load_tune

SAMPLES: dict[str, tuple[str, object]] = {
    "port": ("9000", 9000),
    "idle_timeout_s": ("2.5", 2.5),
    "device": ("cpu", "cpu"),
    "repository": ("models", Path("models")),
    "metrics_port": ("9100", 9100),
}


def flag(name: str) -> str:
    """How a setting stands on the command line."""
    return "--" + name.replace("_", "-")


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]) -> str:
    """What is said of settings that are wrong."""
    with pytest.raises(SystemExit) as ended:
        load(argv, environ)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    """Nothing given: the defaults, and other people's variables do not count."""
    assert load([], {"PORT": "1", "HOME": "/", "CONVEYOR_PORT": ""}) == Settings()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_every_source_sets_every_kind(tmp_path: Path, source: str, name: str) -> None:
    """Numbers, choices and paths, from each of the three."""
    text, value = SAMPLES[name]
    file = tmp_path / "server.toml"
    file.write_text(f"{name} = {text if text.replace('.', '').isdigit() else repr(text)}\n")
    settings = {
        "flag": lambda: load([flag(name), text], {}),
        "environment": lambda: load([], {f"CONVEYOR_{name.upper()}": text}),
        "file": lambda: load(["--config", str(file)], {}),
    }[source]()
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("given", "port"),
    [
        ({"file"}, 1),
        ({"environment"}, 2),
        ({"flag"}, 3),
        ({"file", "environment"}, 2),
        ({"file", "flag"}, 3),
        ({"environment", "flag"}, 3),
        ({"file", "environment", "flag"}, 3),
        (set(), Settings().port),
    ],
    ids=lambda given: "+".join(sorted(given)) if isinstance(given, set) else None,
)
def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path, given: set[str], port: int) -> None:
    """Setting by setting: another one from a weaker source stays."""
    file = tmp_path / "server.toml"
    file.write_text("max_steps = 77\n" + ("port = 1\n" if "file" in given else ""))
    settings = load(
        ["--config", str(file), *(["--port", "3"] if "flag" in given else [])],
        {"CONVEYOR_PORT": "2"} if "environment" in given else {},
    )
    assert (settings.port, settings.max_steps) == (port, 77)


@pytest.mark.parametrize("source", ["flag", "environment", "file", "file, as text"])
def test_several_names(tmp_path: Path, source: str) -> None:
    """Between commas, and in a file also as a list."""
    file = tmp_path / "server.toml"
    file.write_text("load_models = " + ('["lstm", "gru"]' if source == "file" else '"lstm, gru"'))
    argv, environ = {
        "flag": (["--load-models", "lstm,gru"], {}),
        "environment": ([], {"CONVEYOR_LOAD_MODELS": "lstm,gru"}),
    }.get(source, (["--config", str(file)], {}))
    assert load([*argv, "--model-control", "explicit"], environ).load_models == ("lstm", "gru")


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    """As every setting; a flag names another one."""
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("port = 1")
    second.write_text("port = 2")
    environ = {"CONVEYOR_CONFIG": str(first)}
    assert load([], environ).port == 1
    assert load(["--config", str(second)], environ).port == 2


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("port", "-1", "expected a number greater than or equal to 0, got '-1'"),
        ("port", "65536", "less than or equal to 65535"),
        ("port", "http", "expected a whole number, got 'http'"),
        ("gpu_memory_limit_bytes", "4GB", "expected a whole number of bytes, got '4GB'"),
        ("idle_timeout_s", "an hour", "expected a number of seconds, got 'an hour'"),
        ("tf32", "perhaps", "expected 'off' or 'on', got 'perhaps'"),
        ("max_steps", "0", "greater than or equal to 1"),
        ("max_sessions", "1.5", "expected a whole number, got '1.5'"),
        ("idle_timeout_s", "0", "expected seconds greater than 0"),
        ("idle_timeout_s", "nan", "less than or equal to 9223372036"),
        ("load_timeout_s", "inf", "less than or equal to 9223372036"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("non_finite", "perhaps", "'reject' or 'accept'"),
        ("load_models", "lstm", "with --model-control explicit alone"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_wrong_value_is_named_as_it_was_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str, name: str, value: str, says: str
) -> None:
    """By its flag, its variable, or its file and line, with what was expected."""
    file = tmp_path / "server.toml"
    file.write_text(f'{name} = "{value}"')
    argv, environ, called = {
        "flag": ([flag(name), value], {}, f"{flag(name)}: "),
        "environment": ([], {f"CONVEYOR_{name.upper()}": value}, f"CONVEYOR_{name.upper()}: "),
        "file": (["--config", str(file)], {}, f"settings file {file}: {name}: "),
    }[source]
    told = refused(capsys, argv, environ)
    assert called in told
    assert says in told


@pytest.mark.parametrize("on", ["on", "true", "1", "True"])
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_switch_is_spelt_as_anywhere(tmp_path: Path, source: str, on: str) -> None:
    """As model.yaml and TOML do, or as a word."""
    file = tmp_path / "server.toml"
    file.write_text(f"tf32 = {on}" if on in ("true", "1") else f"tf32 = '{on}'")
    argv, environ = {
        "flag": (["--tf32", on], {}),
        "environment": ([], {"CONVEYOR_TF32": on}),
    }.get(source, (["--config", str(file)], {}))
    assert load(argv, environ).tf32 == "on"
    assert load(["--tf32", "0", "--cuda-graphs", on], {}).model_dump(include={"tf32", "cuda_graphs"}) == {
        "tf32": "off",
        "cuda_graphs": "on",
    }


def test_all_wrong_values_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """From whatever source."""
    told = refused(capsys, ["--port", "x"], {"CONVEYOR_MAX_STEPS": "y"})
    assert "--port: " in told
    assert "CONVEYOR_MAX_STEPS: " in told


def test_unknown_flags_and_shortened_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused: a flag that is added later must not change what an old command means."""
    assert "--colour" in refused(capsys, ["--colour", "red"], {})
    assert "--metrics" in refused(capsys, ["--metrics", "9"], {})
    assert "unrecognized arguments: tunes\n" in refused(capsys, ["tunes"], {})


@pytest.mark.parametrize("given", [["--prot", "1"], ["--prot=1"]])
def test_misspelt_flags(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    """Are told with the one that may be meant, each; what is like none, alone."""
    told = refused(capsys, [*given, "--max-sesions", "5", "--colour", "red"], {})
    assert "--prot: no such flag; did you mean --port?\n" in told
    assert "--max-sesions: no such flag; did you mean --max-sessions?\n" in told
    assert "--colour: no such flag\n" in told
    with pytest.raises(SystemExit):
        load_tune(["--modl", "lstm"], {})
    assert "--modl: no such flag; did you mean --model?\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"port = ", "Invalid value"),
        (b"\xff\xfe", "utf-8"),
        (b"colour = 'red'", "colour: no such setting"),
        (b"devcie = 'cpu'", "devcie: no such setting; did you mean device?"),
        (b"[server]\nport = 1", "server: no such setting"),
    ],
    ids=["missing", "not TOML", "not text", "unknown setting", "misspelt setting", "a table"],
)
def test_a_settings_file_that_does_not_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, says: str
) -> None:
    """The file is named, and what is wrong with it."""
    file = tmp_path / "server.toml"
    if content is not None:
        file.write_bytes(content)
    told = refused(capsys, ["--config", str(file)], {})
    assert f"settings file {file}" in told
    assert says in told


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag once, with a sentence and the default, in groups, and how flags, variables and the file relate."""
    with pytest.raises(SystemExit) as ended:
        load(["--help"], {})
    assert ended.value.code == 0
    page = capsys.readouterr().out
    entries = dict(re.findall(r"^  (--[a-z0-9-]+) (.*?)(?=^  --|^\S|\Z)", page, re.MULTILINE | re.DOTALL))
    assert entries.keys() == {flag(name) for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        entry = " ".join(entries[flag(name)].split())
        assert field.description
        assert " ".join(field.description.split()) in entry
        if field.default not in (None, ()):
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert entry.endswith(f"[{default}]")
    assert "CONVEYOR_MAX_SESSIONS" in page
    example = re.search(r"\((max_sessions = \d+)\)", page)
    assert example is not None
    assert tomllib.loads(example[1])


def test_what_is_to_be_tuned() -> None:
    """The settings of a server, more time, fewer logs, and one model or every one."""
    usual = Settings(tune_s=5.0, log_level="warning")
    assert load_tune([], {}) == (usual, None)
    environ = {"CONVEYOR_THREADS": "2", "CONVEYOR_TUNE_S": "9"}
    settings, model = load_tune(["--model", "lstm", "--tune-s", "1", "--log-level", "info"], environ)
    assert (settings, model) == (Settings(threads=2, tune_s=1.0), "lstm")


@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_server_that_measures_nothing_may_be_tuned(tmp_path: Path, source: str) -> None:
    """What it is told of its loads is no word on what is asked for here."""
    (tmp_path / "server.toml").write_text("tune_s = 0")
    argv = ["--config", str(tmp_path / "server.toml")] if source == "file" else []
    settings, _ = load_tune(argv, {} if source == "file" else {"CONVEYOR_TUNE_S": "0"})
    assert settings.tune_s == 5.0


def test_the_help_of_tune(capsys: pytest.CaptureFixture[str]) -> None:
    """Has a page of its own, with its own defaults; mistakes are told under its name."""
    with pytest.raises(SystemExit) as ended:
        load_tune(["--help"], {})
    assert ended.value.code == 0
    page = capsys.readouterr().out
    assert "--model NAME" in page
    assert "[5]" in page[page.index("  --tune-s") : page.index("  --cache-dir")]
    for given, said in (
        ("-1", "expected seconds greater than or equal to 0"),
        ("0", "in 0 seconds nothing is measured"),
    ):
        with pytest.raises(SystemExit) as ended:
            load_tune(["--tune-s", given], {})
        assert ended.value.code == 2
        assert f"python -m service tune: error: --tune-s: {said}" in capsys.readouterr().err
