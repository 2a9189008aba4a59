"""Read all that a report needs from a run directory. Files may be missing, damaged or being written."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distloop.commands.reading import Run, checkpoint_steps, parse_json, read_run
from distloop.commands.report.curves import Metrics, read_metrics
from distloop.run.files import CHECKPOINTS, CONFIG, ENVIRONMENT, FAILURES, GIT_DIFF, TIME, VALIDATION

CHANGES = "config_changes.jsonl"
ACCOUNTS = ("compute", "data", "validation", "checkpoint", "start_up", "lost")
LONGEST_TEXT = 400_000  # characters of a diff or a traceback; the rest is cut


@dataclass(frozen=True)
class Part:
    """The content of a file, or why it has none."""

    value: Any = None
    problem: str | None = None
    """A sentence; None if the file was read."""


@dataclass(frozen=True)
class Saved:
    """A published checkpoint."""

    step: int
    size: int
    """Bytes of all files together."""
    files: int
    written: datetime.datetime


@dataclass(frozen=True)
class Record:
    """A run with everything that its report shows."""

    run: Run
    metrics: Metrics
    config: Part
    environment: Part
    time: Part
    """The list of the attempts' entries in time.json."""
    validation: Part
    diff: Part
    checkpoints: list[Saved]
    failures: list[tuple[str, Part]]
    """(file name, content) of each attempt that failed."""
    changes: Part
    """The list of changes of the config."""

    @property
    def attempts(self) -> dict[int, int]:
        """attempt -> the step after which it began, in the order of attempts."""
        first_steps = dict(self.metrics.attempts)
        for attempt in self.time.value or []:
            if type(attempt.get("attempt")) is int and type(attempt.get("first_step")) is int:
                first_steps[attempt["attempt"]] = attempt["first_step"]
        return dict(sorted(first_steps.items()))

    @property
    def seconds(self) -> dict[str, float]:
        """account -> its seconds over all attempts; empty without time.json."""
        totals: dict[str, float] = {}
        for attempt in self.time.value or []:
            for name, value in accounts(attempt).items():
                totals[name] = totals.get(name, 0.0) + value
        return totals


def read_record(path: Path) -> Record:
    """The record of the run in the directory `path`."""
    time = read_part(path / TIME)
    attempts = time.value.get("attempts") if isinstance(time.value, dict) else None
    if time.problem is None:
        well_formed = isinstance(attempts, list) and all(isinstance(attempt, dict) for attempt in attempts)
        time = Part(attempts) if well_formed else Part(problem=f"{TIME} is damaged.")
    return Record(
        run=read_run(path),
        metrics=read_metrics(path),
        config=_read_config(path / CONFIG),
        environment=_mapping(path / ENVIRONMENT),
        time=time,
        validation=_mapping(path / VALIDATION),
        diff=_read_text(path / GIT_DIFF),
        checkpoints=_checkpoints(path),
        failures=[(file.name, _mapping(file)) for file in sorted((path / FAILURES).glob("attempt_*.json"))],
        changes=_read_changes(path / CHANGES),
    )


def accounts(attempt: dict[str, Any]) -> dict[str, float]:
    """account -> seconds of an attempt, for those that are numbers; the accounts of ACCOUNTS come first."""
    seconds = attempt.get("seconds")
    if not isinstance(seconds, dict):
        return {}
    names = [*(name for name in ACCOUNTS if name in seconds), *(name for name in seconds if name not in ACCOUNTS)]
    usable = {name: seconds[name] for name in names if type(seconds[name]) in (int, float)}
    return {name: float(value) for name, value in usable.items() if 0 <= value < float("inf")}


def read_part(path: Path) -> Part:
    """The content of a JSON file."""
    text = _read_text(path)
    if text.problem:
        return text
    value = parse_json(text.value)
    return Part(value) if value is not None else Part(problem=f"{path.name} is damaged.")


def _mapping(path: Path) -> Part:
    """The content of a JSON file that must hold an object."""
    part = read_part(path)
    if part.problem is None and not isinstance(part.value, dict):
        return Part(problem=f"{path.name} is damaged.")
    return part


def _read_text(path: Path) -> Part:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return Part(file.read())
    except FileNotFoundError:
        return Part(problem=f"There is no {path.name}.")
    except OSError as error:
        return Part(problem=f"{path.name} cannot be read: {error.strerror}.")


def _read_config(path: Path) -> Part:
    import yaml

    from distloop.config.yaml_text import parse_yaml

    text = _read_text(path)
    if text.problem:
        return text
    try:
        settings = parse_yaml(text.value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return Part(problem=f"{path.name} is damaged.")
    return Part(settings) if isinstance(settings, dict) else Part(problem=f"{path.name} is damaged.")


def _read_changes(path: Path) -> Part:
    text = _read_text(path)
    if text.problem:
        return text
    changes = []
    for line in text.value.splitlines():
        change = parse_json(line)  # None for a line that is being written
        if isinstance(change, dict) and isinstance(change.get("changes"), dict):
            changes.append(change)
    return Part(changes)


def _checkpoints(path: Path) -> list[Saved]:
    """The published checkpoints, without one that is removed meanwhile."""
    saved = []
    for step in checkpoint_steps(path):
        folder = path / CHECKPOINTS / f"step_{step:08d}"
        try:
            files = [entry.stat() for entry in folder.iterdir()]
            written = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
        except OSError:
            continue
        saved.append(Saved(step, sum(each.st_size for each in files), len(files), written))
    return saved
