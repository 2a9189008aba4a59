"""time.json: where the wall time of all attempts went, and how much of it was in steps that counted."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distloop.run.files import TIME, Start, now, read_json, write_text

if TYPE_CHECKING:
    from distloop.run.clock import Clock

REDONE = ("data", "compute", "validation")  # what another attempt does again
SHARE_BETWEEN = 0.005  # of the attempt's time may pass between two writings: an end by kill -9 is known that well
LONGEST_BETWEEN = 30.0


class TimeAccounts:
    """Keeps time.json for this attempt, on rank 0."""

    def __init__(
        self, start: Start, clock: Clock, world_size: int, enabled: bool, check_ownership: Callable[[], None]
    ) -> None:
        """Time of earlier attempts after the checkpoint that this one continues from is moved to "lost"."""
        self.path, self.clock, self.enabled = start.path / TIME, clock, enabled
        self.check_ownership = check_ownership
        mark = read_json(start.checkpoint / "state.json").get("time") if start.checkpoint else None
        self.earlier = [settle(entry, mark) for entry in attempts(start.path) if entry["attempt"] < start.attempt]
        self.entry: dict[str, Any] = {"attempt": start.attempt, "began": now(), "state": "running"}
        self.entry |= {"world_size": world_size, "device": clock.device.type, "first_step": start.step}
        self.next_write = 0.0
        self.writing = threading.Lock()  # the loop's thread and the one that watches
        self.closed = False

    def mark(self) -> dict[str, Any]:
        """The accounts so far, for a checkpoint."""
        return {"attempt": self.entry["attempt"], "seconds": self.clock.totals()}

    def write_now_and_then(self) -> None:
        """Write if it is time to: time.json of a killed process is then at most half a percent, or a tick(), old."""
        if time.monotonic() >= self.next_write:
            self.write()

    def write(self, state: str | None = None) -> None:
        """Write the accounts so far; `state`: how the attempt has ended (finished | stopped | failed)."""
        if not self.enabled:
            return
        self.check_ownership()
        with self.writing:
            if self.closed:  # another process may own the run directory by now
                return
            self.entry["state"] = state or self.entry["state"]
            self.entry["step"] = self.entry["first_step"] + self.clock.steps
            self.entry["seconds"] = seconds = self.clock.totals()
            self.next_write = time.monotonic() + min(LONGEST_BETWEEN, SHARE_BETWEEN * sum(seconds.values()))
            with contextlib.suppress(OSError):  # of a full disk, others warn
                write_text(self.path, json.dumps({"attempts": [*self.earlier, self.entry]}) + "\n", synced=False)

    def close(self, state: str | None = None) -> None:
        """Write the accounts for the last time."""
        self.write(state)
        with self.writing:
            self.closed = True


def attempts(run: Path) -> list[dict[str, Any]]:
    """The entries of all attempts so far: attempt, began, seconds {account: …}, world_size, device, first_step, step,
    and state, which is killed for one that could not say how it ended. What is damaged is left out."""
    content = read_json(run / TIME)
    entries = content.get("attempts") if isinstance(content, dict) else None
    return [entry for entry in entries if _is_whole(entry)] if isinstance(entries, list) else []


def _is_whole(entry: Any) -> bool:
    seconds = entry.get("seconds") if isinstance(entry, dict) else None
    if not isinstance(seconds, dict) or not isinstance(entry.get("attempt"), int):
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in seconds.values())


def settle(entry: dict[str, Any], mark: dict[str, Any] | None) -> dict[str, Any]:
    """An earlier attempt's entry, with its work after `mark` (see TimeAccounts.mark; None: the beginning) as lost."""
    if entry.get("state") == "running":
        entry = {**entry, "state": "killed"}
    reached = mark["attempt"] if mark else 0
    if entry["attempt"] < reached:
        return entry
    counted = mark["seconds"] if mark and entry["attempt"] == reached else {}
    seconds = dict(entry["seconds"])
    for account in REDONE:
        before = seconds.get(account, 0.0)
        seconds[account] = min(before, counted.get(account, 0.0))
        seconds["lost"] = seconds.get("lost", 0.0) + before - seconds[account]
    return {**entry, "seconds": seconds}


def totals(run: Path) -> dict[str, float]:
    """Seconds of each account over all attempts of a run."""
    sums: dict[str, float] = {}
    for entry in attempts(run):
        for account, seconds in entry["seconds"].items():
            sums[account] = sums.get(account, 0.0) + seconds
    return sums


def goodput(seconds: dict[str, float]) -> float | None:
    """The share of the wall time in steps that counted, waiting for their data included; None without any time."""
    wall = sum(seconds.values())
    return (seconds.get("data", 0.0) + seconds.get("compute", 0.0)) / wall if wall else None
