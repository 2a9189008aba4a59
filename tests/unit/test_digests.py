"""Checksums of a checkpoint are computed beside the start, and are those of the files as they are when it is opened."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distloop.ranks import digests as module
from distloop.ranks.digests import Digests
from distloop.run.checkpoint import Snapshot, Weights, digest, newest_good, publish


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(thread, file) of each that was read."""
    found: list[tuple[str, str]] = []
    real = module._digest

    def reading(path: Path) -> tuple[tuple[int, ...], str]:
        found.append((threading.current_thread().name, path.name))
        return real(path)

    monkeypatch.setattr(module, "_digest", reading)
    return found


def checkpoint(folder: Path, step: int = 10, **contents: bytes) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


def wait_for(digests: Digests) -> None:
    for thread in threading.enumerate():
        if thread.name == "checksums":
            thread.join(30)
    assert not digests._left


def test_the_files_of_the_newest_checkpoint_are_read_once_and_beside_the_rest(
    tmp_path: Path, read: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 7)
    checkpoint(tmp_path, 9, other=b"older")
    (tmp_path / ".writing_step_00000020").mkdir()
    (tmp_path / "step_x").mkdir()
    path = checkpoint(tmp_path, 10, model=b"weights" * 100, optimizer=b"", state=b"s")
    digests = Digests()
    digests.begin(tmp_path)
    wait_for(digests)
    for file in path.iterdir():
        assert digests.of(file) == hashlib.sha256(file.read_bytes()).hexdigest() == digest(file)
    assert sorted(read) == [("checksums", "model"), ("checksums", "optimizer"), ("checksums", "state")]


@pytest.mark.parametrize("how", ["flipped", "replaced", "backdated"])
def test_a_file_that_changes_after_it_was_read_is_read_again(tmp_path: Path, how: str) -> None:
    path = checkpoint(tmp_path, model=b"weights") / "model"
    digests, before = Digests(), path.stat()
    digests.begin(tmp_path)
    wait_for(digests)
    if how == "replaced":
        (tmp_path / "other").write_bytes(b"WEIGHTS")
        (tmp_path / "other").replace(path)
    else:
        path.write_bytes(b"WEIGHTS")
    if how != "flipped":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of(path) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_file_that_is_being_read_is_waited_for_and_another_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, a=b"first", b=b"second")
    real: Callable[[Path], tuple[tuple[int, ...], str]] = module._digest
    is_there, go_on = threading.Event(), threading.Event()
    read: list[str] = []

    def reading(file: Path) -> tuple[tuple[int, ...], str]:
        read.append(file.name)
        if threading.current_thread().name == "checksums":
            is_there.set()
            assert go_on.wait(30)
        return real(file)

    monkeypatch.setattr(module, "_digest", reading)
    digests = Digests()
    digests.begin(tmp_path)
    assert is_there.wait(30)
    assert digests.of(path / "b") == digest(path / "b")  # by this thread, since the other one is at the first file
    go_on.set()
    assert digests.of(path / "a") == digest(path / "a")
    wait_for(digests)
    assert sorted(read) == ["a", "b"]


def test_what_cannot_be_read_is_met_by_whoever_asks(tmp_path: Path) -> None:
    digests = Digests()
    digests.begin(tmp_path / "nowhere")
    (checkpoint(tmp_path) / "folder").mkdir()
    digests.begin(tmp_path)
    wait_for(digests)
    with pytest.raises(OSError, match="Is a directory"):
        digests.of(tmp_path / "step_00000010" / "folder")
    with pytest.raises(FileNotFoundError):
        digests.of(tmp_path / "step_00000010" / "nothing")


def test_a_damaged_checkpoint_is_passed_over_as_if_it_were_read_then(tmp_path: Path) -> None:
    snapshot = Snapshot({"model": Weights({"weight": torch.ones(9)}, {})}, {"optimizer": {}}, {"step": 1}, {})
    older, newest = (publish(tmp_path, step, snapshot) for step in (1, 2))
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    digests = Digests()
    digests.begin(tmp_path)
    assert newest_good(tmp_path, digests.of) == newest_good(tmp_path)
    assert newest_good(tmp_path, digests.of)[0] == older
