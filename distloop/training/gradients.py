"""The gradient of a step: its division by the weight, its norm, clipping."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from distloop.config.settings import Config
from distloop.data.datasets import DataSource
from distloop.data.loader import example_batch
from distloop.data.order import Plan
from distloop.training.tasks import Task


def divide_by_weight(model: nn.Module, weight: Tensor | int, samples: int) -> None:
    """Turn gradients of Σ loss / samples into those of Σ loss / Σ weight, over all ranks.

    `weight`: this rank's sum over the step. The sum over the ranks stays on the device. A step without any weight
    (all tokens ignored) gets a gradient of zero.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total = torch.as_tensor(weight, dtype=torch.float32, device=parameters[0].device).clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = total.to(parameters[0].dtype)
    factor = samples / torch.where(total == 0, 1, total)  # no branch: the host does not wait for the number
    torch._foreach_mul_(gradients, factor)


def settle_buckets(
    config: Config,
    source: DataSource,
    plan: Plan,
    task: Task,
    model: nn.Module,
    bare_model: nn.Module,
    accelerator: Accelerator,
) -> None:
    """With several ranks, bring DDP's buckets into the order that they keep: see trial_passes. Collective."""
    if plan.world_size == 1:
        return
    samples = min(plan.micro_batch_size, plan.samples)
    example = example_batch(source, config.data, config.seed, getattr(torch, config.dtype), samples)
    trial_passes(model, bare_model, task, send_to_device(example, accelerator.device), accelerator.backward)


def trial_passes(
    model: nn.Module, bare_model: nn.Module, task: Task, batch: Any, backward: Callable[[Tensor], None]
) -> None:
    """Do two forward and backward passes, after which DDP does not change the order of its sums any more.

    DDP sorts its buckets, and with them the order of the sums, after the first backward pass. In the first step of
    each attempt, that would round an interrupted run otherwise than an uninterrupted one. Buffers are restored;
    parameters do not change.
    """
    buffers = [buffer.clone() for buffer in bare_model.buffers()]
    model.train()
    for _ in range(2):
        backward(task.loss(task.forward(model, batch), batch)[0])
    model.zero_grad()
    for buffer, before in zip(bare_model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def norm_and_clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradient down to `max_norm`, if given; returns its norm before that, [] on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
