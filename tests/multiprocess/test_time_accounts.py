"""Real runs: the accounts of all attempts add up to their wall time, seen from outside, and what is lost is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distloop.run.accounts import attempts, goodput, totals
from distloop.run.checkpoint import published_in, step_of
from tests.lab.timing import BATCH, slept
from tests.tools import stage
from tests.tools.ranks import Ranks, clean_environment, train, wait_until, write_config
from tests.tools.records import rows, status

STEPS, SAVED = 16, 4
SHARE, SLACK = 0.01, 0.8  # seconds: the system takes some tenths to end a process, and a killed one wrote before that
OVERHEAD = 1.0  # what an account may have besides what was slept, on a machine that does other things as well

SETTINGS: dict[str, Any] = {
    "data": {"name": "tests.lab.timing:points", "collate": "tests.lab.timing:collate", "workers": 0},
    "model": "tests.lab.timing:Model",
    "task": "tests.lab.timing:Task",
    "device": "cpu",
    "batch": {"global_size": BATCH},
    "train": {"steps": STEPS},
    "validate": {"every_steps": SAVED, "batch_size": BATCH},
    "checkpoint": {"every_steps": SAVED, "keep_last": 100},
    "log": {"every_steps": 1},
    "tracking": {"report": False},
}


def began(pid: int) -> float:
    """When a process was started, in seconds since the machine was."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Attempts:
    """Starts of one run in `folder`, and how long each took from its process's start to its end."""

    def __init__(self, folder: Path, world_size: int = 1, **changes: Any) -> None:
        self.folder, self.world_size = folder, world_size
        self.config = ["--config", str(write_config(folder, {**SETTINGS, **changes}))]
        self.run = folder / "runs" / "run"
        self.walls: list[float] = []
        self.slept: list[dict[str, float]] = []
        self.output = ""

    def start(
        self, *arguments: str, sleep: dict[str, float] | None = None, kill_in_step: int | None = None, code: int = 0
    ) -> dict[str, float]:
        """One attempt, to its end, or until it is held in a step and killed; returns its seconds as they stand then."""
        (self.folder / "slept").unlink(missing_ok=True)
        if kill_in_step:
            stage.hold(self.folder, "step", count=kill_in_step, rank=0)
        variables = {"SLEEP": json.dumps(sleep or {})}
        with Ranks(self.folder, [*self.config, *arguments], self.world_size, variables) as ranks:
            start = began(ranks.processes[0].pid or 0)
            if kill_in_step:
                self.await_hold()
                ranks.kill()
            ranks.processes[0].join(120)
            self.walls.append(now() - start)
            outcome = ranks.join()
        stage.clear(self.folder)
        self.output = outcome.outputs[0]
        assert outcome.codes == [-9 if kill_in_step else code] * self.world_size, outcome.output
        return attempts(self.run)[-1]["seconds"]

    def stop_in_step(self, step: int, **options: Any) -> dict[str, float]:
        """An attempt to which SIGTERM comes in this step of it."""
        stage.interrupt(self.folder, "step", step)
        return self.start(**options)

    def await_hold(self) -> None:
        """Until it has been held for a second, and has written so, and what it has saved is there."""
        stage.arrived(self.folder, "step")
        held = now()
        wait_until(lambda: not list((self.run / "checkpoints").glob(".writing_*")), "the save before it")
        wait_until(lambda: now() > held + 1, "a second")

    def check_walls(self) -> None:
        """Each attempt's accounts add up to its wall time."""
        found = attempts(self.run)
        assert len(found) == len(self.walls)
        for entry, wall in zip(found, self.walls, strict=True):
            total = sum(entry["seconds"].values())
            assert total == pytest.approx(wall, abs=max(SHARE * wall, SLACK)), entry
            assert all(seconds >= 0 for seconds in entry["seconds"].values()), entry

    def column(self, name: str) -> list[Any]:
        return [entry[name] for entry in attempts(self.run)]

    def lost(self) -> list[float]:
        return [entry["seconds"]["lost"] for entry in attempts(self.run)]


def work(seconds: dict[str, float]) -> float:
    return seconds["data"] + seconds["compute"] + seconds["validation"]


# ---- every second has an account -----------------------------------------------------------------------------


