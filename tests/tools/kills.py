"""For tests that kill -9: the moment of the kill, and what it has left."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

from distloop.run.checkpoint import newest_published, step_of
from tests.tools.ranks import Ranks


def last_row(run: Path) -> tuple[int, int]:
    """(attempt, step) of the last whole row of metrics.jsonl, cheaply: it is the kill that is to disturb the run."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes()[-2000:].split(b"\n")[:-1] if path.exists() else []
    found = re.search(rb'"step": (\d+).*"attempt": (\d+)', lines[-1]) if lines else None
    return (int(found[2]), int(found[1])) if found else (0, 0)


def has_reached(run: Path, attempt: int, step: int) -> bool:
    """Whether an attempt after this one has logged this step, or a later one."""
    last = last_row(run)
    return last[0] > attempt and last[1] >= step


def saves_under_way(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".writing_*"))


def newest_step(run: Path) -> int:
    newest = newest_published(run / "checkpoints")
    return step_of(newest) if newest else 0


def started_from(output: str) -> int | None:
    """The step that the attempt says it continues after; None for one that was killed before it said anything."""
    if "steps in all" not in output:
        return None
    found = re.search(r"continuing after step (\d+) of", output)
    return int(found[1]) if found else 0


def await_moment(kind: str, run: Path, ranks: Ranks, attempt: int, step: int, chance: random.Random) -> None:
    """Return at the moment of the kill: some time after the start, or some time after `step`, or in the next save.

    `attempt` is the one before. No moment is later than a few steps after `step`, however fast the machine is.
    """
    alive = ranks.processes[0].is_alive
    begun, wait = time.monotonic(), chance.uniform(0, 1.5) if kind == "start-up" else 60
    while alive() and not has_reached(run, attempt, step) and time.monotonic() - begun < wait:
        time.sleep(0.002)
    if kind == "save":
        while alive() and not saves_under_way(run) and time.monotonic() - begun < wait:
            time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.01))  # anywhere in it, in its end too
