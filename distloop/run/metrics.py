"""metrics.jsonl: one row per line, flushed as it is written; a run has one over all its attempts."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from distloop.errors import UsageError
from distloop.ranks.sums import describe, plain_number
from distloop.ranks.talking import say

# The keys of a row, with what stands under each. null stands for a number that JSON lacks (nan, infinity).
KEYS_OF_EVERY_ROW = {
    "kind": "train, epoch, validate or figure",
    "step": "how many steps are done; the row belongs to the last of them",
    "epoch": "the epoch of that step, counted from 1",
    "attempt": "the attempt that wrote the row, counted from 1",
    "time": "when the row was written, in seconds since 1970 (Unix time)",
}
KEYS_OF_KIND = {
    "train": {
        "loss": "mean loss of the step's samples (or tokens, pixels: what the task weighs by)",
        "running_loss": "mean loss of the epoch up to this step",
        "gradient_norm": "2-norm of the step's gradient, before it is clipped",
        "lr": "learning rate of the step",
        "skipped_steps": "how many steps of the run were left out because their gradient was not finite",
        "memory_gib": "list by rank: the most memory on its device so far, in GiB (on the CPU: of the process)",
        "samples_per_second": "samples of all ranks per second of data and compute since the last row of this kind",
        "data_seconds": "seconds since the last row of this kind in which rank 0 waited for batches",
        "compute_seconds": "seconds since then in which rank 0 computed",
        "validation_seconds": "seconds since then in validation",
        "checkpoint_seconds": "seconds since then in which a checkpoint held up training",
    },
    "epoch": {"loss": "mean training loss of the epoch"},
    "validate": {"samples": "how many samples were validated"},  # and the task's own metrics
    "figure": {"name": "the picture's name", "file": "its file in the run directory"},
}
LOGGED = ("train", "epoch", "validate")  # kinds of rows to which a loop adds values of its own
NO_METRICS = (*KEYS_OF_EVERY_ROW, *KEYS_OF_KIND["validate"])  # keys of a validate row beside the task's metrics
SAMPLES_OF = "samples/"  # and the name of a further validation set: how many samples it has
# What a task may not name a value of its own: validation adds these sums up beside those of metrics(), and a row has
# these keys beside what summary() gives.
RESERVED: dict[str, tuple[str, ...]] = {
    "metrics": ("loss", "weight", "samples"),
    "collect": (),
    "summary": NO_METRICS,
    "loss": (*NO_METRICS, "weight", *KEYS_OF_KIND["train"]),
}


def is_metric(key: str) -> bool:
    """Whether a key of a validate row is a metric of the task."""
    return key not in NO_METRICS and not key.startswith(SAMPLES_OF)


def samples_in(row: Mapping[str, Any]) -> str:
    """How many samples were validated, in words: "360 samples", "360 samples, 100 of night"."""
    others = (f", {row[key]} of {key.removeprefix(SAMPLES_OF)}" for key in row if key.startswith(SAMPLES_OF))
    return f"{row['samples']} samples{''.join(others)}"


def check_row(kind: str, names: Mapping[str, Any]) -> None:
    """Raise UsageError unless there are rows of this kind, and no name is a key that every row has."""
    if kind not in LOGGED:
        raise UsageError(f"trackers.log({kind!r}, …): no such kind of row. Known: {', '.join(LOGGED)}.")
    if taken := [name for name in names if name in KEYS_OF_EVERY_ROW]:
        raise UsageError(
            f"trackers.log({kind!r}, …): {taken[0]} is a key of its own in every row. Give your value another name, "
            "or your task's metric if it is one."
        )


def check_names(method: Literal["metrics", "collect", "summary", "loss"], values: Any) -> None:
    """Raise UsageError unless what this method of a task has returned is a mapping whose names are texts, and none of
    RESERVED: another value would take the place of one of them."""
    if not isinstance(values, Mapping):
        place = " as its third value" if method == "loss" else ""
        raise UsageError(f"task.{method}() must return a dict of values by name{place}; it gave a {describe(values)}.")
    for name in values:
        if not isinstance(name, str):
            raise UsageError(f"task.{method}(): the name {name!r} is a {type(name).__name__}. Names are texts.")
        if name in RESERVED[method]:
            list_of_them = ", ".join(RESERVED[method])
            raise UsageError(
                f"task.{method}(): {name!r} is a name that distloop uses itself, as it does {list_of_them}. Give your "
                f"value another one, such as 'own_{name}'."
            )


def plain_values(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as Python's numbers, bools and lists of them, from these, NumPy's, or tensors of no dimension, whose
    device is waited for. None stays: a number that is missing. Raises UsageError for others; it names `source`."""
    return {name: _plain(source, name, value) for name, value in values.items()}


def _plain(source: str, name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(source, name, each) for each in value]
    number = plain_number(value)
    if number is None and value is not None:
        raise UsageError(
            f"{source}: {name} is a {describe(value)}. A row takes numbers, and lists of them; "
            "tolist() makes a list of an array or a tensor."
        )
    return number


def own_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a loop has added to a row, or a task to that of a validation."""
    known = KEYS_OF_KIND.get(row.get("kind", ""), {})
    return {key: value for key, value in row.items() if key not in KEYS_OF_EVERY_ROW and key not in known}


class MetricsFile:
    """Appends rows to a file. If the disk is full, rows wait in memory until one can be written."""

    def __init__(self, path: Path, check_ownership: Callable[[], None] = lambda: None) -> None:
        self.path, self.check_ownership = path, check_ownership
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.waiting: list[bytes] = []

    def log(self, row: dict[str, Any]) -> None:
        """Write one row. Numbers that JSON does not have (nan, inf) become null."""
        clean = {key: _without_infinity(value) for key, value in row.items()}
        self.waiting.append((json.dumps(clean) + "\n").encode())
        if (reason := self._write()) and len(self.waiting) == 1:
            say(f"distloop: WARNING: {self.path} cannot be written ({reason}); its rows wait in memory")

    def _write(self) -> str | None:
        """Write the waiting rows, all or none; returns why that failed."""
        text = b"".join(self.waiting)
        try:
            size = os.fstat(self.descriptor).st_size
            self.check_ownership()  # at the last moment: it does not return if the folder has another owner by now
            if os.write(self.descriptor, text) == len(text):
                self.waiting = []
                return None
            os.ftruncate(self.descriptor, size)  # no torn line
            return "no room"
        except OSError as error:
            return error.strerror or str(error)

    def close(self) -> None:
        if self.waiting and self._write():
            say(f"distloop: WARNING: {len(self.waiting)} rows could not be written to {self.path}")
        os.close(self.descriptor)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_infinity(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count_rows(path: Path) -> int:
    """How many whole rows the file has; 0 if there is no file."""
    try:
        with open(path, "rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0
