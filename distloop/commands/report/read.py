"""All that a run directory holds for its report, read while it may be written, missing or damaged."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distloop.commands.reading import Run, checkpoint_steps, read_run
from distloop.commands.report.curves import Metrics, read_metrics
from distloop.run.files import CHECKPOINTS, CONFIG, ENVIRONMENT, FAILURES, GIT_DIFF, TIME, VALIDATION

CHANGES = "config_changes.jsonl"
ACCOUNTS = ("compute", "data", "validation", "checkpoint", "start_up", "lost")
LONGEST_TEXT = 400_000  # characters of a diff or a traceback that are shown


@dataclass(frozen=True)
class Part:
    """What a file says, or why it says nothing."""

    value: Any = None
    problem: str | None = None


@dataclass(frozen=True)
class Saved:
    """A published checkpoint."""

    step: int
    size: int
    """In bytes, all files together."""
    files: int
    written: datetime.datetime


@dataclass(frozen=True)
class Record:
    """A run, with everything that its report shows."""

    run: Run
    metrics: Metrics
    config: Part
    environment: Part
    time: Part
    """The list of the attempts' accounts."""
    validation: Part
    diff: Part
    checkpoints: list[Saved]
    failures: list[tuple[str, Part]]
    """(file name, record) of each attempt that failed."""
    changes: Part
    """The list of the changes of the config."""

    @property
    def attempts(self) -> dict[int, int]:
        """After which step each attempt began, in their order."""
        first_steps = dict(self.metrics.attempts)
        for attempt in self.time.value or []:
            if type(attempt.get("attempt")) is int and type(attempt.get("first_step")) is int:
                first_steps[attempt["attempt"]] = attempt["first_step"]
        return dict(sorted(first_steps.items()))

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each account over all attempts; empty if they are not known."""
        totals: dict[str, float] = {}
        for attempt in self.time.value or []:
            for name, value in accounts(attempt).items():
                totals[name] = totals.get(name, 0.0) + value
        return totals


def read_record(path: Path) -> Record:
    """Everything in the run directory `path`."""
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
    """The seconds of an attempt's accounts that are numbers, the known ones first."""
    seconds = attempt.get("seconds")
    if not isinstance(seconds, dict):
        return {}
    names = [*(name for name in ACCOUNTS if name in seconds), *(name for name in seconds if name not in ACCOUNTS)]
    usable = {name: seconds[name] for name in names if type(seconds[name]) in (int, float)}
    return {name: float(value) for name, value in usable.items() if 0 <= value < float("inf")}


def read_part(path: Path) -> Part:
    """A JSON file."""
    text = _read_text(path)
    if text.problem:
        return text
    try:
        return Part(json.loads(text.value, parse_constant=lambda _: None))
    except (ValueError, RecursionError):
        return Part(problem=f"{path.name} is damaged.")


def _mapping(path: Path) -> Part:
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
        try:
            change = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn
        if isinstance(change, dict) and isinstance(change.get("changes"), dict):
            changes.append(change)
    return Part(changes)


def _checkpoints(path: Path) -> list[Saved]:
    """The published checkpoints; one that is removed as we look is left out."""
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
