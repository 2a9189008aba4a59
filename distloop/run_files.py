"""The files of a run directory: their names, and small ones written whole. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distloop.config import Config

CONFIG, STATUS, METRICS, ENVIRONMENT = "config.yaml", "status.json", "metrics.jsonl", "environment.json"
TIME, VALIDATION, WANDB, GIT_DIFF = "time.json", "validation.json", "wandb.json", "git.diff"
CHECKPOINTS, FAILURES, RANKS = "checkpoints", "failures", "failures/ranks.json"


def path_of(config: Config) -> Path:
    """The run's directory."""
    return Path(config.runs_dir) / str(config.name)


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
