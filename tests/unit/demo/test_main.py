"""What can go wrong in a demo is told in a line."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

import demo.__main__ as program
from conveyor import ConnectionLost
from demo.results import Results
from demo.server import ServerFailed
from export import VerificationFailed


@pytest.mark.parametrize(
    "failure",
    [
        VerificationFailed("the largest error is [3e-6], over the bound of 2e-06"),
        ServerFailed("the server ended with status 1"),
        ConnectionLost("the connection broke"),
        OSError("no space left on device"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failure_is_a_line(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 and the reason on standard error, as it is, without a traceback."""

    def fail(folder: Path) -> Results:
        raise failure

    monkeypatch.setattr(program, "_run", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path)])
    assert program.main() == 1
    assert capsys.readouterr().err.split() == f"The demo failed: {failure}".split()
