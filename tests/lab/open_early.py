"""Data sets that open their files when they are made, before loader processes start."""

from __future__ import annotations

import mmap
import os
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.lab.handles import NUMBERS, ROWS, WIDTH, write_files

Read = Callable[[int], bytes]


def write_all(folder: Path) -> None:
    write_files(folder)
    numbers = np.repeat(np.arange(ROWS, dtype=np.float64)[:, None], WIDTH, 1)
    np.savez(folder / "rows.npz", **{str(row): numbers[row] for row in range(ROWS)})
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for row in numbers:
            member = tarfile.TarInfo(str(int(row[0])))
            member.size = NUMBERS.size
            archive.addfile(member, BytesIO(row.tobytes()))
    for row in range(ROWS):
        noise = np.random.default_rng(row).integers(0, 256, (256, 256), np.uint8)  # too large for a buffer
        noise[0, 0] = row
        Image.fromarray(noise).save(folder / f"{row}.png")


# ---- what has one position for all: rows get mixed up ----------------------------------------------------------------


def a_file(folder: Path) -> Read:
    file = open(folder / "rows.bin", "rb")  # noqa: SIM115 - it stays open, as all others here
    file.read()  # to its end, where a small file's sample would leave it, too
    return lambda row: (file.seek(row * NUMBERS.size), file.read(NUMBERS.size))[1]


def a_descriptor(folder: Path) -> Read:
    number = os.open(folder / "rows.bin", os.O_RDONLY)
    return lambda row: (os.lseek(number, row * NUMBERS.size, os.SEEK_SET), os.read(number, NUMBERS.size))[1]


def a_descriptor_that_is_read_whole(folder: Path) -> Read:
    number = os.open(folder / "rows.bin", os.O_RDONLY)
    size = NUMBERS.size

    def read(row: int) -> bytes:
        os.lseek(number, 0, os.SEEK_SET)
        return os.read(number, 1 << 20)[row * size : (row + 1) * size]

    read(0)  # each load leaves the position where this one does
    return read


def a_zip_file(folder: Path) -> Read:
    archive = zipfile.ZipFile(folder / "rows.zip")
    return lambda row: archive.read(str(row))


def a_tar_file(folder: Path) -> Read:
    archive = tarfile.open(folder / "rows.tar")  # noqa: SIM115
    return lambda row: archive.extractfile(str(row)).read()  # type: ignore[union-attr]


def an_npz_file(folder: Path) -> Read:
    arrays = np.load(folder / "rows.npz")
    return lambda row: arrays[str(row)].tobytes()


def pictures(folder: Path) -> Read:
    opened = [Image.open(folder / f"{row}.png") for row in range(ROWS)]  # the pixels are read later
    return lambda row: np.full(WIDTH, np.asarray(opened[row])[0, 0], np.float64).tobytes()


SHARED = [a_file, a_descriptor, a_descriptor_that_is_read_whole, a_zip_file, a_tar_file, an_npz_file, pictures]


# ---- what is open and has none, or is not read: all of it works ------------------------------------------------------


def a_map_of_a_file(folder: Path) -> Read:
    file = open(folder / "rows.bin", "rb")  # noqa: SIM115
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return lambda row: (mapped[row * NUMBERS.size : (row + 1) * NUMBERS.size], file.closed)[0]


def a_map_of_numpy(folder: Path) -> Read:
    mapped = np.memmap(folder / "rows.bin", np.float64, "r", shape=(ROWS, WIDTH))
    return lambda row: mapped[row].tobytes()


def a_place_for_each_read(folder: Path) -> Read:
    number = os.open(folder / "rows.bin", os.O_RDONLY)
    return lambda row: os.pread(number, NUMBERS.size, row * NUMBERS.size)


def a_database(folder: Path) -> Read:
    database = sqlite3.connect(folder / "rows.db")
    question = "select contents from rows where number = ?"
    return lambda row: database.execute(question, (row,)).fetchone()[0]


def a_log(folder: Path) -> Read:
    log, numbers = open(folder / "a.log", "w"), np.fromfile(folder / "rows.bin")  # noqa: SIM115
    return lambda row: (print(row, file=log, flush=True), numbers[row * WIDTH : (row + 1) * WIDTH].tobytes())[1]


def a_file_of_each_process(folder: Path) -> Read:
    """What a careful user does: see whether the process is another one, and open the file anew."""
    file, process = open(folder / "rows.bin", "rb"), os.getpid()  # noqa: SIM115

    def read(row: int) -> bytes:
        nonlocal file, process
        if process != os.getpid():
            file.close()  # its number is the new one's
            file, process = open(folder / "rows.bin", "rb"), os.getpid()  # noqa: SIM115
        file.seek(row * NUMBERS.size)
        return file.read(NUMBERS.size)

    return read


def a_file_that_was_read(folder: Path) -> Read:
    file = open(folder / "rows.bin", "rb")  # noqa: SIM115
    contents = file.read()
    return lambda row: (contents[row * NUMBERS.size : (row + 1) * NUMBERS.size], file.closed)[0]


FINE = [
    *(a_map_of_a_file, a_map_of_numpy, a_place_for_each_read, a_database, a_log),
    *(a_file_of_each_process, a_file_that_was_read),
]


class Rows:
    """Row i holds the number i, once read at the right place."""

    def __init__(self, read: Read, rows: range) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        values = torch.frombuffer(bytearray(self.read(row)), dtype=torch.float64).float()
        if len(values) != WIDTH or set(values.tolist()) != {float(row)}:
            (Path(os.environ["MIXED_UP"]) / "mixed-up").touch()
        return torch.full((WIDTH,), float(values[0]) / ROWS), row % 3


def make_data(root: str, kind: str) -> tuple[Rows, Rows]:
    read = globals()[kind](Path(root))
    return Rows(read, range(ROWS - 16)), Rows(read, range(ROWS - 16, ROWS))
