"""Each recipe in configs/ trains, and what it says it reaches, it reaches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tools.image_files import write_cifar10
from tests.tools.ranks import REPOSITORY, accelerate_launch, command, train
from tests.tools.records import losses, rows, status

CONFIGS = REPOSITORY / "configs"
SAMPLE = Path(os.environ.get("DISTLOOP_FASHION_MNIST", REPOSITORY.parent / "shared" / "data" / "fashion_mnist_sample"))


def test_every_recipe_is_tested_here() -> None:
    tested = {"digits", "linear_regression", "fashion_mnist", "cifar10", "imagenet"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tested


def final(run: Path) -> dict[str, Any]:
    """The last validation of a run that has finished."""
    assert status(run)["state"] == "finished"
    return rows(run, "validate")[-1]


def test_digits_reach_98_percent_in_float32_and_as_much_in_bf16(tmp_path: Path) -> None:
    arguments = ["--config", str(CONFIGS / "digits.yaml"), "--validate.every-epochs", "20"]
    for precision in ("no", "bf16"):
        train(tmp_path, [*arguments, "--name", precision, "--precision", precision]).check()
    full, mixed = (final(tmp_path / "runs" / precision) for precision in ("no", "bf16"))
    assert full["samples"] == 360
    assert full["accuracy"] >= 0.98
    assert abs(mixed["accuracy"] - full["accuracy"]) <= 0.01
    assert losses(tmp_path / "runs" / "bf16") != losses(tmp_path / "runs" / "no")  # it was another precision


def test_linear_regression_explains_a_quarter_of_the_variance(tmp_path: Path) -> None:
    train(tmp_path, ["--config", str(CONFIGS / "linear_regression.yaml")]).check()
    run = tmp_path / "runs" / "linear_regression"
    assert final(run)["r2"] > 0.25
    assert final(run)["loss"] < rows(run, "validate")[0]["loss"]
    assert final(run)["samples"] == 89


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no {SAMPLE}; DISTLOOP_FASHION_MNIST says where it is")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_sample_of_fashion_mnist_is_learnt(tmp_path: Path, processes: int) -> None:
    # 750 + 150 images. Eight seeds end between 0.81 and 0.85.
    arguments = ["--config", str(CONFIGS / "fashion_mnist.yaml"), "--data.root", str(SAMPLE), "--train.epochs", "25"]
    arguments += ["--batch.global-size", "32", "--model.args.width", "16", "--validate.every-epochs", "5"]
    words = [*accelerate_launch(processes), *arguments, "--expect-world", str(processes)]
    done = command(words, tmp_path, {"ACCELERATE_USE_CPU": "true"}, timeout=240)
    assert done.returncode == 0, done.stdout
    assert final(tmp_path / "runs" / "fashion_mnist")["accuracy"] >= 0.78
    assert final(tmp_path / "runs" / "fashion_mnist")["samples"] == 150


def test_cifar10_trains_on_its_files(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "data")
    arguments = ["--config", str(CONFIGS / "cifar10.yaml"), "--data", "tests.lab.user_code:small_cifar10"]
    arguments += ["--batch.global-size", "8", "--train.steps", "2", "--log.every-steps", "1"]
    train(tmp_path, [*arguments, "--schedule.warmup-steps", "1"]).check()
    check_two_steps(tmp_path / "runs" / "cifar10", 4, 10)


def test_imagenet_trains_on_folders_of_pictures(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for half, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = generator.integers(0, 256, (48, 60, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{number}.jpg")
    arguments = ["--config", str(CONFIGS / "imagenet.yaml"), "--data.root", "pictures"]
    arguments += ["--data.args.crop", "32", "--data.args.resize", "40", "--batch.global-size", "4"]
    arguments += ["--schedule.warmup-steps", "1", "--train.steps", "2", "--log.every-steps", "1"]
    train(tmp_path, arguments).check()
    check_two_steps(tmp_path / "runs" / "imagenet", 4, 2)


def check_two_steps(run: Path, samples: int, classes: int) -> None:
    """Two steps of finite loss, the first near that of guessing, and one validation."""
    assert len(losses(run)) == 2
    assert abs(losses(run)[0] - np.log(classes)) < 1
    assert all(map(np.isfinite, losses(run)))
    assert final(run)["samples"] == samples
    assert final(run)["accuracy"] in {count / samples for count in range(samples + 1)}
