"""The files of a run directory: their names, and small files written whole. Nothing here imports torch."""

from __future__ import annotations

import datetime
import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

CONFIG, STATUS, METRICS, ENVIRONMENT = "config.yaml", "status.json", "metrics.jsonl", "environment.json"
TIME, VALIDATION, WANDB, GIT_DIFF = "time.json", "validation.json", "wandb.json", "git.diff"
CHECKPOINTS, FAILURES, RANKS = "checkpoints", "failures", "failures/ranks.json"

_one_writer = threading.Lock()  # two threads may write one file, and would write aside under one name


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


def write_text(path: Path, text: str, synced: bool = True) -> None:
    """Write a small file aside and rename it: a reader sees the old or the new text, never a part.

    `synced`: the text is on the disk when this returns. Raises OSError.
    """
    aside = path.with_name(f".{path.name}.writing")
    with _one_writer:
        aside.write_text(text, encoding="utf-8")
        if synced:
            sync(aside)
        aside.replace(path)


def write_json(path: Path, content: dict[str, Any], synced: bool = True) -> None:
    """The same for JSON, as people read it."""
    write_text(path, json.dumps(content, indent=1) + "\n", synced)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} where there is none or it is damaged: the checkpoints say how far the run is."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def now() -> str:
    """This moment in ISO 8601 with its time zone, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
