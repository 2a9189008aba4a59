"""Parse lines of metrics.jsonl into columns of numbers."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distloop.commands.reading import parse_json

Floats = NDArray[np.float64]

TRAIN = ("loss", "running_loss", "lr", "gradient_norm", "samples_per_second")
SECONDS = ("data_seconds", "compute_seconds", "validation_seconds", "checkpoint_seconds")
KEYS = ("step", "attempt", "skipped_steps", *TRAIN, *SECONDS)
MEMORY = "memory_gib"


def read_block(lines: list[bytes]) -> tuple[dict[str, Floats], list[dict[str, Any]], int]:
    """The rows in these lines: (columns of the train rows, rows of the other kinds, number of lines that are no rows).

    A column has shape [rows], that of MEMORY [rows, ranks]; nan stands for what is no number.
    """
    rows = _parse(lines)
    train = [row for row in rows if row.get("kind") == "train"]
    others = [row for row in rows if row.get("kind") != "train"]
    columns = {key: column(train, key) for key in KEYS if train and (key in train[0] or key in train[-1])}
    memory = [row[MEMORY] if isinstance(row.get(MEMORY), list) else [] for row in train]
    if any(memory):  # a row may have none, or another number of ranks
        columns[MEMORY] = np.stack([_numbers(values) for values in itertools.zip_longest(*memory)], axis=1)
    return columns, others, len(lines) - len(rows)


def column(rows: list[dict[str, Any]], key: str) -> Floats:
    """The values under a key, of shape [rows]; nan for what is no number."""
    return _numbers([row.get(key) for row in rows])


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")  # one call costs less than many
    except (ValueError, RecursionError):
        values = []
    if len(values) != len(lines):
        values = list(map(parse_json, lines))
    return [row for row in values if type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53]


def _numbers(values: Sequence[Any]) -> Floats:
    try:
        numbers = np.array(values, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros((0, 0))
    return numbers if numbers.ndim == 1 else np.array(list(map(_number, values)), dtype=np.float64)


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan
