"""Read metrics.jsonl as curves of at most a few thousand points. The file is read in blocks, and never held whole.

Rows are thinned by stretches. Of each stretch the smallest and the largest value are kept, so that a spike of one step
in a million stays visible; the mean of each stretch makes a second curve.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distloop.commands.report.rows import MEMORY, SECONDS, TRAIN, Floats, column, read_block
from distloop.run.files import METRICS
from distloop.run.metrics import is_metric

MOST_OWN = 20  # values of the loop's own that get a curve
MOST_FIGURES = 400  # names of pictures; a run directory has fewer files of them
STRETCHES = 600  # per file; a curve has twice as many points, about as many as a plot has pixels
BLOCK_BYTES = 1 << 20


@dataclass
class Curve:
    """The values under a key of metrics.jsonl against the step, thinned."""

    points: list[Floats] = field(default_factory=list)  # blocks of what all() returns
    means: list[Floats] = field(default_factory=list)
    not_numbers: int = 0
    """In how many rows the value was null, nan or infinite."""
    first_not_number: int | None = None
    """The step of the first such row."""

    def all(self) -> Floats:
        """(steps, values) of all points, in the order of steps: shape [2, points]; nan for what is no number."""
        return np.concatenate([np.zeros((2, 0)), *self.points], axis=1)

    def mean(self) -> Floats:
        """(steps, means) of all stretches, of shape [2, stretches]."""
        return np.concatenate([np.zeros((2, 0)), *self.means], axis=1)

    def add(self, steps: Floats, values: Floats, stretches: int) -> None:
        """Add the next rows, thinned to so many stretches. `steps` and `values` have shape [rows]."""
        finite = np.isfinite(values)
        values = np.where(finite, values, np.nan)
        self.not_numbers += int((~finite).sum())
        if self.first_not_number is None and not finite.all():
            self.first_not_number = int(steps[~finite][0])
        if len(steps) <= 2 * stretches:
            self.points.append(np.stack([steps, values]))
            self.means.append(np.stack([steps, values]))
            return
        chosen, means = {0, len(steps) - 1}, []  # indices of the points
        for part in np.array_split(np.arange(len(steps)), stretches):
            usable = part[finite[part]]
            if len(usable) < len(part):
                chosen.add(int(part[~finite[part]][0]))  # so that a gap stays a gap
            if len(usable):
                usable_values = values[usable]
                chosen.update((int(usable[usable_values.argmin()]), int(usable[usable_values.argmax()])))
                means.append((steps[usable].mean(), usable_values.mean()))
        order = sorted(chosen)
        self.points.append(np.stack([steps[order], values[order]]))
        self.means.append(np.array(means).reshape(-1, 2).T)


@dataclass
class Metrics:
    """The content of metrics.jsonl, thinned."""

    train: dict[str, Curve] = field(default_factory=dict)
    epochs: Curve = field(default_factory=Curve)
    """The mean training loss of each epoch."""
    validation: dict[str, Curve] = field(default_factory=dict)
    own: dict[str, Curve] = field(default_factory=dict)
    """Values of the loop's own, such as "Training penalty"."""
    own_left_out: set[str] = field(default_factory=set)
    """Those that are too many."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """name -> the last figure row of this name; the newest last."""
    seconds: list[Floats] = field(default_factory=list)
    """Blocks of shape [5, stretches]: the last step of each stretch, then its sums of SECONDS."""
    memory: list[Floats] = field(default_factory=list)
    """Blocks of shape [1 + ranks, stretches]: the last step of each stretch, then the peak of each rank in GiB."""
    attempts: dict[int, int] = field(default_factory=dict)
    """attempt -> the first step that it has logged."""
    last_train: dict[str, float] = field(default_factory=dict)
    """The numbers of the last train row."""
    last_validation: dict[str, Any] = field(default_factory=dict)
    """The last validation row."""
    last_step: int = 0
    rows: int = 0
    damaged: int = 0
    """How many lines are no rows."""
    problem: str | None = None
    """Why there are no rows, if there are none."""


def read_metrics(run: Path, stretches: int = STRETCHES) -> Metrics:
    """The curves of the run in the directory `run`. Raises nothing: see Metrics.damaged and Metrics.problem."""
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
    train, own, others, damaged = read_block(lines)
    metrics.rows += len(lines) - damaged
    metrics.damaged += damaged
    for title, (of_rows, values) in own.items():
        if title in metrics.own or len(metrics.own) < MOST_OWN:
            metrics.own.setdefault(title, Curve()).add(of_rows, values, stretches)
        else:
            metrics.own_left_out.add(title)
    for row in others:
        if row.get("kind") == "figure":
            name = str(row.get("name"))
            metrics.figures.pop(name, None)
            metrics.figures[name] = row
    for name in list(metrics.figures)[:-MOST_FIGURES]:
        del metrics.figures[name]
    if train:
        _add_train(metrics, train, stretches)
    epochs = [row for row in others if row.get("kind") == "epoch"]
    validation = [row for row in others if row.get("kind") == "validate"]
    if epochs:
        metrics.epochs.add(column(epochs, "step"), column(epochs, "loss"), stretches)
    if validation:
        steps = column(validation, "step")
        for key in dict.fromkeys(key for row in validation for key in row if is_metric(key)):
            metrics.validation.setdefault(key, Curve()).add(steps, column(validation, key), stretches)
        metrics.last_validation = validation[-1]
        metrics.last_step = max(metrics.last_step, int(steps[-1]))


def _add_train(metrics: Metrics, train: dict[str, Floats], stretches: int) -> None:
    steps = train["step"]
    for key in TRAIN:
        if key in train:
            metrics.train.setdefault(key, Curve()).add(steps, train[key], stretches)
    for attempt in np.unique(train["attempt"][np.isfinite(train["attempt"])]) if "attempt" in train else ():
        metrics.attempts.setdefault(int(attempt), int(steps[train["attempt"] == attempt][0]))
    metrics.last_train = {key: float(values[-1]) for key, values in train.items() if key != MEMORY}
    metrics.last_step = max(metrics.last_step, int(steps[-1]))
    firsts = np.linspace(0, len(steps), min(len(steps), stretches), endpoint=False).astype(np.int64)  # of each stretch
    lasts = steps[np.append(firsts[1:], len(steps)) - 1]
    if "compute_seconds" in train:
        seconds = np.stack([train.get(key, np.zeros(len(steps))) for key in SECONDS])
        seconds = np.clip(np.nan_to_num(seconds, posinf=0.0, neginf=0.0), 0.0, None)
        metrics.seconds.append(np.vstack([lasts, np.add.reduceat(seconds, firsts, axis=1)]))
    if MEMORY in train and train[MEMORY].shape[1]:
        metrics.memory.append(np.vstack([lasts, np.fmax.reduceat(train[MEMORY].T, firsts, axis=1)]))
