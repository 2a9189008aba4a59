"""metrics.jsonl where the disk is full, and where an attempt begins anew."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distloop.run.metrics import MetricsFile
from distloop.run.set_aside import set_aside_until, set_rows_aside


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_row_is_in_the_file_when_it_was_logged_and_holds_no_number_that_json_lacks(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log({"step": 1, "loss": float("nan"), "norm": float("inf"), "lr": 0.5, "kind": "train"})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "norm": None, "lr": 0.5, "kind": "train"}
    file.close()


@pytest.mark.parametrize("room", [0, 5, 20])
def test_rows_that_find_no_room_wait_for_the_next_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log({"step": 1})
    with room_for(path.stat().st_size + room - 1):  # a part of a row, but not a whole one
        for step in (2, 3, 4):
            file.log({"step": step, "text": "long enough for this"})
            assert rows(path) == [1], "a torn row is no row"
            assert path.read_bytes().endswith(b"\n")
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert str(path) in said
    file.log({"step": 5})
    assert rows(path) == [1, 2, 3, 4, 5]
    file.close()
    assert capsys.readouterr().out == ""


def test_a_second_time_without_room_is_said_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 3):
        with room_for(path.stat().st_size):
            file.log({"step": step})
        assert capsys.readouterr().out.count("wait in memory") == 1
        file.log({"step": step + 1})
    assert rows(path) == [1, 2, 3, 4]
    file.close()


def test_rows_that_never_found_room_are_counted_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    file = MetricsFile(Path("/dev/full"))
    for step in (1, 2, 3):
        file.log({"step": step})
    file.close()
    said = capsys.readouterr().out
    assert said.count("wait in memory") == 1
    assert "3 rows could not be written to /dev/full" in said


def test_a_second_attempt_adds_to_the_rows_of_the_first(tmp_path: Path) -> None:
    for step in (1, 2):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.log({"step": step})
        file.close()
    assert rows(tmp_path / "metrics.jsonl") == [1, 2]


def test_rows_beyond_a_step_and_torn_ones_are_set_aside_and_those_of_earlier_times_stay_there(tmp_path: Path) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.set_aside.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\nnull\n{"other": 1}\n{"ste')
    assert set_rows_aside(path, 2) == 4
    assert rows(path) == [1, 2]
    assert aside.read_text() == '{"step": 3}\nnull\n{"other": 1}\n{"ste\n'
    assert set_rows_aside(path, 1) == 1
    assert rows(path) == [1]
    assert aside.read_text().splitlines()[-1] == '{"step": 2}'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.set_aside.jsonl"]


def test_the_row_before_the_first_step_is_set_aside_like_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "kind": "validate"}\n{"step": 1}\n')
    assert set_aside_until(path) == -1
    assert set_rows_aside(path, 0, is_validated=True) == 1
    assert rows(path) == [0]
    assert set_rows_aside(path, 0, is_validated=False) == 1
    assert (rows(path), set_aside_until(path)) == ([], 1)


def test_where_nothing_is_to_be_set_aside_nothing_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert set_rows_aside(path, 3) == 0
    path.write_text('{"step": 1}\n')
    before = path.stat().st_mtime_ns
    assert set_rows_aside(path, 1) == 0
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
