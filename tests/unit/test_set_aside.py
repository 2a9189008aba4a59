"""Rows of steps that are done again leave metrics.jsonl, which is read from its end: as if it had been read whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.run import files as files_module
from distloop.run import set_aside
from distloop.run.set_aside import lines_from_end, set_rows_aside


def read_whole(path: Path, step: int, is_validated: bool) -> tuple[bytes, bytes]:
    """(what stays in the file, what is set aside), by looking at every line of it."""
    stays, aside = b"", b""
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            is_redone = row["step"] > step or (
                row["step"] == step and row.get("kind") == "validate" and not is_validated
            )
        except (ValueError, KeyError, TypeError):
            is_redone = True
        if is_redone:
            aside += line + b"\n"
        else:
            stays += line + b"\n"
    return stays, aside


words = st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.floats() | st.none(), max_size=2)
long_words = words | words | st.builds(lambda n: {"long": "ü" * n}, st.integers(0, 300))
kinds = st.sampled_from(["train", "epoch", "validate", "figure"])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A metrics.jsonl as attempts leave it: in the order of steps, damaged lines here and there, the last one cut."""
    rows = sorted(draw(st.lists(st.tuples(st.integers(0, 6), kinds, long_words), max_size=14)), key=lambda row: row[0])
    lines = [
        json.dumps(
            {**more, "kind": kind, "step": step, "attempt": 1 + step // 3, "time": number},
            ensure_ascii=draw(st.booleans()),
        )
        for number, (step, kind, more) in enumerate(rows)
    ]
    lines = [line for line in lines if len(line.splitlines()) == 1]  # Python's, which U+2028 ends as well
    for damaged in draw(
        st.lists(st.sampled_from(["", "null", "7", "[1]", '{"step": "x"}', '{"kind": "tr']), max_size=2)
    ):
        lines.insert(draw(st.integers(0, len(lines))), damaged)
    content = "".join(line + "\n" for line in lines).encode()
    return content[: len(content) - draw(st.integers(0, 30))] if draw(st.booleans()) else content


@settings(derandomize=True, deadline=None, max_examples=200)
@given(files(), st.integers(0, 7), st.booleans(), st.sampled_from([1, 7, 64, 1 << 18]))
def test_what_is_set_aside_is_what_reading_the_whole_file_finds(
    content: bytes, step: int, is_validated: bool, block: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_aside, "BLOCK_BYTES", block)
        patch.setattr(files_module, "sync", lambda path: None)  # what takes time here
        patch.setattr(set_aside, "sync", lambda path: None)
        path, aside = Path(folder) / "metrics.jsonl", Path(folder) / "metrics.set_aside.jsonl"
        path.write_bytes(content)
        aside.write_bytes(b'{"step": 9}\n')
        stays, moved = read_whole(path, step, is_validated)
        assert set_rows_aside(path, step, is_validated) == moved.count(b"\n")
        assert (path.read_bytes(), aside.read_bytes()) == (stays, b'{"step": 9}\n' + moved)
        assert set_rows_aside(path, step, is_validated) == 0
        assert len(list(Path(folder).iterdir())) == 2


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([1, 2, 5, 1 << 18]))
def test_lines_from_the_end_are_the_lines_with_their_places(content: bytes, block: int) -> None:
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_aside, "BLOCK_BYTES", block)
        file.write(content)
        found = list(lines_from_end(file))
        assert b"".join(line for _, line in reversed(found)) == content
        assert all(content[begin : begin + len(line)] == line for begin, line in found)
        assert all(b"\n" not in line[:-1] for _, line in found)


def row(step: int, **more: Any) -> bytes:
    return json.dumps({"kind": "train", "step": step, "time": 1000 + step, **more}).encode() + b"\n"


def train_rows(last: int) -> bytes:
    return b"".join(map(row, range(1, last + 1)))


@pytest.mark.parametrize("end", [b"", b'{"kind": "tr'], ids=["whole", "torn"])
@pytest.mark.parametrize("late", [b"", row(2, kind="figure")], ids=["in order", "late"])
def test_a_start_that_was_killed_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, late: bytes
) -> None:
    """It had added the first bytes to the one file, and not yet cut the other."""
    monkeypatch.setattr(set_aside, "sync", lambda path: None)  # what takes time here
    monkeypatch.setattr(files_module, "sync", lambda path: None)
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.set_aside.jsonl"
    before, content = row(3, attempt=1) + row(4, attempt=1), train_rows(4) + late + row(5) + end
    path.write_bytes(content)
    stays, moved = read_whole(path, 2, True)
    for added in range(len(moved) + 1):
        path.write_bytes(content)
        aside.write_bytes(before + moved[:added])
        assert set_rows_aside(path, 2) == moved.count(b"\n")
        assert path.read_bytes() == stays
        assert aside.read_bytes() == before + moved, f"killed after {added} bytes"


@pytest.mark.parametrize("late", [b"", row(2, kind="figure")], ids=["in order", "late"])
def test_rows_are_on_the_disk_in_one_file_before_they_leave_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bytes
) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.set_aside.jsonl"
    path.write_bytes(train_rows(4) + late)
    content, (_, moved) = path.read_bytes(), read_whole(path, 2, True)
    real, synced = files_module.sync, []

    def sync(file: Path) -> None:
        synced.append((file.name, path.read_bytes() == content, aside.read_bytes() == moved))
        real(file)

    monkeypatch.setattr(set_aside, "sync", sync)
    set_rows_aside(path, 2)
    assert synced[0] == ("metrics.set_aside.jsonl", True, True)
    assert path.read_bytes() != content


def test_rows_that_were_logged_late_are_found_and_no_row_far_in_front_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(set_aside, "MARGIN", 10 * len(row(1000)))
    monkeypatch.setattr(set_aside, "BLOCK_BYTES", 1000)
    path.write_bytes(train_rows(1000) + row(1003) + row(999) + row(998) + row(1002) + row(990) * 5)
    looked_at: list[int] = []
    real: Callable[[bytes], Any] = set_aside._row

    def look(line: bytes) -> Any:
        looked_at.append(len(line))
        return real(line)

    monkeypatch.setattr(set_aside, "_row", look)
    assert set_rows_aside(path, 1000) == 2
    assert path.read_bytes() == train_rows(1000) + row(999) + row(998) + row(990) * 5
    assert len(looked_at) < 40


def test_a_row_that_lacks_its_last_character_gets_it_and_the_next_one_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(train_rows(2)[:-1])
    assert set_rows_aside(path, 2) == 0
    assert path.read_bytes() == train_rows(2)


def test_a_long_file_is_neither_held_nor_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    path = tmp_path / "metrics.jsonl"
    many = train_rows(20_000)
    path.write_bytes(many * 20 + row(30_000))  # 26 MB
    before = path.stat().st_ino
    tracemalloc.start()
    try:
        assert set_rows_aside(path, 20_000) == 1
        assert tracemalloc.get_traced_memory()[1] < 3 * set_aside.MARGIN
    finally:
        tracemalloc.stop()
    assert path.stat().st_ino == before
    assert path.stat().st_size == 20 * len(many)
    shutil.rmtree(tmp_path)
