"""Parameter groups, the optimizer, weight averaging, and the learning rate as a pure function of the step."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distloop.config.settings import Config, Optim, Schedule
from distloop.errors import UsageError

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: what is decayed, and norms, biases and other vectors, which are not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:  # a tied weight counts once
                seen.add(id(parameter))
                (plain if parameter.ndim < 2 or isinstance(module, NORMS) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Optim, device: torch.device, precision: str) -> torch.optim.Optimizer:
    """The optimizer that the config names. Raises UsageError for a model without parameters to train."""
    groups = parameter_groups(model, config.weight_decay)
    if not groups:
        raise UsageError("The model has no parameters that require a gradient: there is nothing to train.")
    # Fused: one pass over the parameters instead of one operation each. Not with fp16, where the fused optimizers
    # leave a step out by themselves, so that nobody could count it.
    fused = device.type in ("cpu", "cuda") and precision != "fp16"
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


class Average:
    """An exponential moving average of a model's parameters and buffers; without a decay there is none."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.averaged = None if decay is None else AveragedModel(model, use_buffers=True)

    @property
    def module(self) -> nn.Module | None:
        """A model with the averaged weights."""
        return None if self.averaged is None else self.averaged.module

    def update(self, model: nn.Module) -> None:
        """Take up the model's weights as they are after a step."""
        if self.averaged is not None and self.decay is not None:
            update_average(self.averaged, model, self.decay)


@torch.no_grad()
def update_average(averaged: AveragedModel, model: nn.Module, decay: float) -> None:
    """Bring the average up to date, after each step; the first time it is a copy.

    The decay rises to `decay` over the first steps, as (1 + n) / (10 + n), so that a short run's average does not
    stay where training began (TensorFlow's ExponentialMovingAverage). AveragedModel.update_parameters would
    make the host wait for a GPU; here the count stays on the host.
    """
    steps = int(averaged.n_averaged)
    keep = min(decay, (1 + steps) / (10 + steps)) if steps else 0.0
    averages = itertools.chain(averaged.module.parameters(), averaged.module.buffers())
    moving: list[tuple[Tensor, Tensor]] = []
    for average, value in zip(averages, itertools.chain(model.parameters(), model.buffers()), strict=True):
        if keep and average.is_floating_point():
            moving.append((average, value))
        else:  # such as BatchNorm's counters
            average.copy_(value)
    if moving:
        targets, values = map(list, zip(*moving, strict=True))
        torch._foreach_mul_(targets, keep)  # not lerp: an attention mask's -inf stays what it is
        torch._foreach_add_(targets, values, alpha=1 - keep)
    averaged.n_averaged += 1


class LearningRate:
    """The learning rate of each step, a function of the step alone."""

    def __init__(self, config: Config, total_steps: int) -> None:
        """Raises UsageError for a schedule that does not fit into so many steps."""
        check_schedule(config.schedule, total_steps)
        self.total_steps, self.peak, self.schedule = total_steps, config.optim.lr, config.schedule

    def __call__(self, step: int) -> float:
        return lr_at(step, self.total_steps, self.peak, self.schedule)


def lr_at(step: int, total_steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of `step` (0 ≤ step < total_steps); it depends on nothing else.

    Every shape but one_cycle, which has a rise of its own, first rises linearly over warmup_steps and then
    takes its course over the steps that are left. Cosine: Loshchilov and Hutter 2017; one_cycle: Smith and
    Topin 2018, with PyTorch's factors (from peak / 25 up, down to peak / 250000).
    """
    warmup = schedule.warmup_steps
    if schedule.name == "one_cycle":
        rise = warmup or max(1.0, 0.3 * total_steps - 1)
        low, last = peak / 25, peak / 25e4
        if step < rise:
            return _cosine(low, peak, step / rise)
        return _cosine(peak, last, (step - rise) / max(1, total_steps - 1 - rise))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    final = peak * schedule.final_ratio
    match schedule.name:
        case "linear":
            return peak + (final - peak) * progress
        case "cosine":
            return _cosine(peak, final, progress)
        case "multi_step":
            return peak * schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
        case "warmup_stable_decay":
            decay = schedule.decay_steps or min(total_steps - warmup, max(1, round(0.2 * total_steps)))
            return peak + (final - peak) * max(0.0, 1 - (total_steps - step) / decay)
        case _:
            return peak


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_schedule(schedule: Schedule, total_steps: int) -> None:
    """Raises UsageError for a schedule that does not fit into the run."""
    for key, steps in (("warmup_steps", schedule.warmup_steps), ("decay_steps", schedule.decay_steps or 0)):
        if steps >= total_steps:
            raise UsageError(
                f"schedule.{key} = {steps} does not fit into a run of {total_steps} steps: lower it, or train longer."
            )
    if schedule.warmup_steps + (schedule.decay_steps or 0) > total_steps:
        raise UsageError(
            f"schedule.warmup_steps = {schedule.warmup_steps} and schedule.decay_steps = {schedule.decay_steps} do not "
            f"fit into a run of {total_steps} steps together."
        )


def _cosine(start: float, stop: float, progress: float) -> float:
    return stop + (start - stop) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
