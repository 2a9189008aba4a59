"""metrics.jsonl as curves of at most a few thousand points, however long it is: read in blocks, never held whole.

Of each stretch of rows the smallest and the largest value stay where they were, so that a spike of one step in a
million is seen; beside them stands the mean of each stretch.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distloop.commands.report.rows import MEMORY, SECONDS, TRAIN, Block, Floats, column, read_block
from distloop.run.files import METRICS
from distloop.run.metrics import NO_METRICS

STRETCHES = 600  # of a whole file: twice as many points a curve, about what a plot has pixels
BLOCK_BYTES = 1 << 20


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
    last_train: dict[str, float] = field(default_factory=dict)
    """The last row of training."""
    last_validation: dict[str, Any] = field(default_factory=dict)
    """The last row of validation."""
    last_step: int = 0
    rows: int = 0
    damaged: int = 0
    """Lines that are no rows."""
    problem: str | None = None
    """Why there is nothing, if there is nothing."""


def read_metrics(run: Path, stretches: int = STRETCHES) -> Metrics:
    """The curves of the run in the directory `run`; what cannot be read is counted or said in `problem`."""
    metrics = Metrics()
    path = run / METRICS
    collecting = gc.isenabled()
    gc.disable()  # it would look for cycles among millions of short-lived rows, which takes a fifth of the time
    try:
        size = max(1, path.stat().st_size)
        with open(path, "rb") as file:
            while lines := file.readlines(BLOCK_BYTES):
                share = min(1.0, sum(map(len, lines)) / size)
                _add_block(metrics, read_block(lines), max(1, round(stretches * share)))
    except FileNotFoundError:
        metrics.problem = f"There is no {METRICS} yet."
    except OSError as error:
        metrics.problem = f"{METRICS} cannot be read: {error.strerror}."
    finally:
        if collecting:
            gc.enable()
    if not metrics.problem and not metrics.rows:
        metrics.problem = f"{METRICS} has no rows yet." if not metrics.damaged else f"{METRICS} is damaged."
    return metrics


def _add_block(metrics: Metrics, block: Block, stretches: int) -> None:
    train = block.train
    metrics.rows += len(train.get("step", ())) + len(block.others)
    metrics.damaged += block.damaged
    if train:
        steps = train["step"]
        for key in TRAIN:
            if key in train:
                metrics.train.setdefault(key, Curve()).add(steps, train[key], stretches)
        _add_seconds(metrics, train, stretches)
        _add_memory(metrics, train, stretches)
        metrics.last_train = {key: float(values[-1]) for key, values in train.items() if key != MEMORY}
        for attempt in np.unique(train["attempt"][np.isfinite(train["attempt"])]) if "attempt" in train else ():
            metrics.attempts.setdefault(int(attempt), int(steps[train["attempt"] == attempt][0]))
        metrics.last_step = max(metrics.last_step, int(steps[-1]))
    epochs = [row for row in block.others if row.get("kind") == "epoch"]
    validation = [row for row in block.others if row.get("kind") == "validate"]
    if epochs:
        metrics.epochs.add(column(epochs, "step"), column(epochs, "loss"), stretches)
    if validation:
        steps = column(validation, "step")
        for key in dict.fromkeys(key for row in validation for key in row if key not in NO_METRICS):
            metrics.validation.setdefault(key, Curve()).add(steps, column(validation, key), stretches)
        metrics.last_validation = validation[-1]
        metrics.last_step = max(metrics.last_step, int(steps[-1]))


def _add_seconds(metrics: Metrics, train: dict[str, Floats], stretches: int) -> None:
    if "compute_seconds" not in train:
        return
    nothing = np.zeros(len(train["step"]))
    columns = np.stack([train.get(key, nothing) for key in SECONDS])
    columns = np.clip(np.nan_to_num(columns, posinf=0.0, neginf=0.0), 0.0, None)
    firsts = _firsts(len(nothing), stretches)
    metrics.seconds.append(np.vstack([_lasts(train["step"], firsts), np.add.reduceat(columns, firsts, axis=1)]))


def _add_memory(metrics: Metrics, train: dict[str, Floats], stretches: int) -> None:
    if MEMORY not in train or not train[MEMORY].shape[1]:
        return
    firsts = _firsts(len(train["step"]), stretches)
    peaks = np.fmax.reduceat(train[MEMORY].T, firsts, axis=1)
    metrics.memory.append(np.vstack([_lasts(train["step"], firsts), peaks]))


def _firsts(rows: int, stretches: int) -> NDArray[np.int64]:
    """Where each stretch begins."""
    return np.unique(np.linspace(0, rows, min(rows, stretches), endpoint=False).astype(np.int64))


def _lasts(steps: Floats, firsts: NDArray[np.int64]) -> Floats:
    return steps[np.append(firsts[1:], len(steps)) - 1]
