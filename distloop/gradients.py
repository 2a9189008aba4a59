"""The gradient of a step whose weights (tokens, pixels) are known only once its micro-batches have been seen."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def divide_by_weight(model: nn.Module, weight: Tensor | int, samples: int) -> None:
    """Turn gradients of Σ loss / samples into those of Σ loss / Σ weight, over all ranks.

    `weight` is this rank's sum over the step. One number is added up over the ranks and never leaves the
    device. A step without any weight (all tokens ignored) gets a gradient of zero.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total = torch.as_tensor(weight, dtype=torch.float32, device=parameters[0].device).clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = total.to(parameters[0].dtype)
    factor = samples / torch.where(total == 0, 1, total)  # no branch: the host does not wait for the number
    torch._foreach_mul_(gradients, factor)
