"""metrics.jsonl as curves of at most a few thousand points, however long it is: read in blocks, never held whole.

Of each stretch of rows the smallest and the largest value stay where they were, so that a spike of one step in a
million is seen; beside them stands the mean of each stretch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distloop.run_files import METRICS
from distloop.runs import NO_METRICS

Floats = NDArray[np.float64]

STRETCHES = 600  # of a whole file: twice as many points a curve, about what a plot has pixels
BLOCK_BYTES = 1 << 20
TRAIN = ("loss", "running_loss", "lr", "gradient_norm", "samples_per_second")
SECONDS = ("data_seconds", "compute_seconds", "validation_seconds", "checkpoint_seconds")


@dataclass
class Curve:
    """A value against the step."""

    points: list[Floats] = field(default_factory=list)
    """Blocks of (steps, values), ordered by step; nan where the value was not a number."""
    means: list[Floats] = field(default_factory=list)
    """Blocks of (steps, means)."""
    not_numbers: int = 0
    """Of how many rows the value was null, nan or infinite."""
    first_not_number: int | None = None

    def all(self) -> Floats:
        """(steps, values) of all points: an array of shape [2, points]."""
        return np.concatenate(self.points, axis=1) if self.points else np.zeros((2, 0))

    def mean(self) -> Floats:
        """(steps, means) of all stretches: an array of shape [2, stretches]."""
        return np.concatenate(self.means, axis=1) if self.means else np.zeros((2, 0))

    def add(self, steps: Floats, values: Floats, stretches: int) -> None:
        """The next rows; both of shape [rows]."""
        finite = np.isfinite(values)
        values = np.where(finite, values, np.nan)
        missing = int((~finite).sum())
        if missing and self.first_not_number is None:
            self.first_not_number = int(steps[~finite][0])
        self.not_numbers += missing
        if len(steps) <= 2 * stretches:
            self.points.append(np.stack([steps, values]))
            self.means.append(np.stack([steps, values]))
            return
        kept, means = {0, len(steps) - 1}, []
        for part in np.array_split(np.arange(len(steps)), stretches):
            usable = part[finite[part]]
            if len(usable) < len(part):
                kept.add(int(part[~finite[part]][0]))  # a gap stays a gap
            if len(usable):
                here = values[usable]
                kept.update((int(usable[here.argmin()]), int(usable[here.argmax()])))
                means.append((steps[usable].mean(), here.mean()))
        order = sorted(kept)
        self.points.append(np.stack([steps[order], values[order]]))
        self.means.append(np.array(means).reshape(-1, 2).T)


@dataclass
class Metrics:
    """What metrics.jsonl says, thinned."""

    train: dict[str, Curve] = field(default_factory=dict)
    epochs: Curve = field(default_factory=Curve)
    """The mean training loss of each epoch."""
    validation: dict[str, Curve] = field(default_factory=dict)
    seconds: list[Floats] = field(default_factory=list)
    """Blocks of shape [5, stretches]: the last step of each, then the sums of SECONDS."""
    memory: list[Floats] = field(default_factory=list)
    """Blocks of shape [1 + ranks, stretches]: the last step of each, then the peak of each rank in GiB."""
    attempts: dict[int, int] = field(default_factory=dict)
    """The first step that each attempt has logged."""
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The last row of each kind."""
    rows: int = 0
    damaged: int = 0
    """Lines that are no rows."""
    problem: str | None = None
    """Why there is nothing, if there is nothing."""

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.last.values()), default=0)


def read_metrics(run: Path, stretches: int = STRETCHES) -> Metrics:
    """The curves of the run in the directory `run`; what cannot be read is counted or said in `problem`."""
    metrics = Metrics()
    path = run / METRICS
    try:
        size = max(1, path.stat().st_size)
        with open(path, "rb") as file:
            while lines := file.readlines(BLOCK_BYTES):
                share = min(1.0, sum(map(len, lines)) / size)
                _add_block(metrics, lines, max(1, round(stretches * share)))
    except FileNotFoundError:
        metrics.problem = f"There is no {METRICS} yet."
    except OSError as error:
        metrics.problem = f"{METRICS} cannot be read: {error.strerror}."
    if not metrics.problem and not metrics.rows:
        metrics.problem = f"{METRICS} has no rows yet." if not metrics.damaged else f"{METRICS} is damaged."
    return metrics


