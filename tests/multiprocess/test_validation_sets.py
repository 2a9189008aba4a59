"""Several validation sets with names: each counts every sample once, on any number of ranks, over a stop and a resume,
and in `distloop evaluate`; one set without a name is what it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools.ranks import command, train, write_config
from tests.tools.records import all_rows, found, largest_difference, rows, status, steps_saved, weights

LAB = "tests.lab.day_and_night"
SETTINGS: dict[str, Any] = {
    "model": {"name": "linear", "args": {"num_outputs": 10}},
    "task": {"name": "tests.lab.collecting:Collecting"},
    "data": {"name": f"{LAB}:day_and_night"},
    "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "batch": {"global_size": 48},
    "train": {"steps": 60},
    "validate": {"batch_size": 50, "every_steps": 20},
    "checkpoint": {"best": "max accuracy/night"},
    "device": "cpu",
}
METRICS = ("loss", "accuracy", "auroc", "digest", "samples")
UNTRAINED = {"optim": {"name": "sgd", "lr": 1e-30, "weight_decay": 0}, "train": {"steps": 1}}  # no bit changes


def run(folder: Path, name: str, world_size: int, *words: str, **changes: Any) -> Path:
    config = write_config(folder, {**SETTINGS, "name": name, **changes})
    train(folder, ["--config", str(config), *words], world_size).check()
    return folder / "runs" / name


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in found(row).items() if k not in ("kind", "epoch")} for row in rows(run, "validate")]


def test_each_set_is_validated_whole_under_its_name_on_any_number_of_ranks(tmp_path: Path) -> None:
    [row] = metrics(run(tmp_path, "one", 1, **UNTRAINED))
    assert list(row) == ["step", *(f"{name}{of}" for of in ("", "/night") for name in METRICS)]
    assert (row["samples"], row["samples/night"]) == (260, 100)
    assert row["accuracy"] != row["accuracy/night"]
    alone = {"data": {"name": f"{LAB}:night_alone"}, "checkpoint": {}}
    [night] = metrics(run(tmp_path, "night", 2, **UNTRAINED, **alone))
    assert night == {"step": 1, **{name: row[f"{name}/night"] for name in METRICS}}
    two = run(tmp_path, "two", 2, **UNTRAINED)
    assert metrics(two) == metrics(run(tmp_path, "three", 3, **UNTRAINED)) == [row]
    done = command([sys.executable, "-m", "distloop.evaluate", "runs/two", "--json"], tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == row, done.stdout
    details = json.loads((two / "validation.json").read_text())
    assert details["samples"] == 260


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_is_continued_has_the_rows_and_the_best_of_one_that_was_not(tmp_path: Path, world_size: int) -> None:
    whole = run(tmp_path, "whole", world_size)
    config = write_config(tmp_path, {**SETTINGS, "name": "parts"})
    words = ["--config", str(config)]
    train(tmp_path, words, world_size, {"STOP": "SIGTERM 3 0"}, loop="tests.lab.interrupted").check()
    parts = tmp_path / "runs" / "parts"
    assert status(parts)["state"] == "stopped"
    train(tmp_path, words, world_size).check()
    assert metrics(parts) == metrics(whole)
    assert [row["step"] for row in metrics(whole)] == [20, 40, 60]
    best = max(metrics(whole), key=lambda row: (row["accuracy/night"], -row["step"]))
    assert status(parts)["best"] == status(whole)["best"] == best
    assert status(whole)["best_rule"] == ["accuracy/night", "max"]
    assert largest_difference(weights(parts), weights(whole)) == 0


def test_a_metric_of_no_set_is_refused_before_the_first_step_with_those_that_there_are(tmp_path: Path) -> None:
    config = write_config(tmp_path, {**SETTINGS, "checkpoint": {"best": "max accuracy/dusk"}})
    outcome = train(tmp_path, ["--config", str(config)], 2)
    assert outcome.codes == [2, 2]
    known = "loss, accuracy, auroc, digest, loss/night, accuracy/night, auroc/night, digest/night"
    assert outcome.output.count(f"checkpoint.best: validation gives no 'accuracy/dusk', but {known}.") == 1


# ---- at the start and at the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_validation_at_the_start_is_done_once_in_a_runs_life(tmp_path: Path, world_size: int) -> None:
    validate = {"batch_size": 50, "at_start": True, "at_end": "only"}
    whole = run(tmp_path, "whole", world_size, validate=validate)
    assert [row["step"] for row in metrics(whole)] == [0, 60]
    first, *_ = all_rows(whole)
    assert (first["kind"], first["step"], first["epoch"]) == ("validate", 0, 0)
    words = ["--config", str(write_config(tmp_path, {**SETTINGS, "name": "parts", "validate": validate}))]
    killed = train(tmp_path, words, world_size, {"STOP": "SIGKILL 3 0"}, loop="tests.lab.interrupted")
    parts = tmp_path / "runs" / "parts"
    assert killed.codes[0] == -9
    assert [row["step"] for row in metrics(parts)] == [0]
    train(tmp_path, words, world_size, {"STOP": "SIGTERM 3 0"}, loop="tests.lab.interrupted").check()
    assert status(parts)["state"] == "stopped"
    assert [(row["step"], row["attempt"]) for row in rows(parts, "validate")] == [(0, 2)]  # no step was kept
    assert 0 not in steps_saved(parts)
    train(tmp_path, words, world_size).check()
    assert [(row["step"], row["attempt"]) for row in rows(parts, "validate")] == [(0, 2), (60, 3)]
    assert metrics(parts) == metrics(whole)
    assert status(parts)["best"] == metrics(whole)[-1]
    assert largest_difference(weights(parts), weights(whole)) == 0


def test_the_weights_before_the_first_step_are_never_the_best(tmp_path: Path) -> None:
    validate = {"batch_size": 50, "at_start": True, "every_steps": 1}
    path = run(tmp_path, "one", 1, **{**UNTRAINED, "train": {"steps": 2}}, validate=validate)
    first, second, third = metrics(path)
    assert {**first, "step": 1} == second == {**third, "step": 1}
    assert status(path)["best"] == second  # of equal ones the earliest that a checkpoint has
