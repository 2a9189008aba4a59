"""Validation counts every sample once, and all ranks validate the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distloop.tasks import Classification
from tests.tools.ranks import train, write_config
from tests.tools.records import found, largest_difference, losses, rows, weights


def validations(tmp_path: Path, world_size: int, arguments: list[str]) -> list[dict[str, float]]:
    name = f"on-{world_size}"
    train(tmp_path, [*arguments, "--name", name], world_size).check()
    return list(map(found, rows(tmp_path / "runs" / name, "validate")))


def details(tmp_path: Path, world_size: int) -> dict[str, Any]:
    return json.loads((tmp_path / "runs" / f"on-{world_size}" / "validation.json").read_text())


@pytest.mark.parametrize("batch_size", [7, 100, 256])
def test_the_numbers_do_not_depend_on_the_number_of_ranks(tmp_path: Path, batch_size: int) -> None:
    # 360 samples in batches of 7 (52, the last of 3), 100 (4, the last of 60) and 256 (2: some ranks have none).
    settings = {"model": {"name": "mlp"}, "batch": {"global_size": 48}, "train": {"steps": 12}}
    arguments = ["--config", str(write_config(tmp_path, settings)), "--validate.batch-size", str(batch_size)]
    arguments += ["--validate.every-steps", "6", "--optim.lr", "1e-3", "--optim", "sgd", "--dtype", "float64"]
    reference = validations(tmp_path, 1, arguments)
    assert [row["samples"] for row in reference] == [360, 360]
    expected_details = details(tmp_path, 1)
    confusion = expected_details["confusion"]
    assert (expected_details["step"], sum(map(sum, confusion)), len(confusion)) == (12, 360, 10)
    assert sum(confusion[number][number] for number in range(10)) / 360 == reference[1]["accuracy"]
    assert all(mistake["picture"] for mistake in expected_details["mistakes"])
    for world_size in (2, 3, 4):
        for row, expected in zip(validations(tmp_path, world_size, arguments), reference, strict=True):
            assert row["samples"] == 360
            assert row["accuracy"] == expected["accuracy"]
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        found = details(tmp_path, world_size)
        for mistake, expected in zip(found["mistakes"], expected_details["mistakes"], strict=True):
            assert mistake == {**expected, "confidence": pytest.approx(expected["confidence"], abs=2e-6)}
        assert found == {**expected_details, "mistakes": found["mistakes"]}


def test_how_often_a_run_is_validated_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    # Dropout and BatchNorm train otherwise than they are validated.
    model = {"name": "cnn", "args": {"norm": "batch", "dropout": 0.3, "width": 4}}
    settings = {"data": "digits", "model": model, "batch": {"global_size": 48}, "train": {"steps": 12}}
    arguments = ["--config", str(write_config(tmp_path, {**settings, "log": {"every_steps": 1}}))]
    for every in ("3", "12"):
        train(tmp_path, [*arguments, "--validate.every-steps", every, "--name", every]).check()
    often, seldom = tmp_path / "runs" / "3", tmp_path / "runs" / "12"
    assert (len(rows(often, "validate")), len(rows(seldom, "validate"))) == (4, 1)
    assert losses(often) == losses(seldom)
    assert largest_difference(weights(often), weights(seldom)) == 0


class AlwaysSure(Classification):
    """Is equally confident of everything."""

    def guesses(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        return batch[1], outputs.argmax(1), torch.ones(len(outputs))


def test_of_equally_confident_mistakes_all_numbers_of_ranks_show_the_same(tmp_path: Path) -> None:
    settings = {"model": {"name": "mlp"}, "batch": {"global_size": 48}, "train": {"steps": 3}}
    arguments = ["--config", str(write_config(tmp_path, settings)), "--validate.batch-size", "30"]
    arguments += ["--task", "tests.multiprocess.test_validation:AlwaysSure", "--dtype", "float64"]
    for world_size in (1, 2, 3):
        validations(tmp_path, world_size, arguments)
    found = details(tmp_path, 1)
    assert [mistake["index"] for mistake in found["mistakes"]] == sorted(
        mistake["index"] for mistake in found["mistakes"]
    )
    assert found["mistakes"][-1]["index"] < 60  # in the first two batches, of different ranks
    assert details(tmp_path, 2) == details(tmp_path, 3) == found


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
    again += ["--task", "tests.lab.frozen_statistics:FrozenStatistics"]
    reference = validations(tmp_path, 1, again)[0]
    for world_size in (2, 3, 4):
        row = validations(tmp_path, world_size, again)[0]
        assert (row["samples"], row["accuracy"]) == (360, reference["accuracy"])
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-6)
