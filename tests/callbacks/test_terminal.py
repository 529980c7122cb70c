"""A terminal that cannot take what dynwatch prints does not end a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import runs

from dynwatch.callbacks import DynWatch
from dynwatch.callbacks.terminal import terminal


class Broken(io.StringIO):
    """A pipe whose reader has gone, or a full disk."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError("reader has gone"), OSError("no space left")])
@pytest.mark.parametrize("bad_at", [None, 3])
def test_a_broken_terminal_leaves_a_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, bad_at: int | None
) -> None:
    """Neither the report nor the panel of a verdict raises when standard output does."""
    monkeypatch.setattr("sys.stdout", Broken(error))
    watch = DynWatch()
    fit = runs.trainer(tmp_path, [watch])
    fit.fit(runs.Classifier(bad_at=bad_at), runs.data())
    assert fit.global_step == (16 if bad_at is None else bad_at + 1)
    assert (watch.verdict is None) == (bad_at is None)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_gets_a_plain_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """The whole report is there, with its curves in plain characters."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    runs.trainer(tmp_path, [DynWatch()]).fit(runs.Classifier(), runs.data())
    text = written.getvalue().decode(encoding)
    (row,) = (line for line in text.splitlines() if "stop/loss " in line)
    assert "#" in row
    assert "?" not in row
    assert "Verdict: nothing to object to." in text


def test_what_fails_while_it_is_drawn_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An error in the report itself is named, and goes no further."""
    with terminal():
        raise ValueError("no such row")
    assert "could not print to the terminal: ValueError: no such row. The run goes on." in caplog.text
