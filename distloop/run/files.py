"""The names of the files of a run directory, and how small files are written and read. Imports no torch."""

import contextlib
import datetime
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

CONFIG, STATUS, METRICS, ENVIRONMENT = "config.yaml", "status.json", "metrics.jsonl", "environment.json"
TIME, VALIDATION, WANDB = "time.json", "validation.json", "wandb.json"
GIT_DIFF, LOOP = "git.diff", "loop.py"
CHECKPOINTS, FAILURES, RANKS = "checkpoints", "failures", "failures/ranks.json"
FIGURES = "figures"  # figures/step_00000120/NAME.png

_one_writer = threading.Lock()  # two threads may write the same file, through the same temporary name


class Start(NamedTuple):
    """How an attempt begins."""

    path: Path  # the run directory
    attempt: int  # counted from 1
    checkpoint: Path | None  # from which it continues
    weights: Path | None  # of --init-from, for an attempt without a checkpoint
    step: int  # how many steps are done
    finished: bool  # the run was finished before
    messages: list[str]  # for the console
    identity: dict[str, Any]  # what the run trains, for the manifest of each checkpoint
    changes: dict[str, Any] = {}  # noqa: RUF012 - of the config and the loop, against the attempt before; not changed
    micro_size: int | None = None  # that batch.micro_size: auto has found, in this start or in one before
    sha256: str = ""  # of the checkpoint's manifest or the weights, if other ranks load them too


def write_text(path: Path, text: str, synced: bool = True) -> None:
    """Write a small file under another name and rename it: a reader sees the old or the new text, never a part.
    `synced`: wait until the text is on the disk. Raises OSError."""
    write_bytes(path, text.encode(), synced)


def write_bytes(path: Path, content: bytes, synced: bool = True) -> None:
    """The same for bytes."""
    write_blocks(path, [content], synced)


def write_blocks(path: Path, blocks: Iterable[bytes], synced: bool = True) -> None:
    """The same for a file that is not held in memory whole."""
    aside = path.with_name(f".{path.name}.writing")
    with _one_writer:
        try:
            with open(aside, "wb") as file:
                file.writelines(blocks)
            if synced:
                sync(aside)
            aside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()  # a part of it would keep a full disk full
            raise


def write_json(path: Path, content: dict[str, Any], synced: bool = True) -> None:
    """The same for JSON, indented."""
    write_text(path, json.dumps(content, indent=1) + "\n", synced)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; {} if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def now() -> str:
    """The time in ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
