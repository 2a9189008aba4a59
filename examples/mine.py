"""Data, a model and a task of one's own, to change or replace. configs/mine.yaml names them.

Is a tumour malignant? 569 of them were measured: 30 numbers each. The data come with scikit-learn.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from distloop.tasks import Task

Sample = dict[str, Tensor]


class Tumours:
    """Anything with __len__ and __getitem__ is a data set. A sample here: measurements [30], malignant [], 0 or 1."""

    def __init__(self, measurements: Tensor, malignant: Tensor, noise: float = 0.0) -> None:
        self.measurements, self.malignant, self.noise = measurements, malignant, noise

    def __len__(self) -> int:
        return len(self.measurements)

    def __getitem__(self, index: int) -> Sample:
        # Random numbers may be drawn: distloop seeds them for each sample, whichever process loads it.
        measurements = self.measurements[index] + self.noise * torch.randn(30)
        return {"measurements": measurements, "malignant": self.malignant[index]}


def tumours(noise: float = 0.1) -> tuple[Tumours, Tumours]:
    """(training data, validation data). Its arguments are data.args in the config."""
    measurements, benign = load_breast_cancer(return_X_y=True)
    train, validation = train_test_split(range(569), test_size=0.2, stratify=benign, random_state=0)
    measurements = (measurements - measurements[train].mean(0)) / measurements[train].std(0)
    inputs, malignant = torch.tensor(measurements, dtype=torch.float32), torch.tensor(1.0 - benign)
    return Tumours(inputs[train], malignant[train], noise), Tumours(inputs[validation], malignant[validation])


class Net(nn.Module):
    """Measurements [batch, 30] to logits [batch]: above 0 is malignant. Its arguments are model.args in the config."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, measurements: Tensor) -> Tensor:
        return self.layers(measurements).squeeze(1)


class Diagnosis(Task):
    """What is computed from a batch. A task gives sums, not means, so that batches and processes can be added up."""

    best = ("recall", "max")  # the best weights are those that find most of the malignant tumours

    def forward(self, model: nn.Module, batch: Sample) -> Tensor:
        return model(batch["measurements"])

    def loss(self, outputs: Tensor, batch: Sample) -> tuple[Tensor, int]:
        return binary_cross_entropy_with_logits(outputs, batch["malignant"], reduction="sum"), len(outputs)

    def metrics(self, outputs: Tensor, batch: Sample) -> dict[str, Tensor]:
        said, malignant = outputs > 0, batch["malignant"] == 1
        return {"correct": (said == malignant).sum(), "found": (said & malignant).sum(), "malignant": malignant.sum()}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        accuracy = int(sums["correct"]) / int(sums["samples"])
        recall = int(sums["found"]) / int(sums["malignant"])
        return {**super().summary(sums), "accuracy": accuracy, "recall": recall}
