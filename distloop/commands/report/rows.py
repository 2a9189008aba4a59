"""Parse lines of metrics.jsonl into columns of numbers."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from distloop.commands.reading import parse_json
from distloop.run.metrics import KEYS_OF_EVERY_ROW, KEYS_OF_KIND

Floats = NDArray[np.float64]

TRAIN = ("loss", "running_loss", "lr", "gradient_norm", "samples_per_second")
SECONDS = ("data_seconds", "compute_seconds", "validation_seconds", "checkpoint_seconds")
KEYS = ("step", "attempt", "skipped_steps", *TRAIN, *SECONDS)
MEMORY = "memory_gib"
OWN = {"train": "Training", "epoch": "Epoch"}  # kinds of rows with values of the loop's own, and what these are called
MOST_OF_A_LIST = 10


class Block(NamedTuple):
    """The rows in some lines. A column has shape [rows]; nan stands for what is no number."""

    train: dict[str, Floats]
    """Columns of the train rows; that of MEMORY has shape [rows, ranks]."""
    own: dict[str, tuple[Floats, Floats]]
    """(steps, values) of the rows that have it, for each value of the loop's own, such as "Training penalty"."""
    others: list[dict[str, Any]]
    """The rows of other kinds."""
    damaged: int
    """How many lines are no rows."""


def read_block(lines: list[bytes]) -> Block:
    """The rows in these lines."""
    rows = _parse(lines)
    train = [row for row in rows if row.get("kind") == "train"]
    others = [row for row in rows if row.get("kind") != "train"]
    columns = {key: column(train, key) for key in KEYS if train and (key in train[0] or key in train[-1])}
    memory = [row[MEMORY] if isinstance(row.get(MEMORY), list) else [] for row in train]
    if any(memory):  # a row may have none, or another number of ranks
        columns[MEMORY] = np.stack([_numbers(values) for values in itertools.zip_longest(*memory)], axis=1)
    own = _own_columns("train", train) | _own_columns("epoch", [row for row in others if row.get("kind") == "epoch"])
    return Block(columns, own, others, len(lines) - len(rows))


def _own_columns(kind: str, rows: list[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    """The columns of the keys that the loop has added to rows of this kind; one for each place of a list."""
    columns: dict[str, tuple[Floats, Floats]] = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(rows)):
        if key in KEYS_OF_EVERY_ROW or key in KEYS_OF_KIND[kind]:
            continue
        having = [row for row in rows if key in row]
        steps, values, title = column(having, "step"), [row[key] for row in having], f"{OWN[kind]} {key}"
        if any(isinstance(value, list) for value in values):
            lists = [value[:MOST_OF_A_LIST] if isinstance(value, list) else [] for value in values]
            for place, each in enumerate(itertools.zip_longest(*lists)):
                columns[f"{title}/{place}"] = steps, _numbers(each)
        else:
            columns[title] = steps, _numbers(values)
    return columns


def column(rows: list[dict[str, Any]], key: str) -> Floats:
    """The values under a key, of shape [rows]; nan for what is no number."""
    return _numbers([row.get(key) for row in rows])


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    values = map(_parse_line, lines)
    return [row for row in values if type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53]


def _parse_line(line: bytes) -> Any:
    try:
        return from_json(line)  # in a third of the time of Python's json
    except ValueError:
        return parse_json(line)  # a line that is none, or has half a character, which from_json refuses


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
