"""The end of a run: what comes after the last step has a limit, and is said where it takes long."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from distloop.config.settings import Checkpoint
from distloop.run import saving
from distloop.tracking import trackers
from tests.tools.ranks import wait_until

RUN = Path("runs/x")


def python(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


def wait_for(report: subprocess.Popen[bytes]) -> tuple[str, list[str]]:
    said: list[str] = []
    return trackers.drawn(report, RUN, lambda: None, said.append), said


def test_a_report_that_is_soon_there_is_one_line() -> None:
    assert wait_for(python("")) == (f"  report: {RUN / 'report.html'}", [])


def test_a_report_that_takes_long_is_said_once_and_one_that_takes_too_long_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "REPORT_SECONDS", 1.0)
    report = python("import signal; signal.pause()")
    line, said = wait_for(report)
    assert said == ["  the report is being drawn: 1 s at most"]
    assert line.startswith("distloop: WARNING: the report was not written (not ready after 1 s); `distloop report")
    assert report.wait(30) < 0


def test_a_report_that_fails_gives_its_last_line() -> None:
    line, said = wait_for(python("print('first'); print('no font'); raise SystemExit(1)"))
    assert line.startswith("distloop: WARNING: the report was not written (no font); ")
    assert not said


@pytest.mark.parametrize("takes_long", [False, True])
def test_the_wait_for_the_last_checkpoint_is_said_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, takes_long: bool
) -> None:
    if takes_long:
        monkeypatch.setattr(saving, "SILENT_SECONDS", 0.01)
    said: list[str] = []
    watch = SimpleNamespace(say=said.append)
    saver = saving.Saver(RUN, Checkpoint(), {}, watch, lambda step, best: None, enabled=True)  # type: ignore[arg-type]
    written = threading.Event()
    saver.thread = threading.Thread(target=written.wait if takes_long else written.set, daemon=True)
    saver.thread.start()
    ending = threading.Thread(target=saver.finish, daemon=True)
    ending.start()
    if takes_long:
        wait_until(lambda: said, "the line")
        written.set()
    ending.join(30)
    assert not ending.is_alive()
    assert said == (["the last checkpoint is being written; the run ends when it is whole"] if takes_long else [])
