"""One owner for a run directory: a second start is refused with the owner's names, a dead owner is taken over."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distloop.errors import UsageError
from distloop.run import lock as lock_module
from distloop.run.lock import LOCK, RunLock
from tests.tools import stage
from tests.tools.ranks import Ranks, train, wait_until, write_config
from tests.tools.records import rows, run_of, status

# ---- whole runs --------------------------------------------------------------------------------------------------


def short_run(folder: Path, **settings: Any) -> list[str]:
    """The arguments of a run of nine steps that can be held after each update."""
    base = {"data": "digits", "model": "mlp", "train": {"steps": 9}, "checkpoint": {"every_steps": 2}}
    base |= {"log": {"every_steps": 1}, "task": "tests.lab.crashing:Held"}
    return ["--config", str(write_config(folder, {**base, **settings}))]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Each file below `folder`, but the heartbeat and what belongs to nobody until it is renamed."""
    hidden = (LOCK, ".writing", "time.json", "failures/ranks.json", "failures/crash_")  # of ranks that live
    files = [path for path in folder.rglob("*") if path.is_file() and not any(part in str(path) for part in hidden)]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_start_is_refused_and_names_the_owner_which_is_not_disturbed(tmp_path: Path, world_size: int) -> None:
    config = short_run(tmp_path)
    run = run_of(tmp_path)
    stage.hold(tmp_path, "update", count=3)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_END_TIME": str(int(time.time()) + 36_000)}
    with Ranks(tmp_path, config, world_size, job) as first:
        stage.arrived(tmp_path, "update", range(world_size))
        wait_until((run / "checkpoints" / "step_00000002").exists, "the first checkpoint")
        wait_until(lambda: status(run)["step"] == 2, "its place in status.json")
        first_output = tmp_path / ".output-0"
        first_output.rename(tmp_path / "output-of-the-first")  # a second one writes to the same name
        before = contents(run)
        for more in ([], ["--resume", "never"], ["--optim.lr", "0.5"], ["--resume", "extend", "--train.steps", "20"]):
            second = train(tmp_path, [*config, *more], world_size)
            assert second.codes == [2] * world_size, second.output
            assert second.output.count("belongs to a run that is going on") == 1
            owner = f"process {first.processes[0].pid} on {os.uname().nodename}, Slurm job 4711, since "
            assert owner in second.output
            assert "Traceback" not in second.output
            assert contents(run) == before
            if world_size == 2:
                break  # who asks is rank 0 in any case
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run"]
        stage.let_go(tmp_path, "update")
        for process in first.processes:
            process.join(60)
    assert [process.exitcode for process in first.processes] == [0] * world_size
    assert status(run) == {**status(run), "state": "finished", "attempt": 1}
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 10))
    assert not (run / LOCK).exists()


def test_an_owner_that_was_killed_is_taken_over_at_once(tmp_path: Path) -> None:
    config = short_run(tmp_path)
    run = run_of(tmp_path)
    stage.hold(tmp_path, "update", count=5)
    ranks = Ranks(tmp_path, config, 1, {"SLURM_JOB_ID": "4711"})
    stage.arrived(tmp_path, "update")
    wait_until((run / "checkpoints" / "step_00000004").exists, "the second checkpoint")
    ranks.kill()
    ranks.join()
    assert (run / LOCK).exists()
    stage.let_go(tmp_path, "update")
    outcome = train(tmp_path, config).check()
    owner = f"process {ranks.processes[0].pid} on {os.uname().nodename}, Slurm job 4711"
    assert f"taken over from {owner}" in outcome.output
    assert "looking for up to" not in outcome.output  # without waiting for a beat
    assert status(run)["first_step"] == 4
    assert not (run / LOCK).exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_owner_that_finds_itself_taken_over_ends_and_begins_no_other_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """It was suspended, as a laptop or a virtual machine is, and meanwhile another machine found it without a pulse."""
    config = short_run(tmp_path, train={"steps": 100_000}, task="tests.lab.crashing:OftenSeen")
    run = run_of(tmp_path)
    # As much faster than the others look as it is by default, so that its beat is overdue when it wakes up.
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 1.2)
    for attempt in range(1, 4):  # it is woken up wherever it was in its loop
        with ExitStack() as locks, Ranks(tmp_path, config, world_size) as ranks:
            wait_until(partial(has_started, run, attempt), f"attempt {attempt}")
            for process in ranks.processes:
                os.kill(process.pid or 0, signal.SIGSTOP)
            lock = other_machine()
            locks.callback(lock.release)
            message = lock.acquire(run) or ""
            assert f"process {ranks.processes[0].pid} on " in message
            before = contents(run)
            half_written = [path.name[1:].removesuffix(".writing") for path in run.glob(".*.writing")]
            for process in ranks.processes:
                os.kill(process.pid or 0, signal.SIGCONT)
            for process in ranks.processes:
                process.join(30)
            outcome = ranks.join()
            assert outcome.codes == [1] * world_size
            assert "runs/run was taken over by process " in outcome.outputs[0]
            after = contents(run)
            # A call that writes cannot be taken back, should it be the place where the process was suspended.
            for name in half_written:
                before.pop(name, None)
                after.pop(name, None)
            more = after.pop("metrics.jsonl")[1].removeprefix(before.pop("metrics.jsonl")[1])
            assert more.count(b"\n") <= 1
            assert after == before
            assert owner_of(run) == lock.identity["token"]


