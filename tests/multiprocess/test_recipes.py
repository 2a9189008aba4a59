"""Each recipe in configs/ trains, and what it says it reaches, it reaches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distloop.commands import tokens
from tests.multiprocess.test_exact_resume import check_same, go_on, stop
from tests.tools.image_files import write_cifar10
from tests.tools.ranks import REPOSITORY, accelerate_launch, command, train
from tests.tools.records import losses, rows, status

CONFIGS = REPOSITORY / "configs"
SAMPLE = Path(os.environ.get("DISTLOOP_FASHION_MNIST", REPOSITORY.parent / "shared" / "data" / "fashion_mnist_sample"))


def test_every_recipe_is_tested_here() -> None:
    tested = {"digits", "linear_regression", "fashion_mnist", "cifar10", "imagenet", "gpt"}
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


# As the recipe, but small; and one that may be stopped.
GPT = {
    "data.args.length": "16",
    "model.args": "{width: 32, layers: 2, heads: 2, dropout: 0.1}",
    "task": "tests.lab.resuming:StoppedLanguageModelling",
    "batch.global-size": "16",
    "batch.micro-size": "4",
    "optim.lr": "0.01",
    "schedule.warmup-steps": "4",
    "train.steps": "24",
    "validate.every-steps": "8",
    "log.every-steps": "1",
    "precision": "no",
}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_gpt_learns_a_text_and_a_stop_does_not_change_it(tmp_path: Path, ranks: int) -> None:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "how", "far", "its", "dog", "ran"]
    lines = [" ".join(words[(line * step) % 13] for step in range(1, 9)) for line in range(90)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    assert tokens.main([str(tmp_path / "text.txt"), str(tmp_path / "data")]) == 0
    settings = [word for name, value in GPT.items() for word in (f"--{name}", value)]
    arguments = ["--config", str(CONFIGS / "gpt.yaml"), "--data.root", "data", *settings, "--name"]
    train(tmp_path, [*arguments, "whole", "--data.workers", "0"], ranks).check()
    stopped = [*arguments, "stopped", "--data.workers", "2"]
    go_on(tmp_path, stopped, ranks, stop(tmp_path, stopped, ranks, 10 * (4 // ranks), rank=ranks - 1))
    whole = tmp_path / "runs" / "whole"
    check_same(tmp_path / "runs" / "stopped", whole)
    assert abs(losses(whole)[0] - np.log(256)) < 0.2
    assert final(whole)["bits_per_byte"] < 6  # as many as there are bytes: 8
    assert final(whole)["samples"] == (len((tmp_path / "data" / "val.bin").read_bytes()) // 2 - 1) // 16
    if ranks == 2:
        train(tmp_path, [*arguments, "alone"]).check()
        assert losses(tmp_path / "runs" / "alone") == pytest.approx(losses(whole), rel=1e-5)


def check_two_steps(run: Path, samples: int, classes: int) -> None:
    """Two steps of finite loss, the first near that of guessing, and one validation."""
    assert len(losses(run)) == 2
    assert abs(losses(run)[0] - np.log(classes)) < 1
    assert all(map(np.isfinite, losses(run)))
    assert final(run)["samples"] == samples
    assert final(run)["accuracy"] in {count / samples for count in range(samples + 1)}
