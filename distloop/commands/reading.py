"""What run directories say of themselves, read while they are being written: nothing here imports torch.

Whatever is missing, of another version or damaged is None, and never an error: other runs are to be shown all the same.
"""

from __future__ import annotations

import collections
import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distloop.run.files import CHECKPOINTS, METRICS, RANKS, STATUS
from distloop.run.lock import LOCK, owner_of, why_gone
from distloop.run.metrics import NO_METRICS


@dataclass(frozen=True)
class Run:
    """A run as its directory shows it; None for what is not known."""

    path: Path
    name: str
    state: str
    """running, finished, stopped, failed, as in status.json; starting: an attempt has not written it yet; gone: it
    says running, but its process is not there; damaged: it cannot be read."""
    reason: str | None
    """Why it is stopped, failed, gone or damaged."""
    step: int | None
    """Where it is if it is running, else what is saved."""
    total_steps: int | None
    saved_step: int | None
    first_step: int | None
    """Where the attempt began."""
    attempt: int | None
    written: str | None
    """When status.json was written, that is at the start, the last save or the end: ISO 8601 with its time zone."""
    best: dict[str, Any] | None
    """The best validation: step, loss, …"""
    best_rule: tuple[str, str] | None
    """(metric, min | max) by which it is the best."""
    slurm_job: str | None
    slurm_restart: int | None
    ranks: list[dict[str, Any]]
    """Where the ranks of a run that is running or gone were last: rank, node, pid, step, phase."""


def is_run(path: Path) -> bool:
    """Whether this is a run's own directory."""
    return any((path / part).exists() for part in (STATUS, LOCK, CHECKPOINTS))


def runs_in(folder: Path) -> list[Run]:
    """The runs whose directories lie in `folder`. Raises OSError when it is no folder that can be read."""
    return [read_run(path) for path in folder.iterdir() if not path.name.startswith(".") and is_run(path)]


def read_run(path: Path) -> Run:
    """The run in the directory `path`."""
    status, problem = _read_status(path)
    owner, gone = _look_at_owner(path)
    for _ in range(5):
        if gone is None or not status or status.get("state") != "running":
            break
        # No process: it is gone, or has ended (or begun again) between the two looks.
        before = status
        status, problem = _read_status(path)
        if status == before:
            break
        owner, gone = _look_at_owner(path)
    status = status or {}
    state, reason = _text(status.get("state")) or "damaged", _text(status.get("reason"))
    if problem:
        state, reason = "damaged", problem
    elif gone is not None and state in ("running", "starting"):
        state, reason = "gone", gone
    elif gone is None and state != "running" and _is_after(owner.get("since"), status.get("written")):
        state, reason = "starting", None
    elif state == "finished":
        reason = None
    ranks = _read_ranks(path, owner) if state in ("running", "gone") else []
    saved_step = _whole(status.get("step"))
    live_steps = [step for step in (_whole(rank.get("step")) for rank in ranks) if step is not None]
    best = status.get("best")
    in_slurm = owner if owner.get("slurm_job") else status
    return Run(
        path=path,
        name=path.resolve().name,
        state=state,
        reason=reason,
        step=max(saved_step or 0, min(live_steps)) if live_steps and state == "running" else saved_step,
        total_steps=_whole(status.get("total_steps")),
        saved_step=saved_step,
        first_step=_whole(status.get("first_step")),
        attempt=_whole(status.get("attempt")),
        written=_text(status.get("written")),
        best=best if isinstance(best, dict) else None,
        best_rule=_rule(status.get("best_rule")),
        slurm_job=_text(in_slurm.get("slurm_job")),
        slurm_restart=_whole(in_slurm.get("slurm_restart")),
        ranks=ranks,
    )


def validation_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The validation rows of the run in `path`, one after the other; a line that is being written is left out."""
    try:
        with open(path / METRICS, "rb") as file:
            for line in file:
                if b'"validate"' not in line:  # of a million rows most; parsing them would take seconds
                    continue
                row = _parse(line)
                if isinstance(row, dict) and row.get("kind") == "validate" and _whole(row.get("step")) is not None:
                    yield row
    except OSError:
        return


def last_validation(path: Path) -> dict[str, Any] | None:
    """The last validation row, if there is one."""
    rows = collections.deque(validation_rows(path), maxlen=1)
    return rows[0] if rows else None


def metrics_in(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a validation row that are numbers."""
    return {name: value for name, value in row.items() if name not in NO_METRICS and _is_number(value)}


def checkpoint_steps(path: Path) -> list[int]:
    """The steps of the published checkpoints."""
    names = [entry.name.removeprefix("step_") for entry in (path / CHECKPOINTS).glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal())


def seconds_since(moment: str | None) -> float | None:
    """The age of an ISO 8601 time; 0 for one that lies ahead, by another machine's clock."""
    then = _time(moment)
    return None if then is None else max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds())


def failure_of(run: Run) -> dict[str, Any] | None:
    """What the run's attempt has kept of its failure: rank, node, step, phase, traceback, …"""
    try:
        record = _parse((run.path / "failures" / f"attempt_{run.attempt or 0:04d}.json").read_bytes())
    except OSError:
        return None
    return record if isinstance(record, dict) and run.state in ("failed", "gone") else None


def _read_status(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What status.json says, or why it cannot be read; without one the run has not begun."""
    try:
        status = _parse((path / STATUS).read_bytes())
    except FileNotFoundError:
        return {"state": "starting"}, None
    except OSError as error:
        return None, f"{STATUS} cannot be read: {error.strerror}"
    if not isinstance(status, dict) or not isinstance(status.get("state"), str):
        return None, f"{STATUS} is damaged"
    return status, None


def _look_at_owner(path: Path) -> tuple[dict[str, Any], str | None]:
    """The owner as in the lock, and why it is gone if it is."""
    try:
        owner = owner_of(path)
        return owner or {}, why_gone(path, owner)
    except OSError:  # not ours to read: nobody knows that it is gone
        return {}, None


def _read_ranks(path: Path, owner: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the ranks of this attempt are; what an earlier one left says nothing."""
    try:
        record = _parse((path / RANKS).read_bytes())
    except OSError:
        return []
    if not isinstance(record, dict) or not isinstance(record.get("ranks"), list):
        return []
    if _is_after(owner.get("since"), record.get("written")):
        return []
    return [rank for rank in record["ranks"] if isinstance(rank, dict)]


def _parse(text: bytes) -> Any:
    """JSON, with null for the numbers that it does not have; None if it is none."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _time(moment: str | None) -> datetime.datetime | None:
    try:
        then = datetime.datetime.fromisoformat(moment or "")
    except (ValueError, TypeError):
        return None
    return then if then.tzinfo else then.replace(tzinfo=datetime.UTC)


def _is_after(one: Any, other: Any) -> bool:
    """Whether one time is after another; also if the other is not known."""
    first, second = _time(_text(one)), _time(_text(other))
    return first is not None and (second is None or first > second)


def _rule(value: Any) -> tuple[str, str] | None:
    well_formed = isinstance(value, list) and len(value) == 2 and value[1] in ("min", "max")
    return (str(value[0]), value[1]) if well_formed else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
