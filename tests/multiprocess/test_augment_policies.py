"""A policy of augmentation and erasing: the same images on one rank and two, with workers, stopped and continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tools.image_files import write_pictures
from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, losses, status, weights


def test_one_rank_and_two_that_are_stopped_and_continued_with_workers_see_the_same_images(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 24, 2, ending="png")
    settings = {
        "data": {
            "name": "image_folder",
            "root": "pictures",
            "args": {"crop": 12, "resize": 14, "augment": "trivial", "erase": 0.5},
        },
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
    one, two, stopped, plain = (tmp_path / "runs" / name for name in ("one", "two", "stopped", "plain"))
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
    train(tmp_path, [*arguments, "--name", "plain", "--data.args", "{crop: 12, resize: 14}"]).check()
    assert not np.allclose(losses(plain), losses(one), rtol=1e-3)
