"""Groups of parameters in whole runs: the same training on any number of ranks, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.config.optim_settings import Group
from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, rows, weights

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": {"name": "cnn", "args": {"width": 8}},
    "optim": {
        "name": "tests.lab.resuming:Signs",
        "args": {"beta": 0.5},
        "clip_norm": 0.5,
        "groups": [
            {"match": r"^0\.", "freeze": True},
            {"match": "^3", "until_step": 4, "lr_scale": 0.1},
            {"match": r"^16\.weight", "optimizer": {"name": "nadam", "args": {"betas": [0.8, 0.9]}}},
        ],
    },
    "schedule": {"name": "tests.lab.resuming:halving"},
    "dtype": "float64",
    "batch": {"global_size": 64, "micro_size": 16},
    "train": {"steps": 6},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 2, "keep_last": 5},
    "validate": {"every_steps": 6},
}


def test_groups_train_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    arguments = ["--config", str(write_config(tmp_path, SETTINGS))]
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for world_size, run in enumerate(runs, start=1):
        done = train(tmp_path, [*arguments, "--name", run.name], world_size).check()
        assert done.output.count(" · Signs and NAdam") == 1
    assert largest_difference(weights(runs[0]), weights(runs[1])) < 1e-10
    steps = [[torch.load(run / f"checkpoints/step_0000000{step}/optimizer.pt") for step in (2, 4, 6)] for run in runs]
    for contents in steps:
        names = contents[0]["parameters"]
        assert [len(group) for group in names] == [1, 2, 9, 1], names
        flat = [name for group in names for name in group]
        begun = [{flat[place] for place in content["state"]} for content in contents]
        late = {"model.3.weight"}
        assert begun == [set(flat) - late, set(flat) - late, set(flat)]
    for one, two in zip(*(rows(run, "train") for run in runs), strict=True):
        assert one["lr"] == two["lr"]
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-10)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_table_of_parameters_is_printed_once_and_nothing_begins(tmp_path: Path, world_size: int) -> None:
    arguments = ["--config", str(write_config(tmp_path, SETTINGS))]
    ended = train(tmp_path, [*arguments, "--optim.show"], world_size).check()
    assert ended.output.count("0.weight") + ended.output.count("10.weight") == 3  # of 0.weight once, of 10.weight twice
    assert "16.weight  [10, 64]" in ended.output
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_group_is_named_by_its_place(tmp_path: Path) -> None:
    for groups, said in (
        ("[{match: a, lr_scales: 2}]", "optim.groups.0.lr_scales"),
        ("[{lr_scale: 2}]", "optim.groups.0 = {'lr_scale': 2}: match is missing"),
        ("[{match: a, optimizer: {nam: sgd}}]", "optim.groups.0.optimizer.nam"),
    ):
        ended = train(tmp_path, ["--optim.groups", groups])
        assert ended.codes == [2], ended.output
        assert said in ended.output, ended.output
    assert Group("a").lr_scale == 1
