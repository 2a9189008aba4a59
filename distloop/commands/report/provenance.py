"""The sections about what a run was, and what it left. Each function returns the variables of a template."""

import json
import shlex
from typing import Any

from distloop.commands.report.read import LONGEST_TEXT, Record
from distloop.commands.report.sections import NothingToShowError, content_of
from distloop.config.comparison import dotted, flatten
from distloop.config.settings import Config

KEYS_OF_ONE_RUN = ("config", "name", "runs_dir")  # each run has its own; they are no change
MOST_LINES = 6000  # of a diff
KINDS_OF_LINES = {"+++": "file", "---": "file", "diff ": "file", "@@": "at", "+": "add", "-": "del"}
HEAD_OF_FAILURE = ("rank", "node", "step", "phase", "what", "traceback", "others", "ranks")  # not under "More"


def config(record: Record) -> dict[str, Any]:
    """The settings that differ from their defaults, and all settings."""
    settings = dotted(content_of(record.config))
    as_in_a_file = json.loads(json.dumps(flatten(Config())))  # with lists for tuples
    defaults = {"own": {}} | dotted(as_in_a_file)
    changed = [key for key in settings if key not in KEYS_OF_ONE_RUN and settings[key] != defaults.get(key)]
    return {"settings": settings, "defaults": defaults, "changed": changed}


def changes(record: Record) -> dict[str, Any]:
    """The changes of settings with which the run was extended."""
    problem = record.changes.problem or ""
    changes = [] if problem.startswith("There is no") else content_of(record.changes)
    rows = []
    for change in changes:
        for key, pair in change["changes"].items():
            old, new = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
            rows.append((change.get("after_attempt"), change.get("after_step"), key, old, new))
    if not rows:
        raise NothingToShowError(f"{problem} The config never changed.".strip())
    return {"changes": rows}


def environment(record: Record) -> dict[str, Any]:
    """Versions, machine and command."""
    others = dict(content_of(record.environment))
    command, versions, changed = (others.pop(key, None) for key in ("command", "versions", "git_changes"))
    return {
        "versions": versions if isinstance(versions, dict) else None,
        "others": {key.replace("_", " "): value for key, value in others.items() if value is not None},
        "git_changes": changed,
        "command": " ".join(shlex.quote(str(word)) for word in command) if isinstance(command, list) else None,
    }


def diff(record: Record) -> dict[str, Any]:
    """The uncommitted changes."""
    content = content_of(record.diff)
    if not content.strip():
        raise NothingToShowError("There were no uncommitted changes.")
    lines = content[:LONGEST_TEXT].splitlines()
    kinds = [next((KINDS_OF_LINES[start] for start in KINDS_OF_LINES if line.startswith(start)), "") for line in lines]
    return {
        "lines": list(zip(kinds, lines, strict=True))[:MOST_LINES],
        "length": len(content.splitlines()),
        "added": kinds.count("add"),
        "removed": kinds.count("del"),
        "is_cut": len(content) > LONGEST_TEXT or len(lines) > MOST_LINES,
    }


def checkpoints(record: Record) -> dict[str, Any]:
    """The checkpoints, the last first."""
    if not record.checkpoints:
        raise NothingToShowError("There is no checkpoint.")
    return {"checkpoints": record.checkpoints[::-1], "best": (record.run.best or {}).get("step")}


def failures(record: Record) -> dict[str, Any]:
    """The attempts that failed: where and why."""
    if not record.failures:
        raise NothingToShowError("No attempt has failed.")
    attempts = [name.removeprefix("attempt_").removesuffix(".json").lstrip("0") for name, _ in record.failures]
    parts = [part for _, part in record.failures]
    return {"failures": list(zip(attempts, parts, strict=True)), "head": HEAD_OF_FAILURE, "longest": LONGEST_TEXT}
