"""Sums of losses, kept on the device and read only at logging steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class LossSums:
    """Σ loss and Σ weight of the step in hand and of the epoch so far; this rank's until they are read."""

    def __init__(self, device: torch.device, epoch: tuple[float, float] = (0.0, 0.0)) -> None:
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.start_epoch(epoch)
        self.start_step()

    def start_step(self) -> None:
        self.step_losses: list[Tensor] = []  # one for each micro-batch
        self.step_loss: Tensor | None = None
        self.step_weight: Tensor | int = 0

    def start_epoch(self, earlier: tuple[float, float] = (0.0, 0.0)) -> None:
        """Begin an epoch's sums; `earlier`: what a previous attempt, over all ranks, has of them."""
        self.earlier = earlier
        self.epoch_loss = torch.zeros((), dtype=self.dtype, device=self.device)
        self.epoch_weight: Tensor | int = 0

    def add(self, loss: Tensor, weight: Tensor | int) -> None:
        """Count one micro-batch."""
        loss = loss.detach()
        self.step_losses.append(loss)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        self.step_weight = self.step_weight + weight

    def end_step(self, left_out: Tensor | None = None) -> None:
        """Count the step into the epoch, unless the flag (a bool on the device) says that it is left out."""
        loss, weight = self.step_loss, self.step_weight
        if left_out is not None and loss is not None:
            loss, weight = torch.where(left_out, 0, loss), torch.where(left_out, 0, torch.as_tensor(weight))
        self.epoch_loss += loss if loss is not None else 0
        self.epoch_weight = self.epoch_weight + weight

    def read(self, own: float = 0.0) -> tuple[float, float, tuple[float, float], list[float]]:
        """(mean of the step, mean of the epoch so far, sums of the epoch, each rank's `own`): a collective call.

        All over all ranks. It waits for the device.
        """
        sums = (
            self.step_loss if self.step_loss is not None else 0.0,
            self.step_weight,
            self.epoch_loss,
            self.epoch_weight,
            own,
        )
        values = torch.stack([torch.as_tensor(value, dtype=self.dtype, device=self.device) for value in sums])
        ranks = [values]
        if dist.is_initialized() and dist.get_world_size() > 1:
            ranks = [torch.empty_like(values) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, values)
        by_rank = torch.stack(ranks).tolist()
        step_loss, step_weight, epoch_loss, epoch_weight, _ = (sum(column) for column in zip(*by_rank, strict=True))
        epoch = (self.earlier[0] + epoch_loss, self.earlier[1] + epoch_weight)
        return step_loss / (step_weight or 1), epoch[0] / (epoch[1] or 1), epoch, [row[-1] for row in by_rank]
