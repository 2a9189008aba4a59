"""The gradient of a step: its division by the weight, its norm, clipping."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distloop.config.settings import Config
from distloop.data.batches import send
from distloop.data.datasets import DataSource
from distloop.data.look import example_batch
from distloop.data.order import Plan
from distloop.data.seeding import Place, seed_place
from distloop.training.untrained import refuse_unused_parameters


def exchange_gradients(task: Any) -> None:
    """After the last backward pass of a step: give each trained parameter of a task that is a module the mean of its
    gradients over the ranks, as DDP does for the model's, in one exchange for each dtype. A parameter without a
    gradient has one of zeros, on any number of ranks. Collective for such a task; for others it does nothing."""
    if not isinstance(task, nn.Module):
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in task.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def divide_by_weight(model: nn.Module, weight: Tensor | int, samples: int, task: Any = None) -> None:
    """Turn gradients of Σ loss / samples into those of Σ loss / Σ weight, over all ranks: those of the model, and of a
    task that is a module.

    `weight`: this rank's sum over the step. The sum over the ranks stays on the device. A step without any weight
    (all tokens ignored) gets a gradient of zero. Raises UsageError if DDP's `model` lacks gradients on this rank.
    """
    everything = list(model.parameters())
    refuse_unused_parameters(model, everything, "in a step")  # before the ranks wait for each other below
    everything += task.parameters() if isinstance(task, nn.Module) else []
    parameters = [parameter for parameter in everything if parameter.grad is not None]
    # Added, a number or a tensor of the CPU is an argument of the kernel; to copy it there, the host would wait.
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device).add_(weight)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = total.to(parameters[0].dtype)
    factor = samples / torch.where(total == 0, 1, total)  # no branch: the host does not wait for the number
    torch._foreach_mul_(gradients, factor)


def trial_batches(
    config: Config, source: DataSource, plan: Plan, device: torch.device, *models: nn.Module
) -> Iterator[Any]:
    """With several ranks: two batches, for each of which the caller does a forward and a backward pass of the models.
    Nothing stays of them but the order in which DDP adds gradients up. Collective.

    DDP sorts its buckets, and with them the order of the sums, after the first backward pass. In the first step of
    each attempt, that would round an interrupted run otherwise than an uninterrupted one. Afterwards the models'
    gradients are removed and their buffers restored; parameters do not change. Raises UsageError if DDP's models have
    parameters without a gradient.
    """
    if plan.world_size == 1:
        return
    samples = min(plan.micro_batch_size, plan.samples)
    dtype = getattr(torch, config.dtype)
    example = example_batch(source, config.data, config.seed, dtype, samples, device)
    before = [buffer.clone() for model in models for buffer in model.buffers()]
    for model in models:
        model.train()
    for number in range(2):
        seed_place(Place.TRIAL, config.seed, device, number)
        yield send(example, device)
        for model in models:
            refuse_unused_parameters(model, model.parameters(), "in a trial pass")
    for model in models:
        model.zero_grad()
    buffers = (buffer for model in models for buffer in model.buffers())  # now: a forward pass may assign others
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def norm_and_clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradient down to `max_norm`, if given; returns its norm before that, [] on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
