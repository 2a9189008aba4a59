"""A policy of augmentation and erasing: the same images on one rank and two, with workers, stopped and continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.tools.ranks import train, write_config
from tests.tools.records import largest_difference, losses, weights


def test_one_rank_and_two_that_are_stopped_and_continued_with_workers_see_the_same_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for half, count in (("train", 24), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / half / name).mkdir(parents=True)
            for number in range(count):
                picture = generator.integers(0, 256, (30, 36, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "pictures" / half / name / f"{number:02}.png")
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
    train(tmp_path, [*arguments, "--name", "one", "--data.workers", "0"]).check()
    two = [*arguments, "--name", "two", "--data.workers", "2"]
    train(tmp_path, [*two, "--train.steps", "4"], 2).check()
    train(tmp_path, [*two, "--resume", "extend"], 2).check()
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    assert len(losses(runs[0])) == 9
    assert np.allclose(losses(runs[0]), losses(runs[1]), rtol=1e-12)
    assert largest_difference(*map(weights, runs)) < 1e-12
    train(tmp_path, [*arguments, "--name", "plain", "--data.args", "{crop: 12, resize: 14}"]).check()
    assert not np.allclose(losses(tmp_path / "runs" / "plain"), losses(runs[0]), rtol=1e-3)
