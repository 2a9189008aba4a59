"""Each recipe in configs/ trains, and what it says it reaches, it reaches."""

from __future__ import annotations

import functools
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distloop.commands import tokens
from tests.multiprocess.test_exact_resume import check_same, go_on, stop
from tests.tools.image_files import write_cifar10, write_pictures
from tests.tools.ranks import REPOSITORY, accelerate_launch, command, train
from tests.tools.records import largest_difference, losses, rows, status, weights

CONFIGS = REPOSITORY / "configs"
SAMPLE = Path(os.environ.get("DISTLOOP_FASHION_MNIST", REPOSITORY.parent / "shared" / "data" / "fashion_mnist_sample"))
CLASSES = ("cat", "cow", "dog", "fox", "hen", "pig")


def test_every_recipe_is_tested_here() -> None:
    tested = {"digits", "linear_regression", "fashion_mnist", "cifar10", "imagenet", "resnet50", "gpt"}
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
@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sample_of_fashion_mnist_is_learnt(tmp_path: Path, processes: int) -> None:
    # 750 + 150 images. Eight seeds end between 0.81 and 0.85.
    arguments = ["--config", str(CONFIGS / "fashion_mnist.yaml"), "--data.root", str(SAMPLE), "--train.epochs", "25"]
    arguments += ["--batch.global-size", "32", "--model.args.width", "16", "--validate.every-epochs", "5"]
    words = [*accelerate_launch(processes), *arguments, "--expect-world", str(processes)]
    done = command(words, tmp_path, {"ACCELERATE_USE_CPU": "true"}, timeout=240)
    assert done.returncode == 0, done.stdout
    assert final(tmp_path / "runs" / "fashion_mnist")["accuracy"] >= 0.78
    assert final(tmp_path / "runs" / "fashion_mnist")["samples"] == 150


def cifar10(folder: Path, name: str, *more: str, **how: Any) -> Path:
    """Train on 20 images in the form of CIFAR-10's files; the run."""
    if not (folder / "data").exists():
        write_cifar10(folder / "data")
    arguments = ["--config", str(CONFIGS / "cifar10.yaml"), "--data", "tests.lab.user_code:small_cifar10"]
    arguments += ["--batch.global-size", "8", "--log.every-steps", "1", "--name", name]
    train(folder, [*arguments, *more], **how).check()
    return folder / "runs" / name


def pictures(folder: Path, recipe: str, name: str, *more: str, **how: Any) -> Path:
    """Train on 24 small JPEGs of 6 classes; the run. Its task says how many samples are mixed."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures", 4, 1, CLASSES)
    arguments = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--data.root", "pictures", "--name", name]
    arguments += ["--data.args.crop", "32", "--data.args.resize", "40", "--task", "tests.lab.user_code:SaysMixed"]
    arguments += ["--batch.global-size", "8", "--batch.micro-size", "4", "--schedule.warmup-steps", "1"]
    train(folder, [*arguments, "--log.every-steps", "1", *more], **how).check()
    return folder / "runs" / name


def mixed(run: Path) -> list[float]:
    """The share of samples with several classes, in each step."""
    return [row["mixed"] for row in rows(run, "train")]


def test_cifar10_trains_on_its_files(tmp_path: Path) -> None:
    run = cifar10(tmp_path, "cifar10", "--train.steps", "2", "--schedule.warmup-steps", "1")
    check_two_steps(run, 4, 10)


def test_resnet50_trains_on_folders_of_pictures_that_it_mixes(tmp_path: Path) -> None:
    run = pictures(tmp_path, "resnet50", "resnet50", "--train.steps", "2", "--data.args.validation-crop", "40")
    check_two_steps(run, 6, 6)
    assert max(mixed(run)) > 0.4
    assert len(list((run / "checkpoints").glob("*/averaged.safetensors"))) == 1


@pytest.mark.long
def test_imagenet_trains_on_folders_of_pictures(tmp_path: Path) -> None:
    run = pictures(tmp_path, "imagenet", "imagenet", "--train.steps", "2")
    check_two_steps(run, 6, 6)
    assert mixed(run) == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["resnet50", "cifar10", "cifar10 as its source"])
def test_a_recipe_that_mixes_is_the_same_on_one_rank_two_and_two_that_are_stopped(tmp_path: Path, recipe: str) -> None:
    arguments = ["--precision", "no", "--dtype", "float64", "--batch.micro-size", "4"]
    if recipe == "resnet50":
        run = functools.partial(pictures, tmp_path, recipe)
        arguments += ["--train.steps", "4", "--data.args.crop", "48", "--data.args.validation-crop", "40"]  # 3 an epoch
    else:
        run = functools.partial(cifar10, tmp_path)
        arguments += ["--task", "tests.lab.user_code:SaysMixed", "--train.epochs", "2"]  # of 20 images each
        arguments += ["--schedule.warmup-steps", "1", "--task.args.mixup", "0.2", "--task.args.cutmix", "1.0"]
    if recipe == "cifar10 as its source":  # the words of its first lines
        comments = " ".join(re.findall("^#.*", (CONFIGS / "cifar10.yaml").read_text(), re.MULTILINE))
        arguments = arguments[:-4]
        for words in re.findall(r"--(?!train)\S+(?: (?!-|#)\S+)?", comments):
            arguments += shlex.split(words)
    one, two = (run(str(world_size), *arguments, world_size=world_size) for world_size in (1, 2))
    assert len(losses(one)) == (6 if recipe == "cifar10 as its source" else 4)
    # An epoch's third step of 4 samples, which --batch.remainder trains, is normalised in other parts on two ranks.
    alike = 2 if recipe == "cifar10 as its source" else 4
    assert np.allclose(losses(one)[:alike], losses(two)[:alike], rtol=1e-6)
    assert mixed(one) == mixed(two)
    assert (max(mixed(one)) > 0.4) == (recipe != "cifar10 as its source")
    stopping = {"world_size": 2, "loop": "tests.lab.interrupted"}
    stopped = run("stopped", *arguments, environment={"STOP": "SIGTERM 1 1"}, **stopping)
    assert status(stopped)["state"] == "stopped"
    assert status(stopped)["step"] in (1, 2, 3)
    run("stopped", *arguments, **stopping)
    assert losses(stopped) == losses(two)
    assert final(stopped)["loss"] == final(two)["loss"]
    assert largest_difference(weights(stopped), weights(two)) == 0.0


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
