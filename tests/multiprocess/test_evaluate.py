"""`distloop evaluate`: a run's own numbers again, on any number of ranks, or those of other data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from distloop.run.checkpoint import Snapshot, publish
from distloop.run.parts import contents_of
from distloop.run.saving import HostBuffers
from tests.tools.ranks import accelerate_launch, command, train, write_config
from tests.tools.records import found, rows

BATCH_NORM = "tests.lab.evaluating:Net"
CPU = {"ACCELERATE_USE_CPU": "true"}


def trained(folder: Path, **settings: Any) -> Path:
    """A short run of a model with BatchNorm; returns its directory."""
    config = {
        "model": {"name": BATCH_NORM},
        "data": {"name": "digits"},
        "batch": {"global_size": 60},
        "train": {"epochs": 2},
        "validate": {"batch_size": 50},
        "device": "cpu",
        **settings,
    }
    train(folder, ["--config", str(write_config(folder, config))]).check()
    return folder / "runs" / "run"


def last_validation(run: Path) -> dict[str, Any]:
    row = rows(run, "validate")[-1]
    return {name: value for name, value in found(row).items() if name not in ("kind", "epoch")}


def evaluate(folder: Path, processes: int, *arguments: str) -> dict[str, Any]:
    script = str(Path(__file__).resolve().parents[2] / "distloop" / "evaluate.py")
    words = accelerate_launch(processes, script) if processes > 1 else [sys.executable, script]
    done = command([*words, *arguments, "--json"], folder, CPU if processes > 1 else None)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"precision": "bf16"}, marks=pytest.mark.long),
        pytest.param({"optim": {"ema_decay": 0.9}}, marks=pytest.mark.long),
    ],
    ids=["", "bf16", "ema"],
)
def test_the_numbers_are_the_runs_own_on_any_number_of_ranks(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trained(tmp_path, **settings)
    for processes in (1, 2, 3) if not settings else (1, 2):
        assert evaluate(tmp_path, processes, "runs/run") == last_validation(run)


def test_another_checkpoint_of_a_run_that_was_moved_and_other_data(tmp_path: Path) -> None:
    run = trained(tmp_path, expect_world=1)
    first = rows(run, "validate")[0]
    moved = run.rename(tmp_path / "elsewhere")
    found = evaluate(tmp_path, 1, str(moved / "checkpoints" / f"step_{first['step']:08d}"))
    assert (found["step"], found["loss"], found["accuracy"]) == (first["step"], first["loss"], first["accuracy"])
    other = evaluate(tmp_path, 1, "elsewhere", "--data.name", "tests.lab.evaluating:noise")
    assert other["samples"] == 100
    assert other["loss"] != last_validation(moved)["loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: distloop evaluate"),
        (["nothing"], "nothing is no folder"),
        (["empty"], "lies in no run's folder"),
        (["runs/run/checkpoints/step_00000046", "--bogus", "1"], "command line: bogus = 1: there is no such setting."),
        (["runs/damaged"], "holds no checkpoint"),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("run/checkpoints/step_00000046", "damaged"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("run", "damaged"):
        (tmp_path / "runs" / name / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}}))
    done = command([sys.executable, "-m", "distloop.evaluate", *arguments], tmp_path)
    assert done.returncode == 2
    assert said in done.stdout
    assert "Traceback" not in done.stdout


def test_a_run_whose_loop_saves_no_model_is_refused_in_one_message(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "gan"
    weights, others, state = contents_of({"generator": nn.Linear(2, 1)}, HostBuffers())
    path = publish(run / "checkpoints", 3, Snapshot(weights, others, {"step": 3, **state}, {"dataset": {}}))
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}, "own": {"alpha": 1.0}}))
    done = command([sys.executable, "-m", "distloop.evaluate", "runs/gan"], tmp_path)
    assert done.returncode == 2
    where = path.relative_to(tmp_path)
    assert f"{where} holds no model.safetensors: its loop saves no part named model" in done.stdout
    assert "Traceback" not in done.stdout
