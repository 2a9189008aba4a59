"""Sums of losses on the device, which the host reads only when something is due."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distloop.errors import UsageError
from distloop.ranks.sums import BLOCK
from distloop.training.named_sums import check_sums
from distloop.training.weights import Weights


class LossSums:
    """Σ loss and Σ weight of the current step and of the epoch so far; of this rank alone until read()."""

    def __init__(self, device: torch.device, epoch_sums: tuple[float, float] = (0.0, 0.0)) -> None:
        """`epoch_sums`: those of earlier attempts, over all ranks."""
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.weights = Weights()
        self.names: set[str] = set()  # of sums that a task gives beside loss and weight: those that were checked
        self.zero = torch.zeros((), dtype=self.dtype, device=device)
        self.begin_epoch(epoch_sums)
        self.begin_step()

    def begin_step(self) -> None:
        self.step_losses: list[Tensor] = []  # one for each micro-batch
        self.step_loss: Tensor | None = None
        self.step_weight: Tensor | int = 0
        self.step_sums: dict[str, Any] = {}

    def begin_epoch(self, earlier: tuple[float, float] = (0.0, 0.0)) -> None:
        self.earlier = self.epoch_sums = earlier
        """epoch_sums: Σ loss and Σ weight of the epoch, over all ranks, as of the last read()."""
        self.epoch_loss = self.zero.clone()
        self.epoch_weight: Tensor | int = 0

    def add(
        self,
        loss: Tensor,
        weight: Any,
        is_empty: bool = False,
        samples: int | None = None,
        sums: Mapping[str, Any] | None = None,
    ) -> None:
        """Count one micro-batch: the sums of its losses and weights. An empty one counts nothing. `samples`: what the
        weight must be, as Micro.samples says; None: any number. `sums`: more of them by name, numbers or tensors of one
        element. Raises UsageError for a wrong weight: at once, or in read() if it is a tensor; and for wrong sums."""
        weight = self.weights.check(weight, samples)
        loss = loss.detach()
        if is_empty:
            loss, weight = loss * 0, weight * 0
        self.step_losses.append(loss)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        self.step_weight = self.step_weight + weight
        if sums is not None:
            self._add_sums(sums, is_empty)

    def _add_sums(self, sums: Mapping[str, Any], is_empty: bool) -> None:
        if not isinstance(sums, Mapping) or not self.names.issuperset(sums):
            check_sums(sums)
            self.names.update(sums)
        for name, value in sums.items():
            if is_empty:
                value = 0
            elif isinstance(value, Tensor) and value.numel() == 1:
                value = self.zero + value.detach().reshape(())  # of its own: does not keep the batch; and in float64
            elif not isinstance(value, (int, float)):  # of NumPy, or in a later step no number
                check_sums(sums)
            self.step_sums[name] = self.step_sums[name] + value if name in self.step_sums else value

    def end_step(self, left_out: Tensor | None = None) -> None:
        """Count the step into the epoch, unless the flag (a bool on the device) says that it is left out."""
        loss, weight = self.step_loss, self.step_weight
        if left_out is not None and loss is not None:
            # To add a number, or a tensor of the CPU, makes it an argument of the kernel; to copy it there would wait.
            loss, weight = torch.where(left_out, 0, loss), torch.where(left_out, 0, self.zero + weight)
        self.epoch_loss += 0 if loss is None else loss
        self.epoch_weight = self.epoch_weight + weight

    def read(self, memory_gib: float = 0.0) -> dict[str, Any]:
        """Over all ranks, for a row: loss, the mean of the step; running_loss, that of the epoch so far; memory_gib,
        what each rank has given, which travels in the same exchange; and the step's other sums, divided by its weight.
        Collective; waits for the device. Raises UsageError, before anything of the step is saved, if a weight was
        wrong, and if ranks have sums of other names."""
        self.weights.read()
        step_loss = self.step_loss if self.step_loss is not None else 0.0
        names = sorted(self.step_sums)
        checksum = zlib.crc32("\n".join(names).encode()) % 2**24  # exact in float32, too
        sums = [step_loss, self.step_weight, self.epoch_loss, self.epoch_weight, memory_gib, checksum]
        sums += [self.step_sums[name] for name in names]
        sums += [0.0] * (BLOCK - len(sums))  # as many on all ranks, also if they disagree
        values = torch.stack([torch.as_tensor(value, dtype=self.dtype, device=self.device) for value in sums])
        by_rank = _gathered(values[:BLOCK])
        if any(row[5] != checksum for row in by_rank):
            raise UsageError(
                "task.loss() gives sums of other names on some ranks. Let all ranks give the same ones in each step, "
                f"if need be with 0; rank {dist.get_rank()} gives {', '.join(names) or 'none'}."
            )
        if len(values) > BLOCK:  # only now: all ranks have as many
            by_rank = [row + more for row, more in zip(by_rank, _gathered(values[BLOCK:]), strict=True)]
        loss, weight, epoch_loss, epoch_weight, _, _, *others = (sum(column) for column in zip(*by_rank, strict=True))
        self.epoch_sums = (self.earlier[0] + epoch_loss, self.earlier[1] + epoch_weight)
        return {
            "loss": loss / (weight or 1),
            "running_loss": self.epoch_sums[0] / (self.epoch_sums[1] or 1),
            "memory_gib": [row[4] for row in by_rank],
            **{name: value / (weight or 1) for name, value in zip(names, others, strict=False)},
        }


def _gathered(values: Tensor) -> list[list[float]]:
    """These values of each rank. Collective; waits for the device."""
    ranks = [values]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, values.contiguous())
    return torch.stack(ranks).tolist()
