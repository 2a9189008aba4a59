"""A store of pictures that `distloop pack` has made: their pixels, in files that are mapped into memory.

packed.json: what the store holds; train.npy, val.npy: label, height and width of each picture; train/00000.bin and so
on: the pixels of PART pictures, one after the other, uint8 [height, width, 3]; train.names.json: the pictures' files.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distloop.errors import UsageError

FORMAT, PART = 1, 512
STORE, BEGUN = "packed.json", "packing.json"  # the second one until all is packed
HALVES = ("train", "val")


class Part(NamedTuple):
    """One file of pixels."""

    size: int  # bytes
    sha256: str


class Store(NamedTuple):
    """What packed.json says."""

    folder: Path
    size: int  # pixels of the shorter side, at most
    classes: tuple[str, ...]
    parts: dict[str, list[Part]]  # by half
    rows: dict[str, str]  # by half: the SHA-256 of its labels, heights and widths


def read_store(folder: Path) -> Store:
    """What the store in the folder holds. Raises UsageError if there is none, or it cannot be read."""
    file = folder / STORE
    if (folder / BEGUN).exists() and not file.exists():
        raise UsageError(f"{folder} is not packed to its end. The command that began it goes on: distloop pack …")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"data.name = 'packed': {file} is not there. Make a store of a folder of pictures with `distloop pack "
            "SOURCE DEST --size 256`, and point --data.root to DEST."
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({type(error).__name__}: {error}). Pack the pictures again.") from None
    if stored.get("format") != FORMAT:
        raise UsageError(
            f"{file} has the format {stored.get('format')}, and this version of distloop reads {FORMAT}. Pack the "
            "pictures again, or use the version that packed them."
        )
    parts = {half: [Part(*each) for each in stored["parts"][half]] for half in HALVES}
    return Store(folder, stored["size"], tuple(stored["classes"]), parts, stored["rows"])


def refuse_larger(store: Store, sizes: dict[str, int]) -> None:
    """Raise ValueError for arguments, in pixels by their names, that ask for more than the store has."""
    for name, value in sizes.items():
        if value > store.size:
            raise ValueError(
                f"{name} is {value}, and the pictures of {store.folder} were packed to {store.size} pixels. Give "
                f"{store.size} at most, or pack them with --size {value}"
            )


def part_file(folder: Path, half: str, number: int) -> Path:
    return folder / half / f"{number:05}.bin"


def digest_of(rows: Any) -> str:
    """The SHA-256 of labels, heights and widths: int32, [pictures, 3]."""
    return hashlib.sha256(np.ascontiguousarray(rows, "<i4").tobytes()).hexdigest()


class Packed(Dataset):
    """One half of a store. A sample is (picture, label): uint8 [3, height, width], as `transform` has changed it.

    Of a picture that is cropped, only the rows that are used are read from the disk.
    """

    def __init__(self, store: Store, half: str, transform: Callable[[Tensor], Any]) -> None:
        """Raises UsageError if a file is not there, or has another size than it was packed with."""
        self.folder, self.half, self.transform = store.folder.resolve(), half, transform
        self.classes, self.parts = store.classes, store.parts[half]
        self.rows = self._read_rows(store.rows[half])
        sizes = 3 * self.rows[:, 1].astype(np.int64) * self.rows[:, 2]
        ends = np.cumsum(sizes)
        before = ends - sizes
        self.starts = before - before[np.arange(len(sizes)) // PART * PART]  # within the part
        for number, part in enumerate(self.parts):
            file = part_file(self.folder, half, number)
            found = file.stat().st_size if file.exists() else None
            if found != part.size:
                has = "is not there" if found is None else f"has {found:,} bytes instead of {part.size:,}"
                raise UsageError(f"{file} {has}. Copy the store anew, or pack the pictures again.")
        self.mapped: dict[int, Tensor] = {}  # once a sample was asked for, in each process for itself

    def _read_rows(self, expected: str) -> Any:
        file = self.folder / f"{self.half}.npy"
        try:
            rows = np.load(file)
            if digest_of(rows) == expected:
                return rows
            problem = "it is another one than was packed"
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file} cannot be used ({problem}). Copy the store anew, or pack the pictures again.")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": {}}  # loader processes get names, not pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label, height, width = self.rows[index].tolist()
        number, start = index // PART, int(self.starts[index])
        if number not in self.mapped:
            file = part_file(self.folder, self.half, number)
            # The file is closed again: there may be more of them than a process may have open.
            self.mapped[number] = torch.from_file(
                str(file), shared=False, size=self.parts[number].size, dtype=torch.uint8
            )
        pixels = self.mapped[number][start : start + 3 * height * width]
        picture = self.transform(pixels.view(height, width, 3).permute(2, 0, 1))
        # Who changes a sample in place must not change the picture for the epochs to come.
        return picture.clone() if _same_memory(picture, pixels) else picture, label

    @property
    def digest(self) -> str:
        """Changes with the data: made of the checksums of all files."""
        return hashlib.sha256(json.dumps([digest_of(self.rows), self.parts]).encode()).hexdigest()


def _same_memory(picture: Any, pixels: Tensor) -> bool:
    return isinstance(picture, Tensor) and picture.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr()
