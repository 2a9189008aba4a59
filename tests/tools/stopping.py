"""For tests of stopping: runs that wait where a test wants them, and what must hold of a stopped one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distloop.ranks.stopping import SECOND_INTERRUPT_SECONDS
from distloop.run.checkpoint import published_in, step_of, verify
from tests.tools.ranks import Ranks, wait_until, write_config
from tests.tools.records import rows, run_of, status

STEPS = 60
NOTICE = "finishing what is going on, then saving and stopping"
SECONDS_TO_GO = 10.0  # what a process may outlive the one that it works for


def waiting_run(folder: Path, **changes: Any) -> list[str]:
    """The arguments of a run of tests.lab.stopping with two loader workers on each rank, for RUN in `folder`."""
    settings: dict[str, Any] = {
        "data": {"name": "tests.lab.stopping:points", "workers": 2, "args": {"slow_disk": True}},
        "model": "linear",
        "task": {"name": "tests.lab.stopping:Waiting", "args": {}},
        "device": "cpu",
        "batch": {"global_size": 16},
        "train": {"steps": STEPS},
        "validate": {"every_steps": 8, "batch_size": 2},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1},
        **changes,
    }
    return ["--config", str(write_config(folder, settings))]


def reached(folder: Path, step: int) -> None:
    """Wait until a row of this step is logged."""

    def there() -> bool:
        path = run_of(folder) / "metrics.jsonl"
        return path.exists() and any(f'"step": {number},' in path.read_text() for number in (step, step + 1))

    wait_until(there, f"step {step}")


def processes_of(folder: Path, marker: str | None = None) -> dict[int, str]:
    """The living processes that work in `folder`, or have `marker` in their environment: {number: command line}.

    Ranks from the forkserver have no environment of their own in /proc, but all are started in the test's folder.
    """
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal() or int(path.name) == os.getpid():
            continue
        try:
            marked = marker is not None and marker.encode() in (path / "environ").read_bytes()
            if marked or Path(os.readlink(path / "cwd")).is_relative_to(folder):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # ended meanwhile, or is dead and waits for its parent
    return found


def children(pid: int) -> list[int]:
    """The living child processes of a process."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split() if path.name.isdecimal() else []
        except OSError:
            continue
        if fields and int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.name))
    return found


def press_again(ranks: Ranks, whom: Iterable[int]) -> None:
    """Press Ctrl-C for these ranks as long after the first one as makes it the second: nothing says when that is."""
    time.sleep(SECOND_INTERRUPT_SECONDS + 0.2)
    for rank in whom:
        os.kill(ranks.processes[rank].pid or 0, signal.SIGINT)


def kill_all(folder: Path, name: str = "") -> None:
    """kill -9 the processes that work in `folder` and have this name in their command line, as when a node dies."""
    for pid, words in processes_of(folder).items():
        if name in words:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def check_nothing_runs(folder: Path, marker: str | None = None, seconds: float = SECONDS_TO_GO) -> None:
    """No process of this test is left, `seconds` from now at the latest."""
    deadline = time.monotonic() + seconds
    while left := processes_of(folder, marker):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def check_stopped(folder: Path, output: str, reason: str, steps: int = STEPS, heard: bool = True) -> int:
    """The run in `folder` was stopped in order, for this reason; returns after which step.

    `output`: rank 0's. heard: the wish came to rank 0, which speaks for its machine.
    """
    run = run_of(folder)
    now = status(run)
    assert (now["state"], now["reason"]) == ("stopped", reason), output
    step = now["step"]
    assert 0 < step < steps
    newest = published_in(run / "checkpoints")[-1]
    assert step_of(newest) == step
    verify(newest)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, step + 1))  # no step that is not saved
    assert output.strip().splitlines()[-1].startswith(f"stopped after step {step} of {steps} ({reason}), saved in")
    assert output.count(NOTICE) in ((1,) if heard else (0, 1)), output
    assert "Traceback" not in output
    complaints = [line for line in output.splitlines() if line.startswith(("distloop: ", "WARNING: "))]
    assert [line for line in complaints if NOTICE not in line] == [], output
    assert sorted(path.name for path in run.iterdir() if path.name in ("STOP", "lock.json")) == []
    assert list((run / "checkpoints").glob(".*")) == []
    return step


def check_finished(folder: Path, stopped_after: int, steps: int = STEPS) -> None:
    """The run in `folder` went on after a stop, and to its end, each step once."""
    run = run_of(folder)
    now = status(run)
    assert (now["state"], now["first_step"], now["step"]) == ("finished", stopped_after, steps)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, steps + 1))
