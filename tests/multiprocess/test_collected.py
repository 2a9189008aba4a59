"""What a task collects is the same on any number of ranks, to the bit, and `distloop evaluate` gives it, too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.tools.ranks import command, train, write_config
from tests.tools.records import found, rows

# 360 samples in 8 batches of 50, the last of 10. The rate is so small that no bit of the weights changes.
SETTINGS: dict[str, Any] = {
    "model": "linear",
    "task": "tests.lab.collecting:Collecting",
    "data": {"name": "digits"},
    "optim": {"name": "sgd", "lr": 1e-30, "weight_decay": 0},
    "batch": {"global_size": 48},
    "train": {"steps": 1},
    "validate": {"batch_size": 50},
    "device": "cpu",
}


def row_on(tmp_path: Path, world_size: int, **validate: Any) -> dict[str, Any]:
    settings = {**SETTINGS, "validate": {**SETTINGS["validate"], **validate}, "name": f"on-{world_size}"}
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    [row] = rows(tmp_path / "runs" / f"on-{world_size}", "validate")
    return {key: value for key, value in found(row).items() if key not in ("kind", "epoch")}


def test_what_is_collected_is_the_same_on_any_number_of_ranks_and_in_evaluate(tmp_path: Path) -> None:
    expected = row_on(tmp_path, 1)
    assert 0 < expected["auroc"] < 1
    assert expected["samples"] == 360
    assert row_on(tmp_path, 2) == row_on(tmp_path, 3) == expected
    done = command([sys.executable, "-m", "distloop.evaluate", "runs/on-2", "--json"], tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == expected, done.stdout


def test_a_rank_without_a_batch_gets_the_whole_as_well(tmp_path: Path) -> None:
    assert row_on(tmp_path, 2, batch_size=360) == row_on(tmp_path, 1, batch_size=360)


def test_a_collection_that_leaves_samples_out_is_refused_before_the_first_step(tmp_path: Path) -> None:
    settings = {**SETTINGS, "task": "tests.lab.collecting:OneTooFew"}
    outcome = train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2)
    assert outcome.codes == [2, 2]
    assert outcome.output.count("scores has 49 values for a batch of 50 samples") == 1, outcome.output
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


def test_ranks_that_collect_something_else_are_named(tmp_path: Path) -> None:
    settings = {**SETTINGS, "task": "tests.lab.collecting:OfTheRank"}
    outcome = train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2)
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("task.collect() gives scores_1") == 1, outcome.output
    assert "on rank 1, but scores_0" in outcome.output
