"""The built-in task `regression`: numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distloop.data.batches import targets_of
from distloop.errors import UsageError
from distloop.training.tasks import Sums, Task


class Regression(Task):
    """Numbers: mean squared error and R². Outputs and targets of one shape, [batch, …]."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        targets = targets_of(batch)
        if outputs.shape != targets.shape:  # broadcasting would silently compute another loss
            raise UsageError(
                f"task regression needs outputs and targets of one shape; the model gave {list(outputs.shape)}, the "
                f"data {list(targets.shape)}."
            )
        return functional.mse_loss(outputs, targets, reduction="sum") / max(1, outputs[0].numel()), len(targets)

    def metrics(self, outputs: Tensor, batch: Any) -> Sums:
        pair = (outputs, targets_of(batch))
        outputs, targets = ((values.cpu() if values.is_mps else values).double() for values in pair)  # MPS: no float64
        return {
            "squared_error": (outputs - targets).square().sum(),
            "targets": targets.sum(),
            "squared_targets": targets.square().sum(),
            "elements": torch.tensor(targets.numel()),
        }

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        spread = sums["squared_targets"] - sums["targets"].square() / sums["elements"]
        return {**super().summary(sums), "r2": float(1 - sums["squared_error"] / spread)}
