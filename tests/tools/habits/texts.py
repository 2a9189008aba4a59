"""Pieces of code that people write: forms of samples and batches, data sets, and the imports that all of them need."""

from __future__ import annotations

IMPORTS = """\
import os
import random
import sqlite3
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split

from distloop.data import DataSource, InMemory
from distloop.tasks import Task

HERE = Path(__file__).parent


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Row:
    x: Any
    y: Any


@dataclass
class Outputs:
    scores: Any
    hidden: Any
"""

# How a sample, or a batch, is made of x and y.
MADE = {
    "tuple": "x, y",
    "list": "[x, y]",
    "dict": '{"inputs": x, "targets": y}',
    "own dict": '{"x": x, "y": y, "name": "some text"}',
    "named tuple": "Pair(x, y)",
    "dataclass": "Row(x, y)",
    "nested": '{"inputs": x, "labels": {"y": y, "weight": 1.0}}',
    "bare": "x",
}
# How x and y are taken out of it again.
TAKEN = {
    "tuple": ("{}[0]", "{}[1]"),
    "list": ("{}[0]", "{}[1]"),
    "dict": ('{}["inputs"]', '{}["targets"]'),
    "own dict": ('{}["x"]', '{}["y"]'),
    "named tuple": ("{}.x", "{}.y"),
    "dataclass": ("{}.x", "{}.y"),
    "nested": ('{}["inputs"]', '{}["labels"]["y"]'),
    "bare": ("{}", "torch.as_tensor({}).double().sum(-1)"),
}
UNKNOWN_TO_TASKS = ("own dict", "dataclass", "bare")  # a task needs a forward() of its own for such batches

_ROWS = """\
class Rows:
    def __init__(self, order):
        self.order = order
        self.file = None

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        i = self.order[index]
        return sample({row}, TARGETS[i])
"""

_OPENED = """\
        if self.file is None:  # at the first sample, so that each process opens its own
            self.file = {opened}
"""


def _file(opened: str, row: str, prepare: str) -> str:
    lines = _ROWS.replace("        i = self", _OPENED.replace("{opened}", opened) + "        i = self")
    return lines.replace("{row}", row) + f"\n\ndef prepare():  # once, before training\n{prepare}"


DATA_SETS = {
    "class": _ROWS.replace("{row}", "INPUTS[i]"),
    "transform": """\
class Rows:
    def __init__(self, order, transform=None, target_transform=None):
        self.data = [(INPUTS[i], TARGETS[i]) for i in order]
        self.transform, self.target_transform = transform, target_transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        row, target = self.data[index]
        if self.transform is not None:
            row = self.transform(row)
        return sample(row, target)


def transform(row):
    return np.roll(row, 1, -1)
""",
    "seek": _file(
        'open(HERE / "rows.bin", "rb", buffering=0)',
        "self.read(i)",
        '    (HERE / "rows.bin").write_bytes(INPUTS.tobytes())\n',
    ).replace(
        "\n\ndef prepare",
        """
    def read(self, i):
        self.file.seek(i * 32)
        time.sleep(0.002)  # the disk is slow
        return np.frombuffer(self.file.read(32))


def prepare""",
        1,
    ),
    "zip": _file(
        'zipfile.ZipFile(HERE / "rows.zip")',
        'np.frombuffer(self.file.read(f"{i}"))',
        """\
    with zipfile.ZipFile(HERE / "rows.zip", "w") as file:
        for i, row in enumerate(INPUTS):
            file.writestr(f"{i}", row.tobytes())
""",
    ),
    "sqlite": _file(
        'sqlite3.connect(HERE / "rows.sqlite")',
        'np.frombuffer(self.file.execute("select row from rows where i = ?", [i]).fetchone()[0])',
        """\
    file = sqlite3.connect(HERE / "rows.sqlite")
    file.execute("create table rows (i integer, row blob)")
    file.executemany("insert into rows values (?, ?)", [(i, row.tobytes()) for i, row in enumerate(INPUTS)])
    file.commit()
    file.close()
""",
    ),
    "mmap": _file(
        'np.load(HERE / "rows.npy", mmap_mode="r")', "self.file[i]", '    np.save(HERE / "rows.npy", INPUTS)\n'
    ),
}
