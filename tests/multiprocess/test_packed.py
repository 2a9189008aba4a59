"""Packed pictures, and pictures that torchvision decodes: one rank, two, and two that are stopped and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distloop.commands import pack
from tests.tools.image_files import write_pictures
from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, losses, status, weights

ARGS: dict[str, Any] = {"crop": 12, "resize": 14}


@pytest.mark.parametrize("name", ["packed", pytest.param("image_folder", marks=pytest.mark.long)])
def test_one_rank_and_two_that_are_stopped_and_continued_with_workers_see_the_same_pictures(
    tmp_path: Path, name: str
) -> None:
    write_pictures(tmp_path / "pictures", 24, 2)
    assert pack.main([str(tmp_path / "pictures"), str(tmp_path / "small"), "--size", "16", "--processes", "1"]) == 0
    args = {"augment": "trivial"} if name == "packed" else {"decoder": "torchvision"}
    settings = {
        "data": {"name": name, "root": "small" if name == "packed" else "pictures", "args": ARGS | args},
        "model": "linear",
        "optim": {"name": "sgd", "lr": 0.01},
        "schedule": "constant",
        "dtype": "float64",
        "batch": {"global_size": 8},
        "train": {"steps": 9},  # 6 an epoch
        "log": {"every_steps": 1},
        "device": "cpu",
    }
    arguments = ["--config", str(write_config(tmp_path, settings))]
    one, two, stopped = (tmp_path / "runs" / each for each in ("one", "two", "stopped"))
    train(tmp_path, [*arguments, "--name", "one", "--data.workers", "0"]).check()
    train(tmp_path, [*arguments, "--name", "two", "--data.workers", "0"], 2).check()
    again = [*arguments, "--name", "stopped", "--data.workers", "2"]
    train(tmp_path, [*again, "--train.steps", "4"], 2).check()
    train(tmp_path, [*again, "--resume", "extend"], 2).check()
    assert status(stopped)["first_step"] == 4
    assert len(losses(one)) == 9
    assert np.allclose(losses(one), losses(two), rtol=1e-12)
    assert largest_difference(weights(one), weights(two)) < 1e-12
    assert losses(stopped) == losses(two)
    assert largest_difference(weights(stopped), weights(two)) == 0.0
    # What the pictures are is a part of what is trained: a run goes on with what it began with.
    other = train(tmp_path, [*arguments, "--name", "one", "--data.args", "{crop: 12, resize: 14}"])
    assert other.codes == [2]
    assert "data.args" in other.output
