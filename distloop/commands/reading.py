"""Read run directories, also while their runs write them. Nothing here imports torch.

What is missing, damaged or of another version becomes None and raises no error, so that the other runs are shown.
"""

import contextlib
import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distloop.run.best import Rule
from distloop.run.files import CHECKPOINTS, FAILURES, METRICS, RANKS, STATUS
from distloop.run.lock import LOCK, owner_of, why_gone
from distloop.run.metrics import is_metric
from distloop.run.set_aside import BLOCK_BYTES, blocks_from_end

VALIDATE = b'"validate"'


@dataclass(frozen=True)
class Run:
    """A run as its directory shows it; None for what the directory does not tell."""

    path: Path
    name: str
    state: str
    """running, finished, stopped or failed: as in status.json. starting: an attempt has not written status.json yet.
    gone: status.json says running, but the process does not exist. damaged: status.json cannot be read."""
    reason: str | None
    """Why it is stopped, failed, gone or damaged."""
    step: int | None
    """How many steps are done if the run is running, else how many are saved."""
    total_steps: int | None
    saved_step: int | None
    first_step: int | None
    """How many steps were done when the attempt began."""
    attempt: int | None
    written: str | None
    """When status.json was written (at the start, the last save or the end): ISO 8601 with a time zone."""
    best: dict[str, Any] | None
    """The best validation row: step, loss, …"""
    best_rule: Rule | None
    """The rule by which it is the best: (metric, min | max)."""
    slurm_job: str | None
    slurm_restart: int | None
    ranks: list[dict[str, Any]]
    """Where each rank was last seen, if the run is running or gone: rank, node, pid, step, phase."""


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return any((path / part).exists() for part in (STATUS, LOCK, CHECKPOINTS))


def runs_in(folder: Path) -> list[Run]:
    """The runs whose directories lie in `folder`. Raises OSError if it is no folder, or cannot be read."""
    return [read_run(path) for path in folder.iterdir() if not path.name.startswith(".") and is_run(path)]


def read_run(path: Path) -> Run:
    """The run in the directory `path`."""
    for _ in range(5):
        status = _read_status(path)
        owner, gone_reason = _read_owner(path)
        # A run whose process does not exist is gone, or has ended or started again between the two readings.
        if gone_reason is None or status["state"] != "running" or status == _read_status(path):
            break
    state, reason = status["state"], _text(status.get("reason"))
    begins_again = _is_after(owner.get("since"), status.get("written"))
    if gone_reason is not None and state in ("running", "starting"):
        state, reason = "gone", gone_reason
    elif gone_reason is None and begins_again and state not in ("running", "damaged"):
        state, reason = "starting", None
    elif state == "finished" and status.get("step") == status.get("total_steps"):  # it did not end early
        reason = None
    ranks = _read_ranks(path, owner) if state in ("running", "gone") else []
    saved_step = _whole(status.get("step"))
    live_steps = [step for step in (_whole(rank.get("step")) for rank in ranks) if step is not None]
    slurm = owner if owner.get("slurm_job") else status
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
        best=_mapping(status.get("best")),
        best_rule=_rule(status.get("best_rule")),
        slurm_job=_text(slurm.get("slurm_job")),
        slurm_restart=_whole(slurm.get("slurm_restart")),
        ranks=ranks,
    )


def validation_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The validation rows of the run in `path`, in order, without a line that is being written."""
    rest = b""
    with contextlib.suppress(OSError), open(path / METRICS, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            lines, end, rest = (rest + chunk).rpartition(b"\n")
            yield from _validations_in(lines + end)
        yield from _validations_in(rest)


def last_validation(path: Path) -> dict[str, Any] | None:
    """The last validation row, or None. It is looked for from the end of the file."""
    with contextlib.suppress(OSError), open(path / METRICS, "rb") as file:
        for _, lines in blocks_from_end(file):
            if rows := list(_validations_in(lines)):
                return rows[-1]
    return None


def _validations_in(lines: bytes) -> Iterator[dict[str, Any]]:
    """The validation rows in some lines. The others, most of a million, are not even split: that would take seconds."""
    place = lines.find(VALIDATE)
    while place >= 0:
        begin, end = lines.rfind(b"\n", 0, place) + 1, lines.find(b"\n", place)
        end = len(lines) if end < 0 else end  # the last line, which may be being written
        row = parse_json(lines[begin:end])
        if isinstance(row, dict) and row.get("kind") == "validate" and _whole(row.get("step")) is not None:
            yield row
        place = lines.find(VALIDATE, end)


def metrics_in(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a validation row that are finite numbers."""
    return {name: value for name, value in row.items() if is_metric(name) and _is_number(value)}


def checkpoint_steps(path: Path) -> list[int]:
    """The steps of the published checkpoints."""
    names = [entry.name.removeprefix("step_") for entry in (path / CHECKPOINTS).glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal())


def seconds_since(moment: str | None) -> float | None:
    """Seconds since an ISO 8601 time; 0 for a time in the future, which another machine's clock may give."""
    then = _parse_time(moment)
    return None if then is None else max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds())


def failure_of(run: Run) -> dict[str, Any] | None:
    """The record of the failure of the run's last attempt: rank, node, step, phase, traceback, …"""
    if run.state not in ("failed", "gone"):
        return None
    return _read_mapping(run.path / FAILURES / f"attempt_{run.attempt or 0:04d}.json")


def _read_status(path: Path) -> dict[str, Any]:
    """The content of status.json. If there is none, the state is "starting"; if it cannot be read, "damaged"."""
    try:
        status = _mapping(parse_json((path / STATUS).read_bytes()))
    except FileNotFoundError:
        return {"state": "starting"}
    except OSError as error:
        return {"state": "damaged", "reason": f"{STATUS} cannot be read: {error.strerror}"}
    if status and _text(status.get("state")) is not None:
        return status
    return {"state": "damaged", "reason": f"{STATUS} is damaged"}


def _read_owner(path: Path) -> tuple[dict[str, Any], str | None]:
    """(the owner that the lock names, why its process counts as gone or None)."""
    try:
        owner = owner_of(path)
        return owner or {}, why_gone(path, owner)
    except OSError:  # no permission to read the lock: the process may exist
        return {}, None


def _read_ranks(path: Path, owner: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the ranks of this attempt are. What an earlier attempt has written is ignored."""
    record = _read_mapping(path / RANKS) or {}
    ranks = record.get("ranks")
    if not isinstance(ranks, list) or _is_after(owner.get("since"), record.get("written")):
        return []
    return [rank for rank in ranks if isinstance(rank, dict)]


def _read_mapping(path: Path) -> dict[str, Any] | None:
    try:
        return _mapping(parse_json(path.read_bytes()))
    except OSError:
        return None


def parse_json(text: bytes | str) -> Any:
    """The JSON value, with None for nan and infinity; None if the text is not JSON."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _parse_time(moment: str | None) -> datetime.datetime | None:
    try:
        then = datetime.datetime.fromisoformat(moment or "")
    except (ValueError, TypeError):
        return None
    return then if then.tzinfo else then.replace(tzinfo=datetime.UTC)


def _is_after(time: Any, other: Any) -> bool:
    """Whether the first time is later than the second, or the second is missing; False if the first is missing."""
    first, second = _parse_time(_text(time)), _parse_time(_text(other))
    return first is not None and (second is None or first > second)


def _rule(value: Any) -> Rule | None:
    well_formed = isinstance(value, list) and len(value) == 2 and value[1] in ("min", "max")
    return (str(value[0]), value[1]) if well_formed else None


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