def has_started(run: Path, attempt: int) -> bool:
    return (run / "metrics.jsonl").exists() and f'"attempt": {attempt},' in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("how", ["finished", "failed", "never"])
def test_the_lock_is_gone_when_the_run_is_over(tmp_path: Path, how: str) -> None:
    config = short_run(tmp_path)
    runs = tmp_path / "runs"
    if how == "failed":
        config = ["--config", str(write_config(tmp_path, {"data": "diabetes", "model": "linear", **FAILING}))]
        assert train(tmp_path, config).codes == [1]
        assert status(runs / "run")["state"] == "failed"
    else:
        train(tmp_path, config).check()
    if how == "never":
        train(tmp_path, [*config, "--resume", "never"]).check()
        assert (runs / "run.old-1").exists()
    assert [str(path) for path in runs.rglob("*lock*")] == []


FAILING = {"task": "tests.lab.failing:FailingTask", "train": {"steps": 5}}


@pytest.mark.parametrize("text", ["", "not JSON", "{}", "[1]", "\x00\xff", '{"processes": "SAME"}'])
def test_a_damaged_lock_neither_blocks_for_ever_nor_breaks_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 0.2)
    lock = RunLock()
    (tmp_path / LOCK).write_text(text.replace("SAME", str(lock.identity["processes"])), encoding="latin-1")
    assert "which is dead" in (lock.acquire(tmp_path) or "")
    assert owner_of(tmp_path) == lock.identity["token"]
    lock.release()
    assert list(tmp_path.iterdir()) == []


# ---- the lock alone ----------------------------------------------------------------------------------------------


def other_machine() -> RunLock:
    """A lock as another machine would take it: its process numbers say nothing here."""
    lock = RunLock()
    lock.identity.update(machine="elsewhere", processes="the boot of another machine", pid=os.getpid())
    return lock


NO_PROCESS = 2**22 + 1  # above the greatest number that Linux gives


def owner_of(folder: Path) -> str:
    return json.loads((folder / LOCK).read_text())["token"]


def lock_of_a_dead_process(folder: Path) -> None:
    """The lock of a process of this machine that has ended without a word, and whose number is in use again."""
    lock = RunLock()
    lock.identity["pid_started"] = "1"
    lock.acquire(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 1.2)


@pytest.mark.usefixtures("quick")
def test_an_owner_on_another_machine_is_refused_while_it_beats_and_taken_over_when_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = other_machine()
    owner.identity["slurm_job"] = "12"
    assert owner.acquire(tmp_path) is None
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.02):
            owner.beat()

    heart = threading.Thread(target=live)
    heart.start()
    second = RunLock()
    try:
        with pytest.raises(UsageError, match=rf"process {os.getpid()} on elsewhere, Slurm job 12, since 20"):
            second.acquire(tmp_path)
        second.release()  # of what it does not have
        assert owner_of(tmp_path) == owner.identity["token"]
    finally:
        over.set()
        heart.join()
    begun = time.monotonic()
    message = second.acquire(tmp_path)
    assert time.monotonic() - begun < 4
    assert message == f"taken over from {lock_module.describe(owner.identity)}, which is dead"
    assert owner_of(tmp_path) == second.identity["token"]
    assert "looking for up to" in capsys.readouterr().out  # why it takes a while


@pytest.mark.usefixtures("quick")
def test_the_clock_of_the_owner_does_not_count(tmp_path: Path) -> None:
    """Its file may be as old or as new as it likes: what counts is that it changes."""
    for when in (0, time.time() + 10**6):
        owner = other_machine()
        owner.acquire(tmp_path)
        os.utime(tmp_path / LOCK, (when, when))
        second = other_machine()
        second.identity["processes"] = "a third"
        assert second.acquire(tmp_path)
        second.release()


