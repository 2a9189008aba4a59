"""distloop status beside real runs: while they go on, after they were killed, and when they are over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distloop.commands.reading import read_run
from tests.tools import stage
from tests.tools.ranks import Ranks, command, train, wait_until, write_config
from tests.tools.records import run_of

SETTINGS = {"data": "digits", "model": "mlp", "train": {"steps": 60}, "checkpoint": {"every_steps": 2}}


def shown(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    done = command([sys.executable, "-m", "distloop.commands.cli", "status", "--json", *arguments], folder)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def test_a_run_is_running_then_gone_when_it_is_killed_and_finished_in_the_end(tmp_path: Path) -> None:
    often = {"log": {"every_steps": 1}, "validate": {"every_epochs": None, "every_steps": 3}}
    config = ["--config", str(write_config(tmp_path, {**SETTINGS, **often, "task": "tests.lab.crashing:Held"}))]
    run = run_of(tmp_path)
    stage.hold(tmp_path, "update", count=5)
    with Ranks(tmp_path, config) as ranks:
        stage.arrived(tmp_path, "update")
        wait_until(lambda: read_run(run).saved_step == 4, "the second checkpoint")
        found = shown(tmp_path)[0]
        assert (found["state"], found["saved_step"], found["attempt"]) == ("running", 4, 1)
        ranks.kill()
        ranks.join()
    found = shown(tmp_path)[0]
    assert (found["state"], found["saved_step"]) == ("gone", 4)
    assert f"process {ranks.processes[0].pid} on " in found["reason"]

    # All its files are replaced, appended to and removed while they are read.
    stage.let_go(tmp_path, "update")
    states: list[str] = []
    steps: list[int] = []

    def over() -> bool:
        seen = read_run(run)
        states.append(seen.state)
        steps.append(seen.saved_step or 0)
        return seen.state == "finished" or not ranks.processes[0].is_alive()

    with Ranks(tmp_path, config) as ranks:
        wait_until(lambda: read_run(run).state != "gone", "the next attempt")
        wait_until(over, "its end")
        ranks.join().check()
    assert set(states) <= {"starting", "running", "finished"}
    assert "running" in states
    assert steps == sorted(steps)
    found = shown(tmp_path)[0]
    assert (found["state"], found["step"], found["attempt"]) == ("finished", 60, 2)


def test_the_runs_of_a_sweep_are_ranked_with_the_setting_that_makes_the_difference(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, {"data": "digits", "model": "mlp", "train": {"epochs": 1}}))
    for lr in ("1e-6", "1e-2"):
        train(tmp_path, ["--config", config, "--optim.lr", lr, "--name", f"lr-{lr}"]).check()
    best, worst = shown(tmp_path, "--sort", "accuracy")
    assert [best["name"], worst["name"]] == ["lr-1e-2", "lr-1e-6"]
    assert best["value"] > worst["value"]
    assert best["value_step"] == best["step"] == 22
    assert [float(run["differs"].pop("optim.lr")) for run in (best, worst)] == [1e-2, 1e-6]
    assert best["differs"] == worst["differs"] == {}
