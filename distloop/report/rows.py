"""Lines of metrics.jsonl as columns of numbers.

Most of a long file is rows of training that differ in their numbers alone. Of these the numbers are taken as they
stand, three times as fast as by a JSON parser; whatever else there is goes through one.
"""

from __future__ import annotations

import collections
import json
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

IN_NUMBERS = b"0123456789.+-E"
AROUND_NUMBERS = bytes(byte for byte in range(256) if byte not in IN_NUMBERS + b",")
FEWEST = 64  # lines for which a look at their form pays
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
    fast, lines = _alike(lines) if len(lines) >= FEWEST else ({}, lines)
    rows = _parse(lines)
    train = [row for row in rows if row.get("kind") == "train"]
    others = [row for row in rows if row.get("kind") != "train"]
    slow = _columns(train) if train else {}
    return Block(_joined(fast, slow) if fast and slow else fast or slow, others, len(lines) - len(rows))


def column(rows: list[dict[str, Any]], key: str) -> Floats:
    """The values of a key, nan where there is no number."""
    values = [row.get(key) for row in rows]
    try:
        return np.array(values, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError, OverflowError):
        return np.array(list(map(_number, values)), dtype=np.float64)


def _alike(lines: list[bytes]) -> tuple[dict[str, Floats], list[bytes]]:
    """The columns of the rows of training that have the commonest form, and all other lines."""
    text = b"".join(lines).replace(b"e-", b"E-").replace(b"e+", b"E+").replace(b"null", b"9E999")  # that is infinity
    candidates = text.splitlines()
    if len(candidates) != len(lines):
        return {}, lines
    forms = [line.translate(None, IN_NUMBERS) for line in candidates]
    form, count = collections.Counter(forms).most_common(1)[0]
    sample = lines[forms.index(form)]
    names = _names(sample) if b'"train"' in form else []
    if not names or count < FEWEST:
        return {}, lines
    numbers = b",".join(line for line, other in zip(candidates, forms, strict=True) if other == form)
    numbers = re.sub(rb",+", b",", numbers.translate(None, AROUND_NUMBERS)).strip(b",")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = np.fromstring(numbers, dtype=np.float64, sep=",").reshape(count, len(names))
    except (ValueError, Warning):
        return {}, lines
    table[~np.isfinite(table)] = np.nan
    columns = {name: table[:, index] for index, name in enumerate(names) if name != MEMORY}
    ranks = [index for index, name in enumerate(names) if name == MEMORY]
    if ranks:
        columns[MEMORY] = table[:, ranks]
    steps = columns["step"]
    if not (np.isfinite(steps).all() and (steps == np.floor(steps)).all()):
        return {}, lines
    return columns, [line for line, other in zip(lines, forms, strict=True) if other != form]


def _names(line: bytes) -> list[str]:
    """The name of each number in the row, in their order; none where it holds anything else, or a name has digits."""
    row = _loads(line)
    if not isinstance(row, dict) or row.pop("kind", None) != "train" or type(row.get("step")) is not int:
        return []
    names: list[str] = []
    for key, value in row.items():
        values = value if key == MEMORY and isinstance(value, list) else [value]
        if not re.fullmatch("[a-z_]+", key) or not all(type(each) in (int, float, type(None)) for each in values):
            return []
        names += [key] * len(values)
    return names


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]") if lines else []  # one call costs less than many
        if len(found) != len(lines):
            found = list(map(_loads, lines))
    except (ValueError, RecursionError):
        found = list(map(_loads, lines))
    return [row for row in found if type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Floats]:
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("kind", MEMORY)]
    columns = {name: column(rows, name) for name in names}
    memory = [row[MEMORY] if isinstance(row.get(MEMORY), list) else [] for row in rows]
    ranks = max(map(len, memory))
    if ranks:
        padded = [[*map(_number, each), *[np.nan] * (ranks - len(each))] for each in memory]
        columns[MEMORY] = np.array(padded, dtype=np.float64)
    return columns


def _joined(one: dict[str, Floats], other: dict[str, Floats]) -> dict[str, Floats]:
    """Columns of both, in the order of their steps; nan where one has no such column."""
    sizes = len(one["step"]), len(other["step"])
    order = np.argsort(np.concatenate([one["step"], other["step"]]), kind="stable")
    joined = {}
    for name in dict.fromkeys([*one, *other]):
        ranks = max(columns[name].shape[1] for columns in (one, other) if name in columns) if name == MEMORY else 0
        both = []
        for columns, size in zip((one, other), sizes, strict=True):
            values = columns.get(name, np.full((size, ranks) if ranks else size, np.nan))
            both.append(
                np.pad(values, ((0, 0), (0, ranks - values.shape[1])), constant_values=np.nan) if ranks else values
            )
        joined[name] = np.concatenate(both)[order]
    return joined


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
