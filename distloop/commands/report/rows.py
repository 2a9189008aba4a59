"""Parse lines of metrics.jsonl into columns of numbers."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distloop.commands.reading import parse_json

Floats = NDArray[np.float64]

TRAIN = ("loss", "running_loss", "lr", "gradient_norm", "samples_per_second")
SECONDS = ("data_seconds", "compute_seconds", "validation_seconds", "checkpoint_seconds")
KEYS = ("step", "attempt", "skipped_steps", *TRAIN, *SECONDS)
MEMORY = "memory_gib"


class Block(NamedTuple):
    """The rows of a block of lines."""

    train: dict[str, Floats]
    """The columns of the train rows, of shape [rows], under MEMORY [rows, ranks]; nan for what is no number."""
    others: list[dict[str, Any]]
    """The rows of the other kinds."""
    damaged: int
    """How many lines are no rows."""


def read_block(lines: list[bytes]) -> Block:
    """The rows in these lines. A torn or foreign line is only counted."""
    rows = _parse(lines)
    train = [row for row in rows if row.get("kind") == "train"]
    others = [row for row in rows if row.get("kind") != "train"]
    return Block(_columns(train) if train else {}, others, len(lines) - len(rows))


def column(rows: list[dict[str, Any]], key: str) -> Floats:
    """The values under a key, of shape [rows]; nan for what is no number."""
    values = [row.get(key) for row in rows]
    try:
        numbers = np.array(values, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros((0, 0))
    return numbers if numbers.ndim == 1 else np.array(list(map(_number, values)), dtype=np.float64)


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]") if lines else []  # one call costs less than many
        if len(values) != len(lines):
            values = list(map(parse_json, lines))
    except (ValueError, RecursionError):
        values = list(map(parse_json, lines))
    return [row for row in values if type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Floats]:
    """The columns of KEYS and MEMORY that the first or the last of these rows has."""
    columns = {key: column(rows, key) for key in KEYS if key in rows[0] or key in rows[-1]}
    lists = [row.get(MEMORY) for row in rows]
    if any(lists):
        try:
            columns[MEMORY] = np.array(lists, dtype=np.float64).reshape(len(rows), -1)
        except (TypeError, ValueError, OverflowError):  # rows without memory, or with another number of ranks
            by_row = [each if isinstance(each, list) else [] for each in lists]
            ranks = max(map(len, by_row))
            padded = [[*map(_number, each), *[np.nan] * (ranks - len(each))] for each in by_row]
            columns[MEMORY] = np.array(padded, dtype=np.float64).reshape(len(rows), -1)
    return columns


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan
