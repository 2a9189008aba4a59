"""Validation counts every sample once, and all ranks validate the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import train, write_config
from tests.records import rows


def validations(tmp_path: Path, world_size: int, arguments: list[str]) -> list[dict[str, float]]:
    name = f"on-{world_size}"
    train(tmp_path, [*arguments, "--name", name], world_size).check()
    return rows(tmp_path / "runs" / name, "validate")


@pytest.mark.parametrize("batch_size", [7, 100, 256])
def test_the_numbers_do_not_depend_on_the_number_of_ranks(tmp_path: Path, batch_size: int) -> None:
    # 360 samples in batches of 7 (52, the last of 3), 100 (4, the last of 60) and 256 (2: some ranks have none).
    settings = {"model": {"name": "mlp"}, "batch": {"global_size": 48}, "train": {"steps": 12}}
    arguments = ["--config", str(write_config(tmp_path, settings)), "--validate.batch-size", str(batch_size)]
    arguments += ["--validate.every-steps", "6", "--optim.lr", "1e-3", "--optim", "sgd", "--dtype", "float64"]
    reference = validations(tmp_path, 1, arguments)
    assert [row["samples"] for row in reference] == [360, 360]
    for world_size in (2, 3, 4):
        for row, expected in zip(validations(tmp_path, world_size, arguments), reference, strict=True):
            assert row["samples"] == 360
            assert row["accuracy"] == expected["accuracy"]
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_ranks_validate_the_same_batch_statistics(tmp_path: Path) -> None:
    # With BatchNorm the ranks' running statistics differ: whoever validates a batch must use rank 0's. One batch
    # is validated by rank 0 alone, batches of 10 by both; the same model must give the same numbers.
    settings = {
        "model": {"name": "cnn", "args": {"width": 8, "norm": "batch"}},
        "batch": {"global_size": 48},
        "train": {"steps": 12},
    }
    arguments = ["--config", str(write_config(tmp_path, settings)), "--dtype", "float64"]
    whole = [*arguments, "--validate.batch-size", "360", "--name", "whole"]
    parts = [*arguments, "--validate.batch-size", "10", "--name", "parts"]
    for words in (whole, parts):
        train(tmp_path, words, 4).check()
    (one,), (other,) = (rows(tmp_path / "runs" / name, "validate") for name in ("whole", "parts"))
    assert one["accuracy"] == other["accuracy"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)


def test_a_checkpoint_gives_the_same_numbers_on_any_number_of_ranks(tmp_path: Path) -> None:
    # A BatchNorm model trained once, then validated from its weights after one step that changes next to nothing.
    settings = {
        "model": {"name": "cnn", "args": {"width": 8, "norm": "batch"}},
        "train": {"steps": 20},
        "dtype": "float64",
    }
    config = ["--config", str(write_config(tmp_path, settings))]
    train(tmp_path, [*config, "--name", "first"]).check()
    again = [*config, "--init-from", str(tmp_path / "runs" / "first"), "--train.steps", "1", "--optim.lr", "1e-15"]
    again += ["--batch.global-size", "48", "--batch.micro-size", "12", "--validate.batch-size", "7"]
    again += ["--task", "tests.statistics_code:FrozenStatistics"]
    reference = validations(tmp_path, 1, again)[0]
    for world_size in (2, 3, 4):
        row = validations(tmp_path, world_size, again)[0]
        assert (row["samples"], row["accuracy"]) == (360, reference["accuracy"])
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-6)