def _add_block(metrics: Metrics, lines: list[bytes], stretches: int) -> None:
    rows = list(_rows(lines))
    metrics.rows += len(rows)
    metrics.damaged += len(lines) - len(rows)
    train = [row for row in rows if row.get("kind") == "train"]
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    validation = [row for row in rows if row.get("kind") == "validate"]
    for kind, some in (("train", train), ("epoch", epochs), ("validate", validation)):
        if some:
            metrics.last[kind] = some[-1]
    if train:
        steps = _column(train, "step")
        for key in TRAIN:
            _add(metrics.train, key, train, steps, stretches)
        _add_seconds(metrics, train, steps, stretches)
        _add_memory(metrics, train, steps, stretches)
    if epochs:
        metrics.epochs.add(_column(epochs, "step"), _column(epochs, "loss"), stretches)
    for key in dict.fromkeys(key for row in validation for key in row if key not in NO_METRICS):
        _add(metrics.validation, key, validation, _column(validation, "step"), stretches)
    for row in rows:
        if row.get("attempt") not in metrics.attempts and type(row.get("attempt")) is int:
            metrics.attempts[row["attempt"]] = row["step"]


def _rows(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """The rows in these lines; a torn or foreign one is left out."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # in one call: a third faster than line by line
        if len(found) != len(lines):
            found = map(_row, lines)
    except (ValueError, RecursionError):
        found = map(_row, lines)
    return (row for row in found if type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53)


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _column(rows: list[dict[str, Any]], key: str) -> Floats:
    """The values of a key, nan where there is no number."""
    values = [row.get(key) for row in rows]
    try:
        return np.array(values, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError, OverflowError):
        return np.array([value if type(value) in (int, float) else np.nan for value in values], dtype=np.float64)


def _add(curves: dict[str, Curve], key: str, rows: list[dict[str, Any]], steps: Floats, stretches: int) -> None:
    values = _column(rows, key)
    if key in curves or np.isfinite(values).any() or any(key in row for row in rows[:1]):
        curves.setdefault(key, Curve()).add(steps, values, stretches)


def _add_seconds(metrics: Metrics, rows: list[dict[str, Any]], steps: Floats, stretches: int) -> None:
    if "compute_seconds" not in rows[-1]:
        return
    columns = np.stack([_column(rows, key) for key in SECONDS])
    columns = np.clip(np.nan_to_num(columns, posinf=0.0, neginf=0.0), 0.0, None)
    firsts = _firsts(len(steps), stretches)
    metrics.seconds.append(np.vstack([_lasts(steps, firsts), np.add.reduceat(columns, firsts, axis=1)]))


def _add_memory(metrics: Metrics, rows: list[dict[str, Any]], steps: Floats, stretches: int) -> None:
    having = [(step, row["memory_gib"]) for step, row in zip(steps, rows, strict=True) if row.get("memory_gib")]
    having = [(step, memory) for step, memory in having if type(memory) is list]
    if not having:
        return
    ranks = max(len(memory) for _, memory in having)
    table = np.array(
        [
            [value if type(value) in (int, float) else np.nan for value in memory] + [np.nan] * (ranks - len(memory))
            for _, memory in having
        ],
        dtype=np.float64,
    )
    firsts = _firsts(len(having), stretches)
    peaks = np.fmax.reduceat(table.T, firsts, axis=1)
    metrics.memory.append(np.vstack([_lasts(np.array([step for step, _ in having]), firsts), peaks]))


def _firsts(rows: int, stretches: int) -> NDArray[np.int64]:
    """Where each stretch begins."""
    return np.unique(np.linspace(0, rows, min(rows, stretches), endpoint=False).astype(np.int64))


def _lasts(steps: Floats, firsts: NDArray[np.int64]) -> Floats:
    return steps[np.append(firsts[1:], len(steps)) - 1]