def in_process_of_its_own(folder: Path, arguments: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """(wall time, output) of a run that is started as a user does, with Python's own start and end."""
    words = [sys.executable, "-m", "distloop.train", *arguments]
    begun = time.monotonic()
    done = subprocess.run(
        words, cwd=folder, env={**clean_environment(), **environment}, capture_output=True, text=True, check=False
    )
    wall = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    return wall, done.stdout


@pytest.mark.long
def test_what_is_slow_shows_in_its_account_and_all_add_up_to_the_wall_time(tmp_path: Path) -> None:
    arguments = ["--config", str(write_config(tmp_path, SETTINGS))]
    sleep = {"start_up": 1.5, "data": 0.1, "compute": 0.1, "validation": 0.2, "checkpoint": 0.3}
    wall, output = in_process_of_its_own(tmp_path, arguments, {"SLEEP": json.dumps(sleep)})
    run = tmp_path / "runs" / "run"
    (entry,) = attempts(run)
    seconds, expected = entry["seconds"], slept(tmp_path)
    assert sum(seconds.values()) == pytest.approx(wall, abs=max(SHARE * wall, SLACK))
    assert set(expected) == set(sleep)
    for account, least in expected.items():
        assert least > 1.0
        assert seconds[account] >= least - 0.02, account
        if account != "start_up":
            assert seconds[account] <= least + OVERHEAD, account
    assert seconds["lost"] == 0
    assert (entry["state"], entry["first_step"], entry["step"]) == ("finished", 0, STEPS)

    share = (seconds["data"] + seconds["compute"]) / sum(seconds.values())
    said = re.search(r"time: \d+:\d\d, (\d+)% of it in steps that counted", output)
    assert said is not None, output
    assert int(said[1]) == pytest.approx(100 * share, abs=2)  # it ends a moment later

    # Rows of a validation or a save, of 0.4 and 0.3 s, are no slower than others.
    found = rows(run, "train")
    for row in found[1:-1]:  # the batch of the last step was loaded before
        assert BATCH / (0.2 + 0.2) < row["samples_per_second"] <= BATCH / 0.2
    assert 0 < found[0]["samples_per_second"] <= BATCH / 0.2  # the first step with all that it takes
    for account in ("data", "compute", "validation", "checkpoint"):
        of_rows = sum(row[f"{account}_seconds"] for row in found)
        after_the_last = 0.8 if account in ("validation", "checkpoint") else 0.05
        assert of_rows <= seconds[account] + 1e-6
        assert of_rows >= seconds[account] - after_the_last - 0.5
    assert found[0]["data_seconds"] == 0


def test_with_loader_workers_on_two_ranks_waiting_for_them_is_data(tmp_path: Path) -> None:
    data = {**SETTINGS["data"], "workers": 1}
    run = Attempts(tmp_path, 2, data=data, checkpoint={"every_steps": 100})
    slow = 0.25
    seconds = run.start(sleep={"data": slow})
    run.check_walls()
    # The worker loads ahead during the first step; all others are as slow as it is.
    assert seconds["data"] + seconds["compute"] >= slow * (STEPS - 5)
    assert seconds["data"] >= 0.6 * slow * (STEPS - 5)
    assert all(len(row["memory_gib"]) == 2 for row in rows(run.run, "train"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_attempt_that_fails_has_accounts_and_its_work_since_the_last_save_is_lost(
    tmp_path: Path, world_size: int
) -> None:
    run = Attempts(tmp_path, world_size)
    stage.fail(tmp_path, "step", "raise", rank=0, count=6)
    seconds = run.start(sleep={"compute": 0.1}, code=1)
    assert run.column("state") == ["failed"]
    assert seconds["compute"] >= slept(tmp_path)["compute"]
    run.check_walls()
    run.start()
    assert run.column("state") == ["failed", "finished"]
    assert run.lost()[0] >= 2 * 0.1  # step 5, and half of the sixth
    run.check_walls()


# ---- what is lost --------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_stopped_and_continued_knows_what_it_lost(tmp_path: Path) -> None:
    run = Attempts(tmp_path)
    sleep = {"data": 0.1, "compute": 0.1, "validation": 0.1}
    before = run.start(sleep=sleep, kill_in_step=6)
    assert before["lost"] == 0
    again = slept(tmp_path, SAVED)  # without the batch that was loaded first of it
    kept = sum(slept(tmp_path)[name] - again[name] for name in ("data", "compute"))
    held = 1.0
    assert run.column("state") == ["running"]
    run.stop_in_step(4, sleep=sleep)
    assert run.column("state") == ["killed", "stopped"]
    assert "stopped after step" in run.output
    stopped_at = run.column("step")[1]
    run.start(sleep=sleep)
    assert run.column("state") == ["killed", "stopped", "finished"]
    assert run.column("first_step") == [0, SAVED, stopped_at]
    assert run.column("attempt") == [1, 2, 3]

    lost, first = run.lost(), attempts(run.run)[0]["seconds"]
    assert lost[0] >= sum(again.values()) + held - 0.6  # which it could not write any more
    assert first["data"] + first["compute"] >= kept - sleep["data"] - 0.02
    assert lost[0] + work(first) == pytest.approx(work(before))
    assert first["start_up"] == before["start_up"]
    assert lost[1:] == pytest.approx([0, 0], abs=0.05)
    run.check_walls()

    sums = totals(run.run)
    assert sum(sums.values()) == pytest.approx(sum(run.walls), abs=max(SHARE * sum(run.walls), 3 * SLACK))
    share = goodput(sums)
    assert share == (sums["data"] + sums["compute"]) / sum(sums.values())
    assert f"in 3 attempts, {share:.0%} of it in steps that counted" in run.output


@pytest.mark.long
def test_attempts_that_save_nothing_or_whose_checkpoints_are_damaged_are_lost_whole(tmp_path: Path) -> None:
    run = Attempts(tmp_path)
    sleep = {"compute": 0.1}

    run.start(sleep=sleep, kill_in_step=3)
    run.start(sleep=sleep, kill_in_step=3)  # again before the first save
    assert run.lost()[0] > 0.1
    assert run.column("first_step") == [0, 0]
    run.stop_in_step(5, sleep=sleep)
    good = published_in(run.run / "checkpoints")
    run.stop_in_step(5, sleep=sleep)
    assert run.lost()[1] > 0.1
    assert run.lost()[2:] == pytest.approx([0, 0], abs=0.05)

    work_of_fourth = work(attempts(run.run)[3]["seconds"])
    for path in published_in(run.run / "checkpoints"):
        if path not in good:
            (path / "model.safetensors").write_bytes(b"damaged")
    run.start(sleep=sleep, kill_in_step=2)
    assert run.column("first_step")[4] == step_of(good[-1])
    assert run.lost()[2] == pytest.approx(0, abs=0.05)
    assert run.lost()[3] == pytest.approx(work_of_fourth)
    lost = run.lost()
    run.start(sleep=sleep)  # from the same one
    assert run.column("first_step")[5] == step_of(good[-1])
    assert run.lost()[:4] == lost[:4]
    assert run.lost()[4] > 0.5
    assert run.lost()[5] == 0
    assert run.column("state") == ["killed", "killed", "stopped", "stopped", "killed", "finished"]
    run.check_walls()


# ---- short runs ----------------------------------------------------------------------------------------------


def test_a_run_of_one_step_and_a_start_that_has_none_to_do(tmp_path: Path) -> None:
    run = Attempts(tmp_path, train={"steps": 1})
    run.start(sleep={"compute": 0.2})
    (row,) = rows(run.run, "train")
    assert 0 < row["samples_per_second"] <= BATCH / 0.2
    assert (row["data_seconds"], row["validation_seconds"], row["checkpoint_seconds"]) == (0, 0, 0)

    # Killed after its last save, before it could say so.
    (run.run / "status.json").write_text(json.dumps({**status(run.run), "state": "running"}))
    seconds = run.start()
    assert "continuing after step 1 of 1" in run.output
    assert (seconds["data"], seconds["compute"], seconds["validation"]) == (0, 0, 0)
    assert len(rows(run.run, "train")) == 1

    run.start("--resume", "extend", "--train.steps", "3", sleep={"compute": 0.2})
    assert [row["step"] for row in rows(run.run, "train")] == [1, 2, 3]
    assert all(0 < row["samples_per_second"] <= BATCH / 0.2 for row in rows(run.run, "train"))
    assert run.column("state") == ["finished"] * 3
    assert (run.column("first_step"), run.column("step")) == ([0, 1, 1], [1, 1, 3])
    assert run.lost() == pytest.approx([0, 0, 0], abs=0.05)
    run.check_walls()

    train(tmp_path, [*run.config, "--train.steps", "3"]).check()  # finished: no attempt
    assert len(attempts(run.run)) == 3


# ---- a minute of it ------------------------------------------------------------------------------------------


def fresh(folder: Path, arguments: list[str], end: Callable[[subprocess.Popen[bytes]], None] | None = None) -> float:
    """The wall time of a start in a process of its own, to its end, or to its 15th step, in which `end` ends it."""
    stage.clear(folder)
    if end is not None:
        stage.hold(folder, "step", count=15)
    sleep = json.dumps({"compute": 1.5, "data": 0.2, "validation": 0.4, "checkpoint": 0.2})
    environment = {**clean_environment(), "SLEEP": sleep}
    begun = time.monotonic()
    with open(folder / "output", "a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "distloop.train", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        if end is not None:
            stage.arrived(folder, "step")
            end(process)
            stage.let_go(folder, "step")
        process.wait(200)
        return time.monotonic() - begun
    finally:
        process.kill()


@pytest.mark.long
def test_over_a_minute_with_a_kill_and_a_stop_the_accounts_are_the_wall_time_to_a_hundredth(tmp_path: Path) -> None:
    steps = 40
    arguments = ["--config", str(write_config(tmp_path, {**SETTINGS, "train": {"steps": steps}}))]
    walls = [fresh(tmp_path, arguments, end) for end in (subprocess.Popen.kill, subprocess.Popen.terminate, None)]
    output = (tmp_path / "output").read_text()
    run = tmp_path / "runs" / "run"
    found = attempts(run)
    assert [entry["state"] for entry in found] == ["killed", "stopped", "finished"], output
    assert status(run)["step"] == steps
    assert sum(walls) > 60
    assert sum(totals(run).values()) == pytest.approx(sum(walls), rel=SHARE)
    for entry, wall in zip(found, walls, strict=True):
        assert sum(entry["seconds"].values()) == pytest.approx(wall, abs=max(SHARE * wall, SLACK)), entry
    assert [round(entry["seconds"]["lost"], 1) > 0 for entry in found] == [True, False, False]
