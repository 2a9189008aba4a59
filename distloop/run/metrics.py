"""metrics.jsonl: one row per line, flushed as it is written; a run has one over all its attempts."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from distloop.ranks.talking import say
from distloop.run.files import write_text

NO_METRICS = (
    "kind",
    "step",
    "epoch",
    "attempt",
    "samples",
    "time",
)  # numbers in a validation row, but not what it found

SET_ASIDE = "metrics.set_aside.jsonl"


class MetricsFile:
    """Appends rows to a file. Where the disk is full, rows wait in memory for the next that can be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.waiting: list[bytes] = []

    def log(self, row: dict[str, Any]) -> None:
        """Write one row. Numbers that JSON does not have (nan, inf) become null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.waiting.append((json.dumps(clean) + "\n").encode())
        reason = self._write()
        if reason and len(self.waiting) == 1:
            say(f"distloop: WARNING: {self.path} cannot be written ({reason}); its rows wait in memory")

    def _write(self) -> str | None:
        """Write what waits, all or nothing; returns why that was not possible."""
        text = b"".join(self.waiting)
        try:
            size = os.fstat(self.descriptor).st_size
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


def count_rows(path: Path) -> int:
    """How many whole rows the file has; none if there is no file."""
    try:
        with open(path, "rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0


def set_aside_until(path: Path) -> int:
    """The last step whose row was set aside; 0 if none was."""
    last = 0
    with contextlib.suppress(FileNotFoundError), open(path.with_name(SET_ASIDE)) as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                last = max(last, int(json.loads(line)["step"]))
    return last


def set_rows_aside(path: Path, step: int) -> int:
    """Move rows of later steps than `step` to metrics.set_aside.jsonl beside it; returns how many.

    An attempt does these steps again. A last line that was torn by a crash goes with them.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    aside: list[str] = []
    for line in path.read_text().splitlines():
        try:
            (kept if json.loads(line)["step"] <= step else aside).append(line)
        except (ValueError, KeyError, TypeError):
            aside.append(line)
    if aside:
        with open(path.with_name(SET_ASIDE), "a") as file:
            file.writelines(line + "\n" for line in aside)
        write_text(path, "".join(line + "\n" for line in kept))
    return len(aside)
