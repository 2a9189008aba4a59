"""torchvision's models with auxiliary outputs train and validate on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models.googlenet import GoogLeNetOutputs

from distloop.data.datasets import DataSource
from tests.tools.ranks import train, write_config
from tests.tools.records import losses, rows, run_of


def pictures() -> DataSource:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = TensorDataset(images, torch.arange(8) % 2)
    return DataSource(half, half, classes=("cat", "dog"))


class Small(nn.Module):
    """GoogLeNet's outputs, from three linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(192, num_classes) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor | GoogLeNetOutputs:
        outputs = [layer(images.flatten(1)) for layer in self.layers]
        return GoogLeNetOutputs(*outputs) if self.training else outputs[0]


class Pair(Small):
    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        outputs = super().forward(images)
        return (outputs[0], outputs[1]) if self.training else outputs


def settings(folder: Path, model: str) -> list[str]:
    here = "tests.multiprocess.test_auxiliary_outputs"
    config = {
        "device": "cpu",
        "data": f"{here}:pictures",
        "model": f"{here}:{model}",
        "dtype": "float64",
        "batch": {"global_size": 4, "micro_size": 2},
        "train": {"steps": 4},
        "log": {"every_steps": 1},
    }
    return ["--config", str(write_config(folder, config))]


def test_they_train_to_the_same_numbers_on_one_rank_and_two(tmp_path: Path) -> None:
    found = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        train(folder, settings(folder, "Small"), world_size).check()
        found.append(losses(run_of(folder)))
        assert "accuracy" in rows(run_of(folder), "validate")[-1]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_tuple_of_ones_own_is_refused_before_a_step_is_taken(tmp_path: Path, world_size: int) -> None:
    outcome = train(tmp_path, settings(tmp_path, "Pair"), world_size)
    assert outcome.codes == [2] * world_size, outcome.output
    assert outcome.output.count("the model gave a tuple of 2") == 1
    assert "Traceback" not in outcome.output
    metrics = run_of(tmp_path) / "metrics.jsonl"
    assert not (metrics.exists() and metrics.read_text())


@pytest.mark.long
def test_torchvisions_inception_trains(tmp_path: Path) -> None:
    config = {
        "device": "cpu",
        "data": "tests.multiprocess.test_auxiliary_outputs:large_pictures",
        "model": {"name": "inception_v3", "args": {"init_weights": False}},
        "batch": {"global_size": 2},
        "train": {"steps": 1},
    }
    train(tmp_path, ["--config", str(write_config(tmp_path, config))]).check()


def large_pictures() -> DataSource:
    images = torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    half = TensorDataset(images, torch.arange(2))
    return DataSource(half, half, classes=("cat", "dog"))
