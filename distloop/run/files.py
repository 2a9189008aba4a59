"""The files of a run directory: their names, and small ones written whole. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

CONFIG, STATUS, METRICS, ENVIRONMENT = "config.yaml", "status.json", "metrics.jsonl", "environment.json"
TIME, VALIDATION, WANDB, GIT_DIFF = "time.json", "validation.json", "wandb.json", "git.diff"
CHECKPOINTS, FAILURES, RANKS = "checkpoints", "failures", "failures/ranks.json"


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}  # damaged: the checkpoints say how far the run is


class Start(NamedTuple):
    """How an attempt begins."""

    path: Path
    attempt: int
    checkpoint: Path | None
    """To continue from."""
    weights: Path | None
    """To begin from, with --init-from."""
    step: int
    """How many steps are done."""
    finished: bool
    messages: list[str]
    identity: dict[str, Any]
    """What the run trains, as it stands in the manifest of each checkpoint."""
