"""Read all that a report needs from a run directory. Files may be missing, damaged or being written."""

import datetime
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distloop.commands.reading import Run, checkpoint_steps, parse_json, read_run
from distloop.commands.report.curves import Metrics, read_metrics
from distloop.config.yaml_text import parse_yaml
from distloop.run.files import CHECKPOINTS, CONFIG, ENVIRONMENT, FAILURES, GIT_DIFF, TIME, VALIDATION

CHANGES = "config_changes.jsonl"
ACCOUNTS = ("compute", "data", "validation", "checkpoint", "start_up", "lost")
LONGEST_TEXT = 400_000  # characters of a diff or a traceback; the rest is cut


class Part(NamedTuple):
    """The content of a file, or why it has none."""

    value: Any = None
    problem: str | None = None
    """A sentence; None if the file was read."""


class Saved(NamedTuple):
    """A published checkpoint."""

    step: int
    size: int
    """Bytes of all files together."""
    files: int
    written: datetime.datetime


class Record(NamedTuple):
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
        return total_seconds(map(accounts, self.time.value or []))


def read_record(path: Path) -> Record:
    """The record of the run in the directory `path`."""
    return Record(
        run=read_run(path),
        metrics=read_metrics(path),
        config=_read(path / CONFIG, parse_yaml),
        environment=_read(path / ENVIRONMENT),
        time=_read(path / TIME, _parse_attempts, list),
        validation=_read(path / VALIDATION),
        diff=_read(path / GIT_DIFF, str, str),
        checkpoints=_checkpoints(path),
        failures=[(file.name, _read(file)) for file in sorted((path / FAILURES).glob("attempt_*.json"))],
        changes=_read(path / CHANGES, _parse_changes, list),
    )


def accounts(attempt: dict[str, Any]) -> dict[str, float]:
    """account -> seconds of an attempt, for those that are numbers; the accounts of ACCOUNTS come first."""
    seconds = attempt.get("seconds")
    if not isinstance(seconds, dict):
        return {}
    names = [*(name for name in ACCOUNTS if name in seconds), *(name for name in seconds if name not in ACCOUNTS)]
    usable = {name: seconds[name] for name in names if type(seconds[name]) in (int, float)}
    return {name: float(value) for name, value in usable.items() if 0 <= value < float("inf")}


def total_seconds(several: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums of several mappings account -> seconds."""
    totals: dict[str, float] = {}
    for seconds in several:
        for name, value in seconds.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _read(path: Path, parse: Callable[[str], Any] = parse_json, kind: type = dict) -> Part:
    """The content of a file, which `parse` must turn into a `kind`."""
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return Part(problem=f"There is no {path.name}.")
    except OSError as error:
        return Part(problem=f"{path.name} cannot be read: {error.strerror}.")
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    return Part(value) if isinstance(value, kind) else Part(problem=f"{path.name} is damaged.")


def _parse_attempts(text: str) -> list[dict[str, Any]] | None:
    """The attempts' entries in time.json; None if the file is damaged."""
    value = parse_json(text)
    attempts = value.get("attempts") if isinstance(value, dict) else None
    well_formed = isinstance(attempts, list) and all(isinstance(attempt, dict) for attempt in attempts)
    return attempts if well_formed else None


def _parse_changes(text: str) -> list[dict[str, Any]]:
    """The lines of config_changes.jsonl, without one that is being written."""
    lines = map(parse_json, text.splitlines())
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("changes"), dict)]


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
