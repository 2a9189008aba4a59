"""Lines of metrics.jsonl as columns of numbers."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TRAIN = ("loss", "running_loss", "lr", "gradient_norm", "samples_per_second")
SECONDS = ("data_seconds", "compute_seconds", "validation_seconds", "checkpoint_seconds")
KEYS = ("step", "attempt", "skipped_steps", *TRAIN, *SECONDS)
MEMORY = "memory_gib"


class Block(NamedTuple):
    """The rows of some lines."""

    train: dict[str, Floats]
    """The columns of the rows of training, nan for what is no number; shape [rows], MEMORY: [rows, ranks]."""
    others: list[dict[str, Any]]
    """The rows of other kinds."""
    damaged: int
    """Lines that are no rows."""


def read_block(lines: list[bytes]) -> Block:
    """The rows in these lines; a torn or foreign one is only counted."""
    rows = _parse(lines)
    train = [row for row in rows if row.get("kind") == "train"]
    others = [row for row in rows if row.get("kind") != "train"]
    return Block(_columns(train) if train else {}, others, len(lines) - len(rows))


def column(rows: list[dict[str, Any]], key: str) -> Floats:
    """The values of a key, nan where there is no number."""
    values = [row.get(key) for row in rows]
    try:
        found = np.array(values, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError, OverflowError):
        found = np.zeros((0, 0))
    return found if found.ndim == 1 else np.array(list(map(_number, values)), dtype=np.float64)


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]") if lines else []  # one call costs less than many
        if len(found) != len(lines):
            found = list(map(_loads, lines))
    except (ValueError, RecursionError):
        found = list(map(_loads, lines))
    return [row for row in found if type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Floats]:
    """The known columns that the first or the last of these rows has."""
    columns = {key: column(rows, key) for key in KEYS if key in rows[0] or key in rows[-1]}
    lists = [row.get(MEMORY) for row in rows]
    if any(lists):
        try:
            columns[MEMORY] = np.array(lists, dtype=np.float64).reshape(len(rows), -1)
        except (TypeError, ValueError, OverflowError):  # not of all rows, or of another number of ranks
            known = [each if isinstance(each, list) else [] for each in lists]
            ranks = max(map(len, known))
            padded = [[*map(_number, each), *[np.nan] * (ranks - len(each))] for each in known]
            columns[MEMORY] = np.array(padded, dtype=np.float64).reshape(len(rows), -1)
    return columns


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan
