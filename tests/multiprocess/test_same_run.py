"""What is trained is defined by the config, not by how many processes share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, losses, weights

SGD = {
    "data": "digits",
    "model": {"name": "mlp", "args": {"hidden": 64, "layers": 1}},
    "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4},
    "schedule": {"name": "cosine", "warmup_steps": 5},
    "batch": {"global_size": 64},
    "train": {"steps": 50},
    "log": {"every_steps": 1},
}
# name -> (world size, extra arguments)
FORMS = {
    "one": (1, []),
    "one-accumulating-4": (1, ["--batch.micro-size", "16"]),
    "two": (2, []),
    "four-accumulating-2": (4, ["--batch.micro-size", "8"]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_and_parameters_do_not_depend_on_the_number_of_processes(tmp_path: Path, dtype: str) -> None:
    config = write_config(tmp_path, {**SGD, "dtype": dtype})
    for name, (world_size, extra) in FORMS.items():
        train(tmp_path, ["--config", str(config), "--name", name, *extra], world_size).check()
    runs = {name: tmp_path / "runs" / name for name in FORMS}
    reference = losses(runs["one"])
    assert len(reference) == 50
    assert reference[-1] < 0.6 * reference[0]  # it learns, so that equal losses say something
    for run in runs.values():
        assert losses(run) == pytest.approx(reference, rel=1e-5 if dtype == "float32" else 1e-12)
        if dtype == "float64":
            assert largest_difference(weights(run), weights(runs["one"])) < 1e-12


def test_the_short_last_step_of_an_epoch_has_its_own_right_mean(tmp_path: Path) -> None:
    # 1203 samples in steps of 240: the last step of an epoch has 3, so that on 4 ranks one has none.
    settings = {**SGD, "dtype": "float64", "batch": {"global_size": 240, "remainder": "train"}, "train": {"epochs": 3}}
    settings["data"] = "tests.lab.user_code:digits_head"
    config = write_config(tmp_path, settings)
    for world_size in (1, 2, 4):
        arguments = ["--config", str(config), "--name", f"on-{world_size}", "--schedule.warmup-steps", "0"]
        train(tmp_path, arguments, world_size).check()
    reference = tmp_path / "runs" / "on-1"
    assert len(losses(reference)) == 18
    for world_size in (2, 4):
        run = tmp_path / "runs" / f"on-{world_size}"
        assert losses(run) == pytest.approx(losses(reference), rel=1e-12)
        assert largest_difference(weights(run), weights(reference)) < 1e-12
