"""A data set that opens, with the first sample, all that a process must not share with its copies."""

from __future__ import annotations

import os
import queue
import sqlite3
import struct
import threading
import zipfile
from pathlib import Path

import torch

ROWS, WIDTH = 96, 16
NUMBERS = struct.Struct(f"{WIDTH}d")


def write_files(folder: Path) -> None:
    """Row i of each file holds the number i."""
    rows = [NUMBERS.pack(*[row] * WIDTH) for row in range(ROWS)]
    (folder / "rows.bin").write_bytes(b"".join(rows))
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        for row, contents in enumerate(rows):
            archive.writestr(str(row), contents)
    with sqlite3.connect(folder / "rows.db") as database:
        database.execute("create table rows (number integer primary key, contents blob)")
        database.executemany("insert into rows values (?, ?)", enumerate(rows))


class Handles:
    """What is open in one process: each read() gives the contents of a row."""

    def __init__(self, folder: Path) -> None:
        self.process = os.getpid()
        with open(folder / "opened", "a") as file:
            file.write(f"{self.process}\n")
        os.register_at_fork(before=lambda: self._note(folder))
        self.descriptor = os.open(folder / "rows.bin", os.O_RDONLY)  # as h5py and LMDB keep one: the position is shared
        self.file = open(folder / "rows.bin", "rb")  # noqa: SIM115 - it stays open
        self.archive = zipfile.ZipFile(folder / "rows.zip")
        self.database = sqlite3.connect(folder / "rows.db")
        self.lock = threading.Lock()
        self.asked: queue.Queue[int] = queue.Queue()
        self.answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._answer, daemon=True).start()  # as gRPC's and a prefetcher's

    def _note(self, folder: Path) -> None:
        if os.getpid() == self.process:
            (folder / f"forked-{self.process}").touch()

    def _answer(self) -> None:
        with open(self.file.name, "rb") as file:
            while True:
                file.seek(self.asked.get() * NUMBERS.size)
                self.answers.put(file.read(NUMBERS.size))

    def read(self, row: int) -> dict[str, bytes]:
        os.lseek(self.descriptor, row * NUMBERS.size, os.SEEK_SET)
        self.file.seek(row * NUMBERS.size)
        self.asked.put(row)
        assert self.lock.acquire(timeout=10), "the lock is held by a process that this one is a copy of"
        found = {
            "descriptor": os.read(self.descriptor, NUMBERS.size),
            "file": self.file.read(NUMBERS.size),
            "zipfile": self.archive.read(str(row)),
            "sqlite3": self.database.execute("select contents from rows where number = ?", (row,)).fetchone()[0],
            "thread": self.answers.get(timeout=10),
        }
        self.lock.release()
        return found


class Rows:
    def __init__(self, folder: Path, rows: range) -> None:
        self.folder, self.rows = folder, rows
        self.handles: Handles | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.handles is None:
            self.handles = Handles(self.folder)
        row = self.rows[index]
        assert self.handles.process == os.getpid(), "it is a copy of a process that had loaded a sample"
        for kind, contents in self.handles.read(row).items():
            assert NUMBERS.unpack(contents) == (float(row),) * WIDTH, f"{kind}: not the row that was asked for"
        return torch.full((WIDTH,), row / ROWS), row % 3


def make_data(root: str) -> tuple[Rows, Rows]:
    return Rows(Path(root), range(ROWS - 16)), Rows(Path(root), range(ROWS - 16, ROWS))