@pytest.mark.usefixtures("quick")
def test_a_machine_of_the_same_name_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """As copies of one image are. A number that no process has here says nothing about a process there."""
    owner = other_machine()
    owner.identity.update(machine=os.uname().nodename, pid=NO_PROCESS)
    owner.acquire(tmp_path)
    begun = time.monotonic()
    assert RunLock().acquire(tmp_path)
    assert time.monotonic() - begun >= lock_module.DEAD_SECONDS


def test_an_owner_of_another_user_that_the_system_hides_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters mount /proc with hidepid=2: then only the attempt to signal a process tells that it is there."""

    def forbidden(pid: int, _: int) -> None:
        if pid == NO_PROCESS:
            raise PermissionError

    owner = RunLock()
    owner.identity["pid"] = NO_PROCESS
    owner.acquire(tmp_path)
    assert lock_module.why_gone(tmp_path, owner.identity) == f"process {NO_PROCESS} on {os.uname().nodename} has ended"
    monkeypatch.setattr(os, "kill", forbidden)
    assert lock_module.why_gone(tmp_path, owner.identity) is None
    with pytest.raises(UsageError, match="belongs to a run that is going on"):
        RunLock().acquire(tmp_path)


@pytest.mark.parametrize(("job", "restart", "taken"), [("7", "1", True), ("7", "", False), ("8", "1", False)])
def test_the_same_slurm_job_requeued_takes_over_at_once_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str, taken: bool
) -> None:
    def never(_: float) -> None:
        raise AssertionError("it waited")

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = RunLock()  # alive, as far as anyone can see: this very process
    first.acquire(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    if restart:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    monkeypatch.setattr(time, "sleep", never)
    second = RunLock()
    if taken:
        assert "Slurm job 7" in (second.acquire(tmp_path) or "")
        assert owner_of(tmp_path) == second.identity["token"]
        first.release()  # the first, should it be there after all, leaves the other's lock alone
        assert owner_of(tmp_path) == second.identity["token"]
    else:
        with pytest.raises(UsageError, match="Slurm job 7"):
            second.acquire(tmp_path)


def race(folder: Path, racers: int) -> tuple[list[RunLock], list[str]]:
    """Threads that all want this folder: the locks that got it, and what the others were told."""
    barrier = threading.Barrier(racers)
    got: list[RunLock] = []
    refused: list[str] = []

    def run(lock: RunLock) -> None:
        barrier.wait()
        try:
            lock.acquire(folder)
            got.append(lock)
        except UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(RunLock(),)) for _ in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got, refused


@pytest.mark.parametrize("racers", [2, 5])
@pytest.mark.parametrize("before", ["a dead owner", "nobody"])
def test_of_several_that_start_at_the_same_time_one_gets_the_lock(tmp_path: Path, before: str, racers: int) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places often, as processes would
    try:
        for turn in range(60):
            folder = tmp_path / str(turn)
            folder.mkdir()
            if before == "a dead owner":
                lock_of_a_dead_process(folder)
            got, refused = race(folder, racers)
            assert len(got) == 1, f"turn {turn}: {len(got)} own the directory"
            assert len(refused) == racers - 1
            assert owner_of(folder) == got[0].identity["token"]
            assert [path.name for path in folder.iterdir()] == [LOCK]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.long
def test_a_run_waits_for_the_heartbeat_of_another_machine_and_goes_on_where_there_is_none(tmp_path: Path) -> None:
    """With the limits as they are, and real ranks."""
    config = short_run(tmp_path)
    run = run_of(tmp_path)
    stage.hold(tmp_path, "update", count=5)
    ranks = Ranks(tmp_path, config, 2)
    stage.arrived(tmp_path, "update", range(2))
    wait_until((run / "checkpoints" / "step_00000004").exists, "the second checkpoint")
    ranks.kill()
    ranks.join()
    (run / LOCK).unlink()
    stage.let_go(tmp_path, "update")
    over = threading.Event()
    owner = other_machine()
    with ExitStack() as stack:
        owner.acquire(run)
        stack.callback(owner.release)

        def live() -> None:
            while not over.wait(0.1):
                owner.beat()

        heart = threading.Thread(target=live)
        heart.start()
        outcome = train(tmp_path, config, 2)
        over.set()
        heart.join()
        assert outcome.codes == [2, 2]
        assert outcome.output.count(f"belongs to a run that is going on: process {os.getpid()} on elsewhere") == 1
        begun = time.monotonic()
        outcome = train(tmp_path, config, 2).check()
        assert time.monotonic() - begun < lock_module.DEAD_SECONDS + 20
        assert "looking for up to 30 s whether process" in outcome.output
        assert f"taken over from process {os.getpid()} on elsewhere" in outcome.output
        assert (status(run)["state"], status(run)["first_step"]) == ("finished", 4)
