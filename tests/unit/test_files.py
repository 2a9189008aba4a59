"""Small files of a run directory: the old or the new text, never a part, also after the machine has lost its power."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distloop.run import files


def events_of_writing(path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool) -> list[str]:
    """What happens while a text is written, in order."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced_file(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).read_text()}")
        sync(descriptor)

    def replaced(source: Path, target: Path) -> Path:
        events.append(f"rename over {target.read_text()}")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced_file)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write_text(path, "new", synced)
    return events


def test_a_text_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    assert events_of_writing(path, monkeypatch, synced=True) == ["sync new", "rename over old"]
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    assert path.read_text() == "new"


def test_what_is_written_often_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "time.json"
    path.write_text("old")
    assert events_of_writing(path, monkeypatch, synced=False) == ["rename over old"]


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    assert path.read_text() == "old"
