"""A row of metrics.jsonl as W&B is given it."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from distloop.tracking.wandb.media import media_of


def parse_row(line: bytes) -> dict[str, Any]:
    """The row; {} for a line that is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def as_logged(row: dict[str, Any], run: Path, redone_until: int) -> dict[str, Any]:
    """What is logged of a row of the run in the directory `run`, by the names of W&B.

    A row of a step up to `redone_until` says that its step was done before, and that W&B has that row, too.
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
            part = "rank_" if kind == "train" else ""
            logged |= {f"{kind}/{name}/{part}{number}": _number(each) for number, each in enumerate(value)}
        else:
            logged[f"{kind}/{name}"] = _number(value)
    if kind == "validate":
        with contextlib.suppress(Exception):  # the numbers count
            logged |= media_of(run, step)
    return logged


def _number(value: Any) -> Any:
    """null stands for nan."""
    return math.nan if value is None else value
