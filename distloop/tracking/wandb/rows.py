"""Rows of metrics.jsonl: read them while the file grows, and turn each into what W&B logs."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from distloop.tracking.wandb.media import media_of

ROWS_AT_ONCE = 10_000


class RowReader:
    """Reads the rows of a file that is still being written, from row `first_row` (counted from 0) on."""

    def __init__(self, path: Path, first_row: int) -> None:
        """Raises FileNotFoundError."""
        self.file = open(path, "rb")  # noqa: SIM115 - open until the process ends
        for _ in range(first_row):
            self.file.readline()

    def read(self) -> list[dict[str, Any]]:
        """The next whole lines, at most ROWS_AT_ONCE. A damaged line is {}, so that row n stays row n."""
        rows: list[dict[str, Any]] = []
        while len(rows) < ROWS_AT_ONCE:
            start_of_line = self.file.tell()
            line = self.file.readline()
            if not line.endswith(b"\n"):  # the end of the file, or a line that is being written
                self.file.seek(start_of_line)
                break
            rows.append(parse_row(line))
        return rows


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object in the line; {} if the line is damaged."""
    row = None
    with contextlib.suppress(ValueError):
        row = json.loads(line)
    return row if isinstance(row, dict) else {}


def as_logged(row: dict[str, Any], run: Path, redone_until: int) -> dict[str, Any]:
    """The values that W&B logs for a row of the run in the directory `run`, by W&B's names.

    A step up to `redone_until` is marked as redone, because W&B has its first row as well.
    """
    row = dict(row)
    kind, step, moment = row.pop("kind", "unknown"), row.pop("step", None), row.pop("time", None)
    logged = {"global_step": step} | {name: row.pop(name, None) for name in ("epoch", "attempt")}
    if isinstance(moment, (int, float)):
        logged["_timestamp"] = moment
    if isinstance(step, int) and step <= redone_until:
        logged["redone"] = 1
    for name, value in row.items():
        if isinstance(value, list) and all(each is None or isinstance(each, (int, float)) for each in value):
            prefix = "rank_" if kind == "train" else ""
            logged |= {f"{kind}/{name}/{prefix}{index}": _nan_for_none(each) for index, each in enumerate(value)}
        else:
            logged[f"{kind}/{name}"] = _nan_for_none(value)
    if kind == "validate":
        with contextlib.suppress(Exception):  # without its pictures the row still has its numbers
            logged |= media_of(run, step)
    return logged


def _nan_for_none(value: Any) -> Any:
    return math.nan if value is None else value
