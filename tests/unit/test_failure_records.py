"""The files of failures/: whole at any time, and gone when they have served."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distloop.run import failures
from distloop.run.failures import FailureRecords
from tests.tools.ranks import clean_environment, wait_until

TABLE = [{"rank": rank, "node": "n" * 20, "pid": 7, "step": 5, "phase": "x", "line": ""} for rank in range(64)]


def test_two_threads_that_write_at_once_publish_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "RANKS_SECONDS", 0.0)
    records = FailureRecords(tmp_path, 1, 0)
    records.write_ranks(TABLE)
    until = time.monotonic() + 2  # with two threads and no lock, one reading in 30 was torn
    errors: list[BaseException] = []

    def write() -> None:
        try:
            while time.monotonic() < until:
                records.write_ranks(TABLE)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=write) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            assert json.loads((tmp_path / "ranks.json").read_text())["ranks"] == TABLE
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert errors == []


def test_where_the_ranks_are_is_written_now_and_then_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "RANKS_SECONDS", 0.2)
    records = FailureRecords(tmp_path, 1, 0)

    def steps() -> list[int]:
        return [there["step"] for there in json.loads((tmp_path / "ranks.json").read_text())["ranks"]]

    begun = time.monotonic()
    records.write_ranks([{"step": 1}])
    records.write_ranks([{"step": 2}])
    assert steps() == [1] or time.monotonic() - begun > 0.2

    def written() -> bool:
        records.write_ranks([{"step": 3}])
        return steps() == [3]

    wait_until(written, "the next time")
    records.close()
    records.write_ranks([{"step": 4}])  # by a thread that has not heard of the end
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_kept_with_the_number_of_the_attempt_first(tmp_path: Path) -> None:
    records = FailureRecords(tmp_path, 3, 0)
    records.keep({"rank": 1})
    records.close()
    record = json.loads((tmp_path / "attempt_0003.json").read_text())
    assert list(record) == ["attempt", "written", "rank"]
    assert (record["attempt"], record["rank"]) == (3, 1)


CRASH = """
import ctypes, pathlib, sys
from distloop.run.failures import FailureRecords
records = FailureRecords(pathlib.Path(sys.argv[1]), 2, 1)
records.open()
if sys.argv[2] == "crash":
    ctypes.string_at(0)
if sys.argv[2] == "close":
    records.close()
"""


def run(folder: Path, how: str) -> int:
    command: list[Any] = [sys.executable, "-c", CRASH, folder, how]
    return subprocess.run(command, env=clean_environment(), stderr=subprocess.DEVNULL, check=False).returncode


def test_a_crash_in_native_code_leaves_its_stack(tmp_path: Path) -> None:
    assert run(tmp_path, "crash") < 0
    records = FailureRecords(tmp_path, 2, 0)
    report = records.crash_report(1)
    assert report.startswith("Fatal Python error: Segmentation fault")
    assert "Extension modules" not in report
    records.close()
    assert [path.name for path in tmp_path.iterdir()] == ["crash_0002_rank_00001.txt"]  # it says what happened


@pytest.mark.parametrize(("how", "left"), [("close", 0), ("end", 1)])
def test_the_file_of_a_rank_that_did_not_crash_is_removed(tmp_path: Path, how: str, left: int) -> None:
    assert run(tmp_path, how) == 0
    assert len(list(tmp_path.iterdir())) == left
    records = FailureRecords(tmp_path, 2, 0)
    assert records.crash_report(1) == ""
    records.close()  # of a rank that was killed
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_ends_nothing(tmp_path: Path) -> None:
    records = FailureRecords(tmp_path / "is" / "not" / "there", 1, 0)
    records.open()
    records.keep({})
    records.write_ranks(TABLE)
    assert records.crash_report(1) == ""
    records.close()
